"""Calibration texts that have a name: files, the documentation of Python, sets on the Hub."""

import codecs
import glob
import importlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Kinds of files, by suffix: plain text, or a loader of `datasets`.
_FILES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_SUFFIXES = tuple(_FILES)

#: Byte order marks and the encodings that read them; a longer mark is before its own beginning.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def is_path(name: str) -> bool:
    """Return whether the name of a set is a path; on the Hub a name is at most ``owner/name``."""
    is_file = name.lower().endswith(_SUFFIXES)
    return is_file or name.startswith(("/", ".", "~")) or name.replace("\\", "/").count("/") > 1


def pydoc_texts(*, held_out: bool = False) -> list[str]:
    """Return the topics of the documentation of Python, ordered by name.

    About one eighth of the topics is held out from the calibration set ``"pydoc"``, so that they
    can be used for evaluation.

    Args:
        held_out: return the held-out topics instead of the others.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return [
        text
        for name, text in sorted(topics.items())
        if (zlib.crc32(name.encode()) % 8 == 0) == held_out
    ]


def named_set(name: str | Path) -> Iterable[Any]:
    """Return the texts of a set with a name, or a `datasets.Dataset` that holds them.

    Args:
        name: ``"pydoc"``, the path of a file, or the name of a dataset on the Hub.

    Raises:
        ValueError: the file does not exist or is of another kind.
        ImportError: the set needs the package `datasets`, which is not installed.
    """
    if name == "pydoc":
        return pydoc_texts()
    path = Path(name)
    kind = _FILES.get(path.suffix.lower())
    if not path.is_file():
        if kind is not None:
            raise ValueError(f"the calibration file {path} does not exist")
        return _datasets().load_dataset(str(name), split="train")
    if kind is None:
        raise ValueError(f"the calibration file {path.name} must end in one of {sorted(_FILES)}")
    if kind == "text":
        return [read_text(path)]
    options = {}
    if kind == "json" and (encoding := _encoding(path)) != "utf-8":
        options["encoding"] = encoding
    # the loaders take a path as a pattern
    pattern = glob.escape(str(path))
    return _datasets().load_dataset(kind, data_files=pattern, split="train", **options)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in the encoding that its byte order mark names.

    Raises:
        ValueError: the file has another encoding.
    """
    encoding = _encoding(path)
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text file {path.name} is not {encoding.upper()}: {error}. Save it as UTF-8."
        ) from error


def _encoding(path: Path) -> str:
    """Return the encoding that the byte order mark of a file names, or UTF-8."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")


def _datasets() -> Any:
    """Import the package `datasets`."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("this calibration set needs `pip install datasets`") from error
