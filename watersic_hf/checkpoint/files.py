"""Safetensors files: what a folder has, what headers say, reading, and states to resume from.

What is written here is whole at any time: it is written beside its place, flushed to the disk, and
then moved there.
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
from safetensors.torch import load_file
from torch import Tensor

from watersic_hf.checkpoint.schema import CheckpointError

_LENGTH_BYTES = 8
#: Bytes of a tensor that are handed to the operating system at a time.
_CHUNK = 1 << 24
#: The dtypes of safetensors, in the order in which its files have them.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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


def saved_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """How a model folder says that it was quantized; empty if it does not say."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8")).get("quantization_config", {})


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


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Read safetensors files by other means than those here.

    Raises:
        CheckpointError: a file cannot be read; the message says `what`, and has the `advice`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: cannot be read: {error}. {advice}") from error


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `file` when it is complete and on the disk.

    Raises:
        CheckpointError: it cannot be written, as when the disk is full; what was there before is
            there still.
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
            f"{file}: cannot be written: {error.strerror or error}. Nothing that was finished is "
            f"lost: make room or choose another disk, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_json(file: str | os.PathLike) -> Any:
    """What `write_json` wrote.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Write what JSON holds to a file.

    Raises:
        CheckpointError: as `replacing`.
    """
    with replacing(file) as handle:
        handle.write((json.dumps(value, indent=1) + "\n").encode())


class TensorWriter:
    """Writes a safetensors file tensor by tensor, with no more than a part of one in memory.

    Args:
        handle: an empty file.
        specs: shape and dtype of every tensor, in the order in which they will be added.
        metadata: of the file.
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
            header[name] = {
                "dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        self._handle = handle
        self._handle.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)

    def add(self, tensor: Tensor) -> int:
        """Write the next tensor; returns its `checksum_of`."""
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
    """What `safetensors.torch.save_file` writes, to the byte, in little memory.

    Args:
        tensors: by name.  Each is taken out once it is written, so that what is only mapped into
            memory can be let go.
        file: the file.
        metadata: of the file.

    Raises:
        CheckpointError: as `replacing`.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name.encode()))
    specs = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in names}
    with replacing(file) as handle:
        writer = TensorWriter(handle, specs, metadata or {})
        for name in names:
            writer.add(tensors.pop(name))


def write_state(
    file: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the state of a computation to one file, which is whole at any time.

    Args:
        file: the file; its folder is made if it is not there.
        tensors: by name.
        facts: what JSON holds; one of them, ``identity``, says which computation this is the state
            of.

    Raises:
        CheckpointError: as `replacing`.
    """
    facts = dict(facts) | {"checksums": _checksums(tensors)}
    # in one file with the tensors, so that the two cannot be of different times
    write_tensors(dict(tensors), file, {"facts": json.dumps(facts)})


def read_state(
    file: str | os.PathLike,
    *,
    identity: Mapping[str, Any],
    advice: str = "Delete it, and what it holds is computed again.",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts that `write_state` wrote.

    Args:
        file: the file.
        identity: of the computation.
        advice: for the message, what to do about a file that is damaged.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is the state of another
            computation; the message says in what the two differ.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as handle:
            facts = json.loads((handle.metadata() or {}).get("facts", "{}"))
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}. {advice}") from error
    require_identity(file, facts.get("identity", {}), identity)
    if facts.pop("checksums", None) != _checksums(tensors):
        raise CheckpointError(
            f"{file}: this state is damaged: its bytes do not match their checksum. {advice}"
        )
    return tensors, facts


def require_identity(
    file: str | os.PathLike, found: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Refuse the state of another computation.

    Raises:
        CheckpointError: the two differ; the message says in what.
    """
    differing = list(_differences(found, identity))
    if differing:
        raise CheckpointError(
            f"{file}: this state was written with other {' and '.join(differing)}, and cannot be "
            f"resumed with these. Give what it was started with, or choose another folder."
        )


def _differences(found: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[str]:
    """What differs, with both values where they are short."""
    for name, wanted in identity.items():
        value = found.get(name)
        if value == wanted:
            continue
        if isinstance(value, Mapping) and isinstance(wanted, Mapping):
            parts = ", ".join(_differences(value, dict.fromkeys(value) | dict(wanted)))
            yield f"{name} ({parts})"
        else:
            texts = [json.dumps(v) for v in (value, wanted)]
            shown = all(len(text) < 40 for text in texts)
            yield f"{name} ({texts[0]} instead of {texts[1]})" if shown else name


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(_CHUNK):
        yield memoryview(part.cpu().numpy())


def checksum_of(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes."""
    checksum = 0
    for part in _parts(tensor):
        checksum = zlib.crc32(part, checksum)
    return checksum


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: checksum_of(tensor) for name, tensor in tensors.items()}


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; only where a folder can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
