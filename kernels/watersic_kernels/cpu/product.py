"""The common part of products on CPUs: scales, the choice by the number of tokens, threads.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, r = rows of some bands.

All products are ``y = diag(row_scale) @ codes @ (col_scale * x)``, with sums in float32.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from watersic_kernels.cpu.threads import in_parts
from watersic_kernels.cpu.tiles import GROUP, TILE, digits, gather, scatter
from watersic_kernels.cpu.vectors import LANES, PAIRS, ROWS

#: Largest number of tokens for which the weight is decoded tile by tile inside the product; for
#: more tokens it is decoded once, into scratch memory.  Decoding that way takes as long as about 64
#: tokens in float32, and 128 of 16 bits.
FUSED_TOKENS = 64

#: Approximate number of bytes of decoded codes that are held at a time.
SCRATCH_BYTES = 32 << 20

#: Products of weights with tokens below which starting threads takes longer than the work.
ALONE = 1 << 20


def linear(
    run: Callable[[tuple[np.ndarray, ...], int, int, int, np.ndarray], None],
    x_MN: Tensor,
    orders_and_scales: Sequence[Tensor],
    *,
    band: int,
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Args:
        run: ``run(tokens, first, stop, base, out)`` adds the products of some bands with a few
            tokens, as `watersic_kernels.cpu.tiles.digits` writes them, to the sums `out`, M x r,
            or, without tokens, their codes to `out`, C x r, whose first rows are those of the band
            `base`.
        x_MN: input.
        orders_and_scales: the row of the weight for each row of the tiles, the same for the
            columns, the row scales and the column scales.
        band: rows of a band.

    Raises:
        ValueError: bands have another number of rows than in any layout.
    """
    if band > ROWS or band % LANES:
        raise ValueError(f"tiles of {band} rows, but products need a multiple of {LANES} to {ROWS}")
    row_order_R, column_order_C = (order.int().numpy() for order in orders_and_scales[:2])
    row_scale_A, col_scale_N = (scale.float().numpy() for scale in orders_and_scales[2:])
    tokens, rows, columns = len(x_MN), len(row_order_R), len(column_order_C)
    if tokens == 0:
        return x_MN.new_empty(0, len(row_scale_A))
    # padding is behind all rows and columns
    x_MC = np.zeros((tokens, -(-columns // GROUP) * GROUP), np.float32)
    gather(x_MN.detach().float().contiguous().numpy(), column_order_C, col_scale_N, x_MC)
    bands = rows // band

    def run_bands(x_MC: np.ndarray, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        integers = _integers(x_MC, 2 if x_MN.dtype == torch.float32 else 1)

        def part(first: int, last: int) -> None:
            run(integers, start + first, start + last, start, out)

        # so little work takes less time than to start threads
        alone = columns * out.shape[1] * max(1, len(x_MC)) < ALONE
        threads = 1 if alone else torch.get_num_threads()
        in_parts(part, stop - start, threads)
        return out

    if tokens <= FUSED_TOKENS:
        sums_MR = torch.from_numpy(run_bands(x_MC, 0, bands, np.zeros((tokens, rows), np.float32)))
    else:
        sums_MR = torch.empty(tokens, rows)
        step = max(1, SCRATCH_BYTES // (4 * band * columns))
        for start in range(0, bands, step):
            stop = min(start + step, bands)
            codes_Cr = np.zeros((columns, (stop - start) * band), np.float32)
            run_bands(x_MC[:0], start, stop, codes_Cr)
            sums_Mr = sums_MR[:, start * band : stop * band]
            torch.mm(torch.from_numpy(x_MC[:, :columns]), torch.from_numpy(codes_Cr), out=sums_Mr)
    y_MA = torch.empty(tokens, len(row_scale_A))
    scatter(sums_MR.numpy(), row_order_R, row_scale_A, y_MA.numpy())
    return y_MA.to(x_MN.dtype)


def _integers(x_MC: np.ndarray, parts: int) -> tuple[np.ndarray, ...]:
    """Return tokens as integers of one or two digits; see `watersic_kernels.cpu.tiles.digits`."""
    tokens, columns = x_MC.shape
    tiles, vectors = columns // TILE, parts * tokens
    integers = (
        np.empty((tiles, vectors, PAIRS), np.int32),
        np.empty((tiles, vectors), np.int32),
        np.empty((tiles, vectors), np.float32),
        np.empty((tokens, columns), np.int64),
        np.empty((tokens, columns // GROUP), np.float64),
    )
    digits(x_MC, *integers)
    return integers
