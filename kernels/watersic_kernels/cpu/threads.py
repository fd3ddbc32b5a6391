"""Run work on the threads that torch computes with.

Threads of torch that have finished wait for more work in a busy loop at first, so that threads of
another pool would share the cores with them: products took up to twice as long.  Therefore work is
handed to the OpenMP library that torch has loaded, through the function that GCC compiles parallel
regions into, which LLVM's library has as well.  Where there is no such function, as on macOS and
Windows, a pool takes its place; so it does in a forked process, in which OpenMP would wait for
threads that it does not have.
"""

import ctypes
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch  # noqa: F401, loads OpenMP

#: Parts of the work for every thread: a thread whose core is busy does fewer of them.
PARTS = 4

#: Threads beyond their number would only take turns.
_CORES = os.cpu_count() or 1

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_pools: dict[int, ThreadPoolExecutor] = {}


def _openmp() -> Callable | None:
    """Return ``GOMP_parallel(function, data, threads, flags)`` of torch's OpenMP, if it has one."""
    if os.name != "posix":
        return None
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
    return parallel


_parallel = _openmp()


def _after_fork() -> None:
    global _parallel
    _parallel = None
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_parts(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """Call ``run(first, stop)`` for parts of a number of items, in any order.

    Args:
        run: releases Python's lock while it computes.
        count: number of items.
        threads: number of threads.
    """
    threads = min(threads, _CORES, count)
    if threads < 2:
        run(0, count)
        return
    numbers, parts = itertools.count(), min(PARTS * threads, count)

    def share() -> None:
        while (number := next(numbers)) < parts:
            run(count * number // parts, count * (number + 1) // parts)

    on_threads(share, threads)


def on_threads(work: Callable[[], None], threads: int) -> None:
    """Call `work` once on each of some threads, one of which is this one; return when all have.

    Args:
        work: releases Python's lock while it computes.
        threads: number of threads, at least two.

    Raises:
        BaseException: the first one that a call raised.
    """
    errors: list[BaseException] = []

    def call(_: object) -> None:
        # an exception could not leave the parallel region
        try:
            work()
        except BaseException as error:
            errors.append(error)

    if _parallel is not None:
        _parallel(_REGION(call), None, threads, 0)
    else:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools.setdefault(threads, ThreadPoolExecutor(threads - 1))
        others = [pool.submit(call, None) for _ in range(threads - 1)]
        call(None)
        for other in others:
            other.result()
    if errors:
        raise errors[0]
