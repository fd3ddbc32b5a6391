"""The two import packages, the trap around the name `kernels`, and what the READMEs claim."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import watersic_hf

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_no_folder_that_could_shadow_the_package_kernels_is_importable():
    inits = [*ROOT.glob("kernels/__init__.py"), *ROOT.glob("tests/**/__init__.py")]
    inits += ROOT.glob("benchmarks/**/__init__.py")

    assert inits == []


def test_transformers_finds_hugging_faces_kernels_from_the_root_of_the_repository(tmp_path):
    code = (
        "from transformers.utils import is_kernels_available; from transformers import "
        "LlamaForCausalLM; print(bool(is_kernels_available()))"
    )

    inside, outside = run_python(code), run_python(code, tmp_path)

    assert inside.returncode == 0, inside.stderr
    assert inside.stdout == outside.stdout


def test_the_kernels_refuse_a_second_name():
    done = run_python("import kernels.watersic_kernels")

    assert done.returncode != 0
    assert "two copies would register the same operators twice" in done.stderr


def test_importing_the_package_touches_neither_triton_nor_the_calibration_sets():
    code = (
        "import sys, watersic_hf; "
        "print([m for m in ('triton', 'datasets', 'optimum', 'watersic_kernels', 'gguf', "
        "'lm_eval') "
        "if m in sys.modules])"
    )

    done = run_python(code)

    assert done.stdout.strip() == "[]", done.stderr


def test_the_public_names_are_these():
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


def test_the_version_is_that_of_the_distribution():
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]

    assert watersic_hf.__version__ == declared
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "readme", sorted(ROOT.rglob("*.md")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_path_that_a_readme_names_exists(readme):
    if ".venv" in readme.parts or readme.name == "CHANGELOG.md":
        return
    named = re.findall(
        r"`((?:watersic_hf|kernels|tests|benchmarks)/[\w./]*)`", readme.read_text(encoding="utf-8")
    )

    missing = [path for path in named if not (ROOT / path).exists()]

    assert missing == []
