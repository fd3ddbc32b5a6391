"""Safetensors files: what a folder has, what headers say, reading, and states to resume from."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from watersic_hf.checkpoint.schema import CheckpointError

_LENGTH_BYTES = 8


class TensorHeader(NamedTuple):
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def checkpoint_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        CheckpointError: there is none, or the index names a file that is not there.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {index.name} names {missing}, which are not in the folder."
        )
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file found; is it a model folder?")
    return files


def left_dense(folder: str | os.PathLike) -> dict[str, str]:
    """Why modules of a model folder are dense, by name, as its config.json says."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    return config.get("quantization_config", {}).get("left_dense", {})


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, TensorHeader]:
    """Headers of all tensors of some files, by name, without reading the data.

    Raises:
        CheckpointError: a file is no safetensors file, or ends before its last tensor does; the
            message names the first tensor that is cut.
    """
    tensors: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        header, data_start = _parse_header(file)
        size = file.stat().st_size
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if data_start + end > size:
                raise CheckpointError(
                    f"{name}: {file.name} has {size} bytes, but this tensor ends at byte "
                    f"{data_start + end}. The file was cut short: download or copy it again."
                )
            tensors[name] = TensorHeader(file, tuple(entry["shape"]), entry["dtype"], end - start)
    return tensors


def read_tensors(file: str | os.PathLike, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of one file, by name.

    Raises:
        CheckpointError: the file cannot be read, or has no such tensor.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{Path(file).name}: {error}.") from error


def write_state(
    file: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the state of a computation to one file, which is whole at any time.

    Args:
        file: the file; its folder is made if it is not there.
        tensors: by name.
        facts: what JSON holds; one of them, ``identity``, says which computation this is the state
            of.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    # in one file with the tensors, so that the two cannot be of different times
    save_file(stored, scratch, metadata={"facts": json.dumps(facts)})
    os.replace(scratch, file)


def read_state(
    file: str | os.PathLike, *, identity: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts that `write_state` wrote.

    Raises:
        CheckpointError: the file cannot be read, or is the state of another computation; the
            message says in what the two differ.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: {error}.") from error
    found = facts.get("identity", {})
    differing = [name for name in identity if found.get(name) != identity[name]]
    if differing:
        raise CheckpointError(
            f"{file}: this state was written with other {' and '.join(differing)}, and cannot be "
            f"resumed with these. Give what it was started with, or choose another folder."
        )
    return tensors, facts


def _parse_header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the position at which its data starts."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if length > file.stat().st_size - _LENGTH_BYTES:
                raise ValueError(f"a header of {length} bytes does not fit the file")
            return json.loads(handle.read(length)), _LENGTH_BYTES + length
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}.") from error
