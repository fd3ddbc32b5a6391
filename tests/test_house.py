"""Limits that keep the library readable: sizes, and one place for each kind of discovery."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted([*(ROOT / "watersic_hf").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

#: Lines of a file, and of a function; parameters of a function that is no public entry point.
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 80, 8
#: The hooks of transformers, without an engine behind them.
HOOKS = "watersic_hf/integration/quantizer.py"
HOOKS_LINES = 250

#: Functions that search a model; a `Selection` is the only one to call them.
DISCOVERY = ("linear_layers", "find_experts", "find_vocabulary_matrices", "towers_without_text")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function is compiled by Triton or numba: its parameters are its interface."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any("jit" in name or name == "intrinsic" for name in decorators)


def is_public_with_keywords(function: ast.FunctionDef) -> bool:
    arguments = function.args
    positional = [a for a in arguments.posonlyargs + arguments.args if a.arg not in ("self", "cls")]
    public = not function.name.startswith("_") or function.name == "__init__"
    return public and len(positional) <= PARAMETERS / 2


@pytest.mark.parametrize("file", LIBRARY, ids=name_of)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    limit = HOOKS_LINES if name_of(file) == HOOKS else FILE_LINES

    assert len(text.splitlines()) <= limit
    assert "fmt: skip" not in text
    assert "fmt: off" not in text
    for function in functions(ast.parse(text)):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= FUNCTION_LINES or is_kernel(function), f"{function.name}: {lines} lines"


@pytest.mark.parametrize("file", LIBRARY, ids=name_of)
def test_functions_have_few_parameters(file):
    for function in functions(ast.parse(file.read_text(encoding="utf-8"))):
        arguments = function.args
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        count = len([name for name in names if name not in ("self", "cls")])
        allowed = is_kernel(function) or is_public_with_keywords(function)
        assert count <= PARAMETERS or allowed, f"{function.name}: {count} parameters"


@pytest.mark.parametrize("name", DISCOVERY)
def test_discovery_has_one_caller(name):
    calls = [
        name_of(file)
        for file in LIBRARY
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]

    assert calls == ["watersic_hf/integration/selection.py"]
