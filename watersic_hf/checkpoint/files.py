"""Find, read and write safetensors and JSON files.

All files are written atomically: to a temporary file in the same folder, which is flushed to the
disk and then renamed.  A reader never sees an incomplete file.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from watersic_hf.checkpoint.schema import CheckpointError

_LENGTH_BYTES = 8
#: Number of bytes of a tensor that are written at a time.
_CHUNK = 1 << 24
#: The dtypes of safetensors, in the order in which it stores tensors.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorHeader(NamedTuple):
    """The entry of one tensor in the header of a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors, such as ``BF16``."""
    nbytes: int


def checkpoint_files(folder: str | os.PathLike) -> list[Path]:
    """Return the safetensors files of a model folder, sorted by name.

    If the folder has an index, only the files that it names are returned.

    Args:
        folder: folder of the model.

    Raises:
        CheckpointError: there is no file, or the index names a file that does not exist.
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
            f"{folder}: {index.name} names {missing}, which are not in the folder. Download or "
            f"copy them too."
        )
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file found; is it a model folder?")
    return files


def saved_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model folder; empty if it has none."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8")).get("quantization_config", {})


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, TensorHeader]:
    """Return the headers of all tensors of some files, by name, without reading the data.

    Args:
        files: safetensors files.

    Raises:
        CheckpointError: a file is not a safetensors file, or ends before its last tensor does; the
            message names the first tensor that is incomplete.
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
    """Return tensors of one file, by name.

    Args:
        file: safetensors file.
        names: names of the tensors to read.

    Raises:
        CheckpointError: the file cannot be read, or has no tensor of that name.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{Path(file).name}: {error}.") from error


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Convert the errors of other code that reads safetensors files to `CheckpointError`.

    Args:
        what: what is read, for the message.
        advice: what to do if it cannot be read, for the message.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: cannot be read: {error}. {advice}") from error


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `file` once it is complete and flushed to the disk.

    Args:
        file: file to replace or to create; its folder is created if necessary.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full; an
            existing file is kept then.
    """
    file = Path(file)
    scratch = file.with_name(f"{file.name}.tmp{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(scratch, file)
        _flush_folder(file.parent)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be written: {error.strerror or error}. Finished work is kept: free "
            f"some space or choose another disk, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_json(file: str | os.PathLike) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Write a value to a JSON file.

    Raises:
        CheckpointError: the file cannot be written; see `replacing`.
    """
    with replacing(file) as handle:
        handle.write((json.dumps(value, indent=1) + "\n").encode())


class TensorWriter:
    """Write a safetensors file tensor by tensor, so that it need not fit into memory.

    Args:
        handle: empty file, opened for writing.
        specs: shape and dtype of every tensor, in the order in which the tensors will be added.
        metadata: metadata of the file, which may be empty.
    """

    def __init__(
        self,
        handle: BinaryIO,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        start = 0
        for name, (shape, dtype) in specs.items():
            end = start + math.prod(shape) * dtype.itemsize
            offsets = [start, end]
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self._handle = handle
        self._handle.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)

    def add(self, tensor: Tensor) -> int:
        """Write the next tensor, and return its checksum, as `checksum_of` does."""
        checksum = 0
        for part in _parts(tensor):
            self._handle.write(part)
            checksum = zlib.crc32(part, checksum)
        return checksum


def write_tensors(
    tensors: MutableMapping[str, Tensor],
    file: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, with little additional memory.

    The file has the same bytes as one of `safetensors.torch.save_file`.

    Args:
        tensors: tensors by name.  Each is removed from the mapping once it is written, so that
            memory-mapped tensors can be released.
        file: file to write.
        metadata: metadata of the file; default: none.

    Raises:
        CheckpointError: the file cannot be written; see `replacing`.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name.encode()))
    specs = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    with replacing(file) as handle:
        writer = TensorWriter(handle, specs, metadata or {})
        for name in names:
            writer.add(tensors.pop(name))


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in parts of at most `_CHUNK` bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(_CHUNK):
        yield memoryview(part.cpu().numpy())


def checksum_of(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    checksum = 0
    for part in _parts(tensor):
        checksum = zlib.crc32(part, checksum)
    return checksum


def _flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, on systems on which a folder can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _parse_header(file: Path) -> tuple[dict, int]:
    """Return the JSON header of a safetensors file, and the offset at which its data starts."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if length > file.stat().st_size - _LENGTH_BYTES:
                raise ValueError(f"a header of {length} bytes does not fit the file")
            return json.loads(handle.read(length)), _LENGTH_BYTES + length
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name}: not a readable safetensors file: {error}.") from error
