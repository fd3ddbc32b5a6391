"""The layers of the package: who may import whom, and which third parties."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FOUNDATIONS = {
    "watersic_hf.core",
    "watersic_hf.codec",
    "watersic_hf.checkpoint",
    "watersic_hf.nn",
}

BELOW_EVALUATION = {
    *FOUNDATIONS,
    "watersic_hf.streams",
    "watersic_hf.calibration",
    "watersic_hf.quantization",
    "watersic_hf.integration",
}

#: Package -> (ours that it may import, third parties that it may import).
ALLOWED = {
    "watersic_hf.core": (set(), {"torch"}),
    "watersic_hf.codec": (set(), {"torch", "numpy"}),
    "watersic_kernels": (set(), {"torch", "triton", "numba", "llvmlite", "numpy"}),
    "watersic_hf.checkpoint": (
        {"watersic_hf.core", "watersic_hf.codec"},
        {"torch", "safetensors", "tqdm"},
    ),
    "watersic_hf.nn": (
        {"watersic_hf.core", "watersic_hf.codec", "watersic_hf.checkpoint", "watersic_kernels"},
        {"torch", "tqdm"},
    ),
    "watersic_hf.streams": (FOUNDATIONS, {"torch", "accelerate", "tqdm"}),
    "watersic_hf.calibration": (
        {*FOUNDATIONS, "watersic_hf.streams"},
        {"torch", "datasets", "optimum"},
    ),
    "watersic_hf.quantization": (
        {*FOUNDATIONS, "watersic_hf.streams", "watersic_hf.calibration"},
        {"torch"},
    ),
    "watersic_hf.integration": (
        {
            *FOUNDATIONS,
            "watersic_hf.streams",
            "watersic_hf.calibration",
            "watersic_hf.quantization",
        },
        {
            "torch",
            "tqdm",
            "transformers",
            "accelerate",
            "huggingface_hub",
            "peft",
            "filelock",
            "gguf",
        },
    ),
    "watersic_hf.evaluation": (
        BELOW_EVALUATION,
        {"torch", "numpy", "tqdm", "lm_eval", "transformers"},
    ),
    "watersic_hf.finetuning": (
        {*BELOW_EVALUATION, "watersic_hf.evaluation"},
        {"torch", "tqdm", "transformers"},
    ),
    "watersic_hf.vllm_plugin": ({*FOUNDATIONS, "watersic_hf.integration"}, {"torch", "vllm"}),
    # displays what the files of a model say: no tensor, no model
    "watersic_hf.report": ({"watersic_hf.core", "watersic_hf.checkpoint"}, set()),
}
# the command line is on top of everything; None: modules that are not packages, as demo.py
ALLOWED["watersic_hf.cli"] = ({*ALLOWED, None} - {"watersic_kernels"}, {"transformers"})


def package_of(module: str) -> str | None:
    return next((p for p in ALLOWED if module == p or module.startswith(f"{p}.")), None)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from watersic_hf import codec` is an import of watersic_hf.codec
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(package: str) -> list[Path]:
    root = ROOT / "kernels" if package == "watersic_kernels" else ROOT
    return sorted((root / package.replace(".", "/")).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_from_the_layers_below_it(package):
    ours, third = ALLOWED[package]

    for file in sources(package):
        for module in imports_of(file):
            top = module.split(".")[0]
            if top in ("watersic_hf", "watersic_kernels"):
                assert package_of(module) in {package, *ours}, f"{file} imports {module}"
            else:
                assert top in third | sys.stdlib_module_names, f"{file} imports {module}"


def test_every_package_of_the_tree_is_in_the_table():
    packages = {
        f"watersic_hf.{p.parent.name}" for p in (ROOT / "watersic_hf").glob("*/__init__.py")
    }

    assert packages <= set(ALLOWED)


def test_only_the_operators_import_the_kernels():
    users = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "watersic_hf").rglob("*.py")
        if any(module.startswith("watersic_kernels") for module in imports_of(file))
    }

    assert users <= {"watersic_hf/nn/backends.py"}
