"""Products with weights whose codes are stored in tiles of fixed width, on CPUs.

Shapes: those of `watersic_hf.nn.packing.PackedCodes`; M = tokens, S = slots of a row of words each.

Whatever the tensors of the layout contain, nothing outside them is read.
"""

from collections.abc import Sequence

import numpy as np
from numpy import int32, int64, uint32
from torch import Tensor

from watersic_kernels.cpu.product import linear
from watersic_kernels.cpu.tiles import (
    AHEAD,
    LINE,
    MOST_ENTRIES,
    TILE,
    add_band_outliers,
    add_tile,
    decode_path_tile,
    decode_tile,
    jit,
    store_tile,
)
from watersic_kernels.cpu.vectors import PAIRS, ROWS, prefetch


def packed_linear(
    x_MN: Tensor, layout: Sequence[Tensor], row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Sums are in float32 and always in the same order, whatever the number of threads.  For up to
    64 tokens in a dtype of 16 bits, each column of the input, times its scale, is rounded to a
    multiple of 2^-15 of the largest of the 32 columns in its tile, and in float32 of 2^-30.
    Reference: `watersic_hf.nn.ops.coded_linear`.

    Args:
        x_MN: input, of a floating-point dtype, any strides.
        layout: the tensors of `watersic_hf.nn.packing.PackedCodes`, in the order of its fields.
        row_scale_A: row scales.
        col_scale_N: column scales.

    Raises:
        ValueError: the tiles have another number of rows than any layout.
    """
    words_G, tiles_BT, state_BT3, row_order_R, column_order_C, *outliers = layout
    band = len(row_order_R) // len(tiles_BT)
    arrays = [tensor.numpy() for tensor in (words_G, tiles_BT, state_BT3, *outliers)]
    arrays[0] = arrays[0].view(np.uint32).reshape(-1, band)
    if state_BT3.shape[2] == 0:
        # what decodes a trellis is compiled when there is one
        arrays[2] = None
    return linear(
        lambda *task: _run(*arrays, *task),
        x_MN,
        (row_order_R, column_order_C, row_scale_A, col_scale_N),
        band=band,
    )


@jit
def _run(
    words_Sr, tiles_BT, state_BT3, entries_O, first_BK, count_BKr, tokens, first, stop, base, out
):
    """Multiply some bands with at most a few tokens, or decode them.

    Args:
        words_Sr: the words of the layer, uint32, in rows of at most `ROWS`, a multiple of `LANES`.
        tiles_BT, state_BT3, entries_O, first_BK, count_BKr: tensors of the layout; None as the
            state without a trellis.
        tokens: what `watersic_kernels.cpu.tiles.digits` writes; no tokens decode the bands.
        first, stop: the bands.
        base: the band whose rows are the first of `out`.
        out: the sums of the rows, M x R, or their codes, C x R, float32, zero before.
    """
    pairs_TVP, sum_TV, scale_TV, fixed_MC, unit_MK = tokens
    band, decode = words_Sr.shape[1], len(fixed_MC) == 0
    pairs, quantizer_r = np.empty(PAIRS * ROWS, int32), np.empty(ROWS, uint32)
    running = np.empty(MOST_ENTRIES + 1, int64)
    widest = 8 if state_BT3 is None else 7
    for b in range(first, stop):
        start = (b - base) * band
        for t in range(tiles_BT.shape[1]):
            at, width = int64(tiles_BT[b, t] >> 4), int64(tiles_BT[b, t] & 15)
            if at < 0 or not 1 <= width <= widest or at > len(words_Sr) - width:
                continue
            for i in range(0, width * band, LINE):
                prefetch(words_Sr, (at + AHEAD) * band + i)
            if state_BT3 is None:
                half = decode_tile(words_Sr, at, width, pairs)
            else:
                half = decode_path_tile(words_Sr, at, width, state_BT3[b, t], quantizer_r, pairs)
            if decode:
                store_tile(pairs, half, out, t * TILE, start, band)
            else:
                pairs_VP, sum_V, scale_V = pairs_TVP[t], sum_TV[t], scale_TV[t]
                add_tile(pairs, half, pairs_VP, sum_V, scale_V, out, start, band)
        add_band_outliers(entries_O, first_BK, count_BKr, b, fixed_MC, unit_MK, running, out, start)
