"""Places for what modules returned, to answer them with it later: memory, or files."""

import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from watersic_hf.streams.processes import rank_and_size

logger = logging.getLogger(__name__)

#: Fraction of the free disk space that the outputs of a block may take.
DISK_FRACTION = 0.25
#: What outputs may hold besides tensors, if they are to be kept in files.
_PLAIN = (type(None), bool, int, float, str)


class KeptOutput(Protocol):
    """What a module returned in one of its calls."""

    def read(self) -> Any | None:
        """Return it; None if it was written into since, so that it is no longer known."""
        ...

    def drop(self) -> None:
        """Free its place."""
        ...


class OutputStore(Protocol):
    """Keeps the outputs of the modules of one block."""

    def keep(self, output: Any) -> KeptOutput | None:
        """Keep an output; return None if there is no place for it, or no way to keep it."""
        ...


class MemoryStore:
    """Keeps outputs in memory as they are, without a copy.

    Args:
        limit: bytes that they may take.
    """

    def __init__(self, limit: int) -> None:
        self.free = limit

    def keep(self, output: Any) -> KeptOutput | None:
        """See `OutputStore`."""
        size = sum(tensor.nbytes for tensor in tensors_in(output))
        return _InMemory(self, output, size) if size <= self.free else None


class _InMemory:
    """An output in memory."""

    def __init__(self, store: MemoryStore, output: Any, size: int) -> None:
        self._store, self._output, self._size = store, output, size
        # they tell whether the model has written into a tensor since
        self._versions = [tensor._version for tensor in tensors_in(output)]
        store.free -= size

    def read(self) -> Any | None:
        """See `KeptOutput`."""
        versions = [tensor._version for tensor in tensors_in(self._output)]
        return self._output if versions == self._versions else None

    def drop(self) -> None:
        """See `KeptOutput`."""
        self._store.free += self._size


class FileStore:
    """Keeps outputs in files, which the system's cache holds in memory as far as there is place.

    Args:
        folder: folder of the files.  Their names end in ``.tmp``: a crash can leave some.
        streams: number of stores in each process that share `DISK_FRACTION` of the free space.
    """

    def __init__(self, folder: Path, *, streams: int) -> None:
        rank, processes = rank_and_size()
        usable = DISK_FRACTION * shutil.disk_usage(folder).free
        self.free = int(usable) // (streams * processes)
        self._start = folder / f"outputs-{rank}-{id(self):x}"
        self._numbers = itertools.count()

    def keep(self, output: Any) -> KeptOutput | None:
        """See `OutputStore`."""
        # storages are written as a whole, of which a tensor may be a part
        size = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(output))
        if size > self.free or not _is_plain(output):
            return None
        file = Path(f"{self._start}-{next(self._numbers)}.tmp")
        try:
            torch.save(output, file)
        # of torch's writer
        except (OSError, RuntimeError) as error:
            logger.warning("%s: %s; outputs of this block are computed again.", file, error)
            file.unlink(missing_ok=True)
            self.free = 0
            return None
        return _InFile(self, file, size)


class _InFile:
    """An output in a file."""

    def __init__(self, store: FileStore, file: Path, size: int) -> None:
        self._store, self._file, self._size = store, file, size
        store.free -= size

    def read(self) -> Any:
        """See `KeptOutput`."""
        return torch.load(self._file, mmap=True, weights_only=True)

    def drop(self) -> None:
        """See `KeptOutput`."""
        self._file.unlink()
        self._store.free += self._size


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a structure of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _is_plain(value: Any) -> bool:
    """Whether a value comes back from a file as it is: tensors and numbers in plain containers."""
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in (Tensor, *_PLAIN)
