"""The common part of products on CPUs: scales, the choice by the number of tokens, threads.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, r = rows of some bands.

All products are ``y = diag(row_scale) @ codes @ (col_scale * x)``, computed in float32.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from watersic_kernels.cpu.tiles import GROUP, jit

#: Largest number of tokens for which the weight is decoded tile by tile inside the product; for
#: more tokens it is decoded once, into scratch memory.
FUSED_TOKENS = 8

#: Approximate number of bytes of decoded codes that are held at a time.
SCRATCH_BYTES = 32 << 20

#: Products of weights with tokens below which starting threads takes longer than the work.
ALONE = 1 << 20

#: Parts of the work for every thread: a thread whose core is busy does fewer of them.
PARTS = 4

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    # the threads of a pool do not exist in a forked process
    os.register_at_fork(after_in_child=_pools.clear)


def linear(
    run: Callable[[np.ndarray, int, int, int, np.ndarray], None],
    x_MN: Tensor,
    orders_and_scales: Sequence[Tensor],
    *,
    band: int,
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Args:
        run: ``run(x_MC, first, stop, base, out)`` adds the products of some bands with a few
            tokens to the sums `out`, M x r, or, without tokens, their codes to `out`, C x r, whose
            first rows are those of the band `base`.
        x_MN: input.
        orders_and_scales: the row of the weight for each row of the tiles, the same for the
            columns, the row scales and the column scales.
        band: rows of a band.
    """
    row_order_R, column_order_C, row_scale_A, col_scale_N = orders_and_scales
    x_MN = x_MN.detach()
    tokens, rows, columns = len(x_MN), len(row_order_R), len(column_order_C)
    if tokens == 0:
        return x_MN.new_empty(0, len(row_scale_A))
    x_MC = np.zeros((tokens, -(-columns // GROUP) * GROUP), np.float32)
    _fold(x_MN.float().numpy(), column_order_C.int().numpy(), col_scale_N.float().numpy(), x_MC)
    y_MA = torch.zeros(tokens, len(row_scale_A))
    finish = row_order_R.int().numpy(), row_scale_A.float().numpy(), y_MA.numpy()
    bands = rows // band

    def run_bands(x_MC: np.ndarray, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        def part(first: int, last: int) -> None:
            run(x_MC, start + first, start + last, start, out)

        _in_parts(part, stop - start, columns * out.shape[1] * max(1, len(x_MC)))
        return out

    if tokens <= FUSED_TOKENS:
        sums_MR = np.zeros((tokens, rows), np.float32)
        _finish(run_bands(x_MC, 0, bands, sums_MR), 0, *finish)
        return y_MA.to(x_MN.dtype)
    step = max(1, SCRATCH_BYTES // (4 * band * columns))
    for start in range(0, bands, step):
        stop = min(start + step, bands)
        codes_Cr = np.zeros((columns, (stop - start) * band), np.float32)
        run_bands(x_MC[:0], start, stop, codes_Cr)
        sums_Mr = torch.from_numpy(x_MC[:, :columns]) @ torch.from_numpy(codes_Cr)
        _finish(sums_Mr.numpy(), start * band, *finish)
    return y_MA.to(x_MN.dtype)


def _in_parts(run: Callable[[int, int], None], bands: int, work: int) -> None:
    """Call ``run(first, stop)`` for parts of the bands, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, bands)
    if threads < 2 or work < ALONE:
        run(0, bands)
        return
    parts = min(bands, PARTS * threads)
    numbers = itertools.count()

    def share() -> None:
        while (number := next(numbers)) < parts:
            run(bands * number // parts, bands * (number + 1) // parts)

    pool = _pools.get(threads)
    if pool is None:
        pool = _pools.setdefault(threads, ThreadPoolExecutor(threads - 1))
    others = [pool.submit(share) for _ in range(threads - 1)]
    share()
    for other in others:
        other.result()


@jit
def _fold(x_MN, order_C, scale_N, x_MC):
    """Write the columns of x, multiplied by their scales, in the order of the tiles."""
    for m in range(len(x_MN)):
        for c in range(len(order_C)):
            n = order_C[c]
            if 0 <= n < len(scale_N):
                x_MC[m, c] = x_MN[m, n] * scale_N[n]


@jit
def _finish(sums_Mr, first, order_R, scale_A, y_MA):
    """Write the sums of some rows of the tiles from `first` on, multiplied by their scales."""
    for m in range(len(sums_Mr)):
        for r in range(sums_Mr.shape[1]):
            a = order_R[first + r]
            if 0 <= a < len(scale_A):
                y_MA[m, a] = sums_Mr[m, r] * scale_A[a]
