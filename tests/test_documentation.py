"""Names and paths in backticks, in docstrings, comments and Markdown, are those of what exists."""

import ast
import builtins
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("watersic_hf", "watersic_kernels")
FOLDERS = ("watersic_hf", "kernels", "tests", "benchmarks")
#: Documents that describe the past.
HISTORY = {"CHANGELOG.md", "benchmarks/HISTORY.md"}
#: Programs of others.
PROGRAMS = {"torchrun"}

FILES = [
    path
    for path in sorted([*ROOT.glob("*.*"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.*"))])
    if "__pycache__" not in path.parts
]
DOCUMENTS = [
    path
    for path in FILES
    if path.suffix in (".md", ".py") and str(path.relative_to(ROOT)) not in HISTORY
]
LIBRARY = [
    path
    for path in DOCUMENTS
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("watersic_hf", "kernels")
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> tuple[str, list[ast.AST], list[ast.Constant]]:
    """The text of a Python file, its nodes, and those that are docstrings, also of attributes."""
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    alone = [node.value for node in nodes if isinstance(node, ast.Expr)]
    strings = [v for v in alone if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return text, nodes, strings


def quoted(path: Path, *, single: bool = False) -> list[str]:
    """All that stands in backticks; with `single`, only what stands in single ones."""
    if path.suffix == ".md":
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    else:
        text, _, strings = parsed(path)
        comments = re.findall(r"(?:^\s*|  )#.*", text, flags=re.M)
        prose = "\n\n".join([*(string.value for string in strings), *comments])
    # a role such as :math:`x` is another markup
    found = re.findall(r"(?<![`:\w])(`{1,2})([^`\n]+)\1(?!`)", prose)
    return [text for ticks, text in found if not single or ticks == "`"]


def is_field(owner: object, name: str) -> bool:
    """Whether a class has an annotated field, or an attribute that its methods assign."""
    if not inspect.isclass(owner):
        return False
    if any(name in vars(kind).get("__annotations__", {}) for kind in owner.__mro__):
        return True
    ours = [kind for kind in owner.__mro__ if kind.__module__.split(".")[0] in PACKAGES]
    return any(re.search(rf"\bself\.{name}\b", inspect.getsource(kind)) for kind in ours)


def resolves(owner: object, names: list[str]) -> bool:
    """Whether a module or class has these attributes, each of the one before."""
    for index, name in enumerate(names):
        if isinstance(owner, ModuleType) and not hasattr(owner, name):
            try:
                importlib.import_module(f"{owner.__name__}.{name}")
            except ModuleNotFoundError:
                return False
        if not hasattr(owner, name):
            # the value of a field is unknown here, so it must be the last
            return is_field(owner, name) and index == len(names) - 1
        owner = getattr(owner, name)
    return True


@functools.cache
def names_in_code() -> frozenset[str]:
    """All identifiers in the code of the repository, also those within strings; no docstrings."""
    found = {*dir(builtins), *PROGRAMS}
    for path in FILES:
        found |= {path.stem, path.name, *path.relative_to(ROOT).parts}
        if path.suffix == ".py":
            _, nodes, docstrings = parsed(path)
            skipped = set(map(id, docstrings))
            for node in nodes:
                if isinstance(node, ast.Constant):
                    if isinstance(node.value, str) and id(node) not in skipped:
                        found |= set(re.findall(r"\w+", node.value))
                    continue
                for field in ("id", "attr", "name", "asname", "arg", "module"):
                    value = getattr(node, field, None)
                    if isinstance(value, str):
                        found |= set(value.split("."))
    return frozenset(found)


@functools.cache
def owners() -> dict[str, str]:
    """By name, the module that defines a class, or that is called so."""
    modules = {module_of(path).rpartition(".")[2]: module_of(path) for path in LIBRARY}
    classes = {
        node.name: module_of(path)
        for path in LIBRARY
        for node in parsed(path)[1]
        if isinstance(node, ast.ClassDef)
    }
    return modules | classes


def owner_of(name: str, module: ModuleType) -> object | None:
    """The module or the class of ours that begins a dotted name in the docstrings of a module."""
    if hasattr(module, name):
        found = getattr(module, name)
    elif name in owners():
        found = importlib.import_module(owners()[name])
        found = getattr(found, name, found)
    else:
        return sys.modules.get(name)
    if isinstance(found, ModuleType):
        return found
    home = getattr(found, "__module__", None)
    return found if isinstance(home, str) and home.split(".")[0] in PACKAGES else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_full_names_in_documentation_resolve(path):
    pattern = rf"({'|'.join(PACKAGES)})((?:\.\w+)+)(?:\(.*\))?"
    matches = [match for text in quoted(path) if (match := re.fullmatch(pattern, text))]

    missing = [
        match[0]
        for match in matches
        if not resolves(importlib.import_module(match[1]), match[2][1:].split("."))
    ]

    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_in_documentation_exist(path):
    texts = quoted(path)
    paths = [text for text in texts if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", text)]
    # without a folder: a file anywhere in the repository
    names = [text for text in texts if re.fullmatch(r"[\w-]+\.(py|md)", text)]
    known = {file.name for file in FILES}

    missing = [text for text in paths if not (ROOT / text).exists()]
    missing += [text for text in names if text not in known]

    assert missing == []


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_names_in_docstrings_are_those_of_the_code(path):
    needs_vllm = re.search(r"^(from|import) vllm", path.read_text(encoding="utf-8"), re.MULTILINE)
    if needs_vllm and importlib.util.find_spec("vllm") is None:
        # its names are then looked up in the code alone
        module = ModuleType(module_of(path))
    else:
        module = importlib.import_module(module_of(path))
    texts = {text.removesuffix("()") for text in quoted(path, single=True)}
    names = {text for text in texts if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", text)}

    missing = []
    for name in sorted(names):
        first, *others = name.split(".")
        owner = owner_of(first, module) if others else None
        # a name, a file, an attribute of ours, or the suffix of a shape
        known = all(part in names_in_code() for part in name.split("."))
        if owner is not None and name not in names_in_code():
            known = resolves(owner, others)
        if not known and not re.fullmatch(r"_[A-Z]+", name):
            missing.append(name)

    assert missing == []
