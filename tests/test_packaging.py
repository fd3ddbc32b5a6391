"""The two import packages, the name clash around `kernels`, and what the documentation names."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import watersic_hf

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_no_importable_folder_shadows_the_package_kernels():
    inits = [*ROOT.glob("kernels/__init__.py"), *ROOT.glob("tests/**/__init__.py")]
    inits += ROOT.glob("benchmarks/**/__init__.py")

    assert inits == []


def test_transformers_finds_the_hub_package_kernels_from_the_repository_root(tmp_path):
    code = (
        "from transformers.utils import is_kernels_available; from transformers import "
        "LlamaForCausalLM; print(bool(is_kernels_available()))"
    )

    inside, outside = run_python(code), run_python(code, tmp_path)

    assert inside.returncode == 0, inside.stderr
    assert inside.stdout == outside.stdout


def test_watersic_kernels_refuses_another_import_name():
    done = run_python("import kernels.watersic_kernels")

    assert done.returncode != 0
    assert "two copies would register the same operators twice" in done.stderr


def test_import_loads_no_optional_dependency():
    code = (
        "import sys, watersic_hf; "
        "print([m for m in ('triton', 'datasets', 'optimum', 'watersic_kernels', 'gguf', "
        "'lm_eval', 'numba') "
        "if m in sys.modules])"
    )

    done = run_python(code)

    assert done.stdout.strip() == "[]", done.stderr


def test_public_names():
    assert sorted(watersic_hf.__all__) == [
        "CalibrationError",
        "CheckpointError",
        "CodecError",
        "LayerReport",
        "WaterSICConfig",
        "WaterSICHfQuantizer",
        "WaterSICLinear",
        "WaterSICRuntime",
        "__version__",
        "register",
        "set_residency",
    ]
    assert all(hasattr(watersic_hf, name) for name in watersic_hf.__all__)


def test_version_matches_pyproject_and_changelog():
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]

    assert watersic_hf.__version__ == declared
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()


# what is said of the past may name what is gone
HISTORY = {"CHANGELOG.md", "benchmarks/HISTORY.md"}

DOCUMENTS = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).as_posix() not in HISTORY
]

markdown = pytest.mark.parametrize("document", DOCUMENTS, ids=Path.as_posix)


@markdown
def test_paths_named_in_markdown_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`((?:watersic_hf|kernels|tests|benchmarks)/[\w./]*)`", text)

    assert [path for path in named if not (ROOT / path).exists()] == []


@markdown
def test_links_in_markdown_resolve(document):
    def anchors(path: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        return {
            re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles
        }

    text = (ROOT / document).read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@markdown
def test_python_names_in_markdown_resolve(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    missing = []
    for name in re.findall(r"`(watersic_hf(?:\.\w+)+)(?:\(.*\))?`", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)

    assert missing == []
