"""Products with weights whose codes are prefix-coded, on CPUs.

Shapes: those of `watersic_hf.nn.prefix.PrefixCodes`; M = tokens, W = windows of bits of all tables.

Whatever the tensors of the layout contain, nothing outside them is read.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy import int32, int64, uint32, uint64
from torch import Tensor

from watersic_kernels.cpu.product import linear
from watersic_kernels.cpu.tiles import (
    MOST_ENTRIES,
    TILE,
    add_band_outliers,
    add_tile,
    inline_jit,
    jit,
    quantizers,
    store_tile,
)
from watersic_kernels.cpu.vectors import PAIRS, ROWS

#: Bits of a window, and largest number of low bits, of `watersic_hf.nn.prefix`.
WINDOW, MAX_SHIFT = 11, 8
#: Words after the last stream: a tile is read at most that far beyond it.
PADDING = 18
#: First bit of the streams of a block, and bits of the number of a table in the entry of a tile.
FIRST_BIT, TABLE_BITS = 2, 8
#: Bits of values that are multiplied together, so that the sum of a tile's products fits into 32:
#: larger values are split.
VALUE_BITS = 11


def prefix_linear(
    x_MN: Tensor,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    *,
    tables_TW: Tensor,
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Sums and the rounding of x are those of `watersic_kernels.cpu.packed.packed_linear`.
    Reference: `watersic_hf.nn.ops.coded_linear`.

    Args:
        x_MN: input, of a floating-point dtype, any strides.
        layout: the tensors of `watersic_hf.nn.prefix.PrefixCodes`, in the order of its fields.
        row_scale_A: row scales.
        col_scale_N: column scales.
        tables_TW: entries of the symbol tables, of `watersic_hf.nn.prefix_tables.PrefixTables`.

    Raises:
        ValueError: the tiles have another number of rows than any layout, or the words lack their
            padding.
    """
    words_G, *streams, state_BT3, row_order_R, column_order_C = layout[:8]
    band = streams[2].shape[2]
    if len(words_G) < PADDING:
        raise ValueError(
            f"prefix_linear: {len(words_G)} words, but the padding alone has {PADDING}"
        )
    arrays = [tensor.numpy() for tensor in (words_G, *streams, state_BT3, *layout[8:])]
    arrays[0] = arrays[0].view(np.uint32)
    if state_BT3.shape[2] == 0:
        # what decodes a trellis is compiled when there is one
        arrays[5] = None
    entries_W = _entries(tables_TW)
    return linear(
        lambda *task: _run(entries_W, *arrays, *task),
        x_MN,
        (row_order_R, column_order_C, row_scale_A, col_scale_N),
        band=band,
    )


@functools.cache
def _entries(tables_TW: Tensor) -> np.ndarray:
    """Return the entries of the tables as integers, uint64 [W], for a library that is never freed.

    The low 16 bits are the first value of the pair, the next 16 the second, and the bits above
    them the length of the code word.
    """
    entries_W = tables_TW.flatten().long()
    first_W, second_W = (
        half_W.int().view(torch.float32).long() & 0xFFFF
        for half_W in (entries_W & ~0xFFFF, (entries_W & 0xFFF0) << 16)
    )
    return (first_W | second_W << 16 | (entries_W & 15) << 32).numpy().view(np.uint64)


@jit
def _run(
    entries_W,
    words_G,
    first_BS,
    shortest_BS,
    bits_BSr,
    tiles_BT,
    state_BT3,
    entries_O,
    first_BK,
    count_BKr,
    tokens,
    first,
    stop,
    base,
    out,
):
    """Multiply some bands with at most a few tokens, or decode them.

    Args:
        entries_W: what `_entries` returns.
        words_G, first_BS, shortest_BS, bits_BSr, tiles_BT, state_BT3, entries_O, first_BK,
            count_BKr: tensors of the layout; None as the state without a trellis.
        tokens, first, stop, base, out: as for the function in `watersic_kernels.cpu.packed`.
    """
    pairs_TVP, sum_TV, scale_TV, fixed_MC, unit_MK = tokens
    band, tiles, decode = bits_BSr.shape[2], tiles_BT.shape[1], len(fixed_MC) == 0
    per_segment = -(-tiles // first_BS.shape[1])
    pairs, low = np.zeros(PAIRS * ROWS, int32), np.empty(PAIRS * ROWS, int32)
    quantizer_r = np.empty(ROWS, uint32)
    at_r, parity_r = np.empty(band, uint64), np.empty(band, uint32)
    running, unit_V = np.empty(MOST_ENTRIES + 1, int64), np.empty(scale_TV.shape[1], np.float32)
    limit, last_table = (len(words_G) - PADDING) << 5, (len(entries_W) >> WINDOW) - 1
    for b in range(first, stop):
        start = (b - base) * band
        for t in range(tiles):
            s = t // per_segment
            if t % per_segment == 0:
                _begin(first_BS[b, s], shortest_BS[b, s], bits_BSr[b, s], at_r)
            table = min(int64(tiles_BT[b, t]) & ((1 << TABLE_BITS) - 1), last_table) << WINDOW
            shift = min(max(int64(tiles_BT[b, t]) >> TABLE_BITS, 0), MAX_SHIFT)
            for r in range(0, band, 4):
                _decode_rows(
                    words_G, entries_W, uint64(table), uint64(shift), uint64(limit), at_r, pairs, r
                )
            size = shift + 4
            if state_BT3 is not None:
                _parities(pairs, parity_r)
                quantizers(parity_r, state_BT3[b, t], quantizer_r)
                _to_values(pairs, quantizer_r, band)
                size += 1
            if decode:
                store_tile(pairs, 0, out, t * TILE, start, band)
                continue
            pairs_VP, sum_V = pairs_TVP[t], sum_TV[t]
            parts = 1 + int(size >= VALUE_BITS)
            if parts > 1:
                _split(pairs, low)
            for part in range(parts):
                values, unit = (low, 1) if part else (pairs, 256 if parts > 1 else 1)
                for v in range(len(unit_V)):
                    unit_V[v] = scale_TV[t, v] * np.float32(unit)
                add_tile(values, 0, pairs_VP, sum_V, unit_V, out, start, band)
        add_band_outliers(entries_O, first_BK, count_BKr, b, fixed_MC, unit_MK, running, out, start)


@inline_jit
def _begin(first, shortest, bits_r, at_r):
    """Write the first bit of the stream of each row of a block."""
    at = (max(int64(first), 0) << 5) + FIRST_BIT
    least, power = int64(shortest) & 0xFFFF, min(max(int64(shortest) >> 16, 0), 31)
    for r in range(len(at_r)):
        at_r[r] = at
        at += least + (int64(bits_r[r]) << power)


@inline_jit
def _decode_rows(words_G, entries_W, table, shift, limit, at_r, pairs, r):
    """Decode four rows of a tile into pairs, at the same time: a row's symbols wait for each other.

    Args:
        words_G, entries_W: as for `_run`.
        table: first entry of the table of the tile.
        shift: number of low bits of its codes.
        limit: the last bit at which a tile may begin.
        at_r: the next bit of every row; moved behind the tile.
        pairs: receives the pairs.
        r: the first row.
    """
    # rows of padding have no stream of their own
    at_0, at_1 = min(at_r[r], limit), min(at_r[r + 1], limit)
    at_2, at_3 = min(at_r[r + 2], limit), min(at_r[r + 3], limit)
    for c in range(0, TILE, 2):
        to = c % PAIRS * ROWS + r
        held_0, at_0 = _symbol(words_G, entries_W, table, shift, at_0)
        held_1, at_1 = _symbol(words_G, entries_W, table, shift, at_1)
        held_2, at_2 = _symbol(words_G, entries_W, table, shift, at_2)
        held_3, at_3 = _symbol(words_G, entries_W, table, shift, at_3)
        for n, held in enumerate((held_0, held_1, held_2, held_3)):
            one, other = held & uint64(0xFFFF), held >> uint64(16)
            if c < PAIRS:
                pairs[to + n], pairs[to + n + ROWS] = int32(one), int32(other)
            else:
                # the later columns are the high halves
                pairs[to + n] |= int32(one << uint64(16))
                pairs[to + n + ROWS] |= int32(other << uint64(16))
    at_r[r], at_r[r + 1], at_r[r + 2], at_r[r + 3] = at_0, at_1, at_2, at_3


@jit
def _symbol(words_G, entries_W, table, shift, at):
    """Return the two codes of a symbol as halves of a number of 32 bits, and the bit behind it.

    All numbers are uint64: signed ones would be checked for counting from the end of an array.
    """
    word = at >> uint64(5)
    ahead = uint64(words_G[word]) | uint64(words_G[word + uint64(1)]) << uint64(32)
    ahead >>= at & uint64(31)
    entry = entries_W[table + (ahead & uint64((1 << WINDOW) - 1))]
    length, held = entry >> uint64(32), entry & uint64(0xFFFFFFFF)
    if shift:
        half, ones = uint64(1) << shift >> uint64(1), (uint64(1) << shift) - uint64(1)
        low = ahead >> length
        one = ((held << shift) + (low & ones) - half) & uint64(0xFFFF)
        other = (held >> uint64(16) << shift) + (low >> shift & ones) - half
        held = one | (other & uint64(0xFFFF)) << uint64(16)
    return held, at + length + shift + shift


@inline_jit
def _parities(pairs, parity_r):
    """Write the parities of the codes of each row as a word: column j is bit j."""
    for r in range(len(parity_r)):
        parity = uint32(0)
        for i in range(PAIRS):
            parity |= uint32(uint32(pairs[i * ROWS + r]) & uint32(0x10001)) << uint32(i)
        parity_r[r] = parity


@inline_jit
def _to_values(pairs, quantizer_r, band):
    """Replace the codes of a trellis by their values."""
    for i in range(PAIRS):
        for r in range(band):
            pair, quantizer = pairs[i * ROWS + r], quantizer_r[r]
            low, high = int32(pair << int32(16)) >> int32(16), pair >> int32(16)
            one = int32(quantizer >> uint32(i) & uint32(1))
            other = int32(quantizer >> uint32(i + PAIRS) & uint32(1))
            low = int32(2 * low - one * (int32(low > 0) - int32(low < 0)))
            high = int32(2 * high - other * (int32(high > 0) - int32(high < 0)))
            pairs[i * ROWS + r] = int32(low & int32(0xFFFF)) | int32(high << int32(16))


@inline_jit
def _split(pairs, low):
    """Divide all values by 256, rounding down, and write the remainders."""
    for i in range(len(pairs)):
        pair = pairs[i]
        low[i] = pair & int32(0x00FF00FF)
        first, second = int32(pair << int32(16)) >> int32(24), pair >> int32(24)
        pairs[i] = int32(first & int32(0xFFFF)) | int32(second << int32(16))
