"""Give memory back that holds only what a file holds, too."""

import ctypes
import mmap
import sys

from torch import Tensor

#: Advice to `madvise` of Linux since 5.4: take these pages now, and keep what they hold.
_PAGEOUT = 21


def release(tensor: Tensor) -> None:
    """Have the system take back the memory of a tensor that is mapped from a file.

    When the tensor is used again, it is read from the file.  Other tensors are left alone, and so
    are all of them on other systems than Linux.

    Args:
        tensor: a contiguous tensor on the CPU.
    """
    if sys.platform != "linux":
        return
    # whole pages
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0 and _is_of_a_file(first, size):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _PAGEOUT)


def _is_of_a_file(first: int, size: int) -> bool:
    """Return whether some addresses belong to one mapping of a file."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            start, stop = (int(address, 16) for address in addresses.split("-"))
            if start <= first and first + size <= stop:
                return inode != "0"
    return False
