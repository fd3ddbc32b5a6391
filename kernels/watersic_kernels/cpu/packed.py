"""Products with weights whose codes are stored in tiles of fixed width, on CPUs.

Shapes: those of `watersic_hf.nn.packing.PackedCodes`; M = tokens, S = slots of a row of words each.

Whatever the tensors of the layout contain, nothing outside them is read.
"""

from collections.abc import Sequence

import numpy as np
from numpy import float64, int8, int64, uint8, uint32
from torch import Tensor

from watersic_kernels.cpu.product import linear
from watersic_kernels.cpu.tiles import (
    GROUP,
    MOST_ENTRIES,
    ROWS,
    STEP,
    TILE,
    add_outliers,
    add_product,
    cut,
    cut_values,
    inline_jit,
    jit,
    quantizers,
    spread,
    store_outliers,
    store_values,
)

#: Planes of bytes: of two words of pairs, and of 8 words; the last four are read, but not used.
PLANES = 4 + 4 + 32 + 4


def packed_linear(
    x_MN: Tensor, layout: Sequence[Tensor], row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x, computed in float32.

    Sums are always in the same order, whatever the number of threads.  Reference:
    `watersic_hf.nn.ops.coded_linear`.

    Args:
        x_MN: input, of a floating-point dtype, any strides.
        layout: the tensors of `watersic_hf.nn.packing.PackedCodes`, in the order of its fields.
        row_scale_A: row scales.
        col_scale_N: column scales.

    Raises:
        ValueError: the tiles have too many rows.
    """
    words_G, tiles_BT, state_BT3, row_order_R, column_order_C, *outliers = layout
    band = len(row_order_R) // len(tiles_BT)
    if band > ROWS:
        raise ValueError(f"packed_linear: tiles of {band} rows, but they have at most {ROWS}")
    arrays = [tensor.numpy() for tensor in (words_G, tiles_BT, state_BT3, *outliers)]
    arrays[0] = arrays[0].view(np.uint32).reshape(-1, band)
    return linear(
        lambda *task: _run(*arrays, *task),
        x_MN,
        (row_order_R, column_order_C, row_scale_A, col_scale_N),
        band=band,
    )


@inline_jit
def _decode_tile(words_Sr, at, width, state_3, planes, words_3r, tile):
    """Decode a tile of width 1 or more.

    Args:
        words_Sr: the words of the layer, uint32.
        at: number of the first row of words of the tile.
        width: bits of a code.
        state_3: state of a trellis before the first row; empty without a trellis.
        planes, words_3r: scratch memory for `PLANES` and for three words of every row.
        tile: receives the codes, or the values of a trellis.
    """
    pairs, codes = planes[: 2 * STEP], planes[2 * STEP :]
    trellis = len(state_3) > 0
    if trellis:
        quantizers(words_Sr[at], state_3, words_3r)
    bits = max(width - 1, 1) if trellis else width
    for k in range(-2 if trellis else 0, width):
        if trellis and k == 0 and width > 1:
            continue
        # codes 0 and -1 of one bit are codes of two bits, the higher one the opposite of the lower
        words_r = words_3r[max(k + 3, 0) % 3] if trellis and k < 1 else words_Sr[at + k]
        plane = 8 if k >= 0 else 4 * (k + 2)
        byte = 0 if k < 1 else 4 * (k - trellis)
        spread(words_r, plane, byte, 1 if k < 0 else bits, planes)
    if trellis:
        cut_values(codes, pairs, bits, tile)
    else:
        cut(codes, bits, int8(-(1 << width >> 1)), tile)


@jit
def _run(
    words_Sr,
    tiles_BT,
    state_BT3,
    entries_O,
    first_BK,
    count_BKr,
    x_MC,
    first,
    stop,
    base,
    out,
):
    """Multiply some bands with at most a few tokens, or decode them.

    Args:
        words_Sr: the words of the layer, uint32, at most `ROWS` in a row.
        tiles_BT, state_BT3, entries_O, first_BK, count_BKr: tensors of the layout.
        x_MC: the tokens, multiplied by the column scales, columns in the order of the tiles and a
            multiple of `GROUP`; no tokens decode the bands.
        first, stop: the bands.
        base: the band whose rows are the first of `out`.
        out: the sums of the rows, M x R, or their codes, C x R, float32, zero before.
    """
    band, decode = words_Sr.shape[1], len(x_MC) == 0
    planes, tile = np.empty(PLANES * ROWS, uint8), np.empty(TILE * ROWS, int8)
    words_3r, running = np.empty((3, band), uint32), np.empty(MOST_ENTRIES + 1, float64)
    widest = 8 - (state_BT3.shape[2] > 0)
    for b in range(first, stop):
        start = (b - base) * band
        for t in range(tiles_BT.shape[1]):
            at, width = int64(tiles_BT[b, t] >> 4), int64(tiles_BT[b, t] & 15)
            if at < 0 or not 1 <= width <= widest or at > len(words_Sr) - width:
                continue
            _decode_tile(words_Sr, at, width, state_BT3[b, t], planes, words_3r, tile)
            for c in range(TILE if decode else 0):
                store_values(tile, out[t * TILE + c][start : start + band], c)
            for m in range(len(x_MC)):
                x_32 = x_MC[m][t * TILE : (t + 1) * TILE]
                add_product(tile, x_32, out[m][start : start + band])
        for k in range(first_BK.shape[1]):
            place, count_r = first_BK[b, k], count_BKr[b, k]
            if decode:
                store_outliers(entries_O, place, count_r, out[k * GROUP :], start)
            for m in range(len(x_MC)):
                x_C, sums_r = x_MC[m][k * GROUP :], out[m][start : start + band]
                add_outliers(entries_O, place, count_r, x_C, running, sums_r)
