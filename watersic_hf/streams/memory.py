"""Free memory, and how freed memory gets back to the system."""

import ctypes
import logging
import sys
from collections.abc import Callable
from typing import Any

from accelerate.utils import get_max_memory

logger = logging.getLogger(__name__)

#: Bytes from which the memory of a freed tensor is returned at once.  To return it costs time: the
#: system fills it with zeros before it is used again.
_LARGE = 1 << 22
#: A parameter of glibc's `mallopt`.
_M_MMAP_THRESHOLD = -3


def free_memory() -> int:
    """Return the bytes of host memory that are free."""
    memory = get_max_memory()
    # where it is shared with an accelerator, it bears the name of that
    return memory.get("cpu", memory.get("mps", 0))


def trim_memory() -> None:
    """Return freed memory: glibc keeps gigabytes of it after many large temporary tensors."""
    _c_library(lambda library: library.malloc_trim(0))


def return_large_tensors() -> None:
    """Have the memory of large tensors returned as soon as they are freed.

    glibc does so above a size that grows with what is freed, up to 32 MB.
    """
    _c_library(lambda library: library.mallopt(_M_MMAP_THRESHOLD, _LARGE))


def _c_library(use: Callable[[Any], object]) -> None:
    if sys.platform == "linux":
        try:
            use(ctypes.CDLL("libc.so.6"))
        except (OSError, AttributeError):
            logger.debug("This C library is not glibc, so its memory management is left alone.")
