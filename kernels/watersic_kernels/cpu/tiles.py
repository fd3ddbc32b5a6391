"""Tiles of fixed width as values, tokens as integers, and outliers, compiled for CPUs.

Shapes: M = tokens, D = digits of a token, V = M D, C = columns of all tiles, T = tiles of a band,
        K = groups of columns, r = rows of a band, 16 pairs of the 32 columns of a tile.

A tile is decoded into pairs of columns (`watersic_kernels.cpu.vectors`) in the first-level cache.
The columns of a token are multiplied as integers with a scale per tile: for inputs of 16 bits as
one digit, of 16 bits as well; for float32 as two digits of 30 bits together.  The largest column of
a tile takes all of these bits, so that the error is at most 2^-16 or 2^-31 of it.

The functions are inlined into the one that calls them, as numba would optimize each of them again
in all of its callers.  numba compiles a cached function again if its own file changes, not if this
one does: after changes here, delete its files in `__pycache__`.
"""

import numba
import numpy as np
from numpy import float32, float64, int32, int64, uint32

from watersic_kernels.cpu.vectors import (
    LANES,
    PAIRS,
    ROWS,
    add_rows,
    decode_path_rows,
    decode_rows,
)

#: Columns of a tile.
TILE = 32
#: Columns of a group of outliers.
GROUP = 256
#: Largest number of outlier entries of a group: four for every code.
MOST_ENTRIES = 4 * GROUP * ROWS
#: Words of a line of the caches, and rows of words by which lines are loaded ahead: the words of a
#: tile are read in several streams, which processors do not foresee.
LINE, AHEAD = 16, 8
#: Largest size of the integers that stand for the columns of a group beside its outliers.
LARGEST = 1 << 30
#: Largest digit of a column, the number of bits of the second digit, and half of its range.
DIGIT, DIGIT_BITS, HALF = 32767, 15, 1 << 14

#: Value of the high byte of an outlier entry: a signed digit, and the exponent of its base.
_OUTLIER_VALUES = np.array(
    [(byte - 256 * (byte > 127) >> 2) << 5 * (byte & 3) for byte in range(256)]
)

#: How all functions are compiled.  Products and sums may be fused, but not be reordered.
jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
#: The same for functions that are parts of others.
inline_jit = numba.njit(nogil=True, error_model="numpy", inline="always")


@jit
def gather(x_MN, order_C, scale_N, x_MC):
    """Multiply tokens by the scales of their columns, and write them in the order of the tiles.

    Args:
        x_MN: the tokens, float32.
        order_C: the column at each place, int32; those behind all columns are padding.
        scale_N: the scales, float32.
        x_MC: receives the products.
    """
    for c in range(len(scale_N)):
        n = order_C[c]
        if not 0 <= n < len(scale_N):
            raise IndexError("the order of the columns names a column that there is not")
        for m in range(len(x_MN)):
            x_MC[m, c] = x_MN[m, n] * scale_N[n]


@jit
def scatter(sums_MR, order_R, scale_A, y_MA):
    """Multiply the sums of rows by their scales, and write them in the order of the outputs.

    Args:
        sums_MR: the sums, float32.
        order_R: the row at each place, int32; those behind all rows are padding.
        scale_A: the scales, float32.
        y_MA: receives the products.
    """
    for r in range(len(scale_A)):
        a = order_R[r]
        if not 0 <= a < len(scale_A):
            raise IndexError("the order of the rows names a row that there is not")
        for m in range(len(sums_MR)):
            y_MA[m, a] = sums_MR[m, r] * scale_A[a]


@jit
def digits(x_MC, pairs_TVP, sum_TV, scale_TV, fixed_MC, unit_MK):
    """Write tokens as integers.

    A tile or group with a value that is not finite gets NaN as its scale.

    Args:
        x_MC: tokens, float32, columns in the order of the tiles and a multiple of `GROUP`.
        pairs_TVP: receives the pairs of columns of each tile and digit, int32; the digits of a
            token, one or two, follow each other, the higher one first.
        sum_TV: receives the sums of all columns of a tile, int32.
        scale_TV: receives the units of the digits, float32.
        fixed_MC: receives the columns as integers of at most `LARGEST`, int64.
        unit_MK: receives their units for every group of columns, float64.
    """
    parts = pairs_TVP.shape[1] // max(1, len(x_MC))
    whole_32 = np.empty(TILE, int64)
    for m in range(len(x_MC)):
        for k in range(unit_MK.shape[1]):
            columns = slice(k * GROUP, (k + 1) * GROUP)
            unit_MK[m, k] = _to_integers(x_MC[m, columns], LARGEST, fixed_MC[m, columns])
        for t in range(len(pairs_TVP)):
            most = DIGIT if parts == 1 else DIGIT << DIGIT_BITS
            unit = _to_integers(x_MC[m, t * TILE : (t + 1) * TILE], most, whole_32)
            for v in range((m + 1) * parts - 1, m * parts - 1, -1):
                # the last digit first; what it leaves is the one before
                total = int64(0)
                for i in range(PAIRS):
                    c, pair = i, int64(0)
                    for shift in (0, 16):
                        rest = whole_32[c] + HALF >> DIGIT_BITS if v > m * parts else int64(0)
                        digit = whole_32[c] - (rest << DIGIT_BITS)
                        pair |= (digit & 0xFFFF) << shift
                        total += digit
                        whole_32[c] = rest
                        c += PAIRS
                    pairs_TVP[t, v, i] = int32(uint32(pair))
                sum_TV[t, v], scale_TV[t, v] = total, unit
                unit *= 1 << DIGIT_BITS


@jit
def _to_integers(x_C, most, whole_C):
    """Write numbers as integers of at most `most`; return their unit, float64."""
    size, finite = float64(0), True
    for c in range(len(x_C)):
        size = max(size, float64(abs(x_C[c])))
        finite &= np.isfinite(x_C[c])
    inverse = most / size if finite and size > 0 else float64(0)
    for c in range(len(x_C)):
        whole_C[c] = int64(np.rint(x_C[c] * inverse)) if finite else int64(0)
    return size / most if finite else np.nan


@inline_jit
def decode_tile(words_Sr, at, width, pairs):
    """Decode a tile of width 1 or more; return by how much its codes are raised.

    Args:
        words_Sr: the words of the layer, uint32.
        at: number of the first row of words of the tile.
        width: bits of a code.
        pairs: receives the pairs of all rows, int32, `ROWS` apart.
    """
    band = words_Sr.shape[1]
    for r in range(0, band, LANES):
        decode_rows(words_Sr, at * band + r, band, width, pairs, r)
    return 1 << width >> 1


@inline_jit
def decode_path_tile(words_Sr, at, width, state_3, quantizer_r, pairs):
    """Decode a tile of a trellis; return by how much its values are raised.

    Args:
        words_Sr, at, width, pairs: as for `decode_tile`.
        state_3: state of the trellis before the first row, int32.
        quantizer_r: scratch memory for a word of every row, uint32.
    """
    band = words_Sr.shape[1]
    quantizers(words_Sr[at], state_3, quantizer_r)
    for r in range(0, band, LANES):
        decode_path_rows(words_Sr, at * band + r, band, width, quantizer_r, r, pairs, r)
    return 2 << max(width - 1, 1)


@inline_jit
def quantizers(parity_r, state_3, quantizer_r):
    """Compute the quantizers of all rows of a tile, a bit per column; return the state after them.

    Args:
        parity_r: parities of the codes, a bit per column, uint32.
        state_3: the state before the first row, int32.
        quantizer_r: receives the quantizers, uint32.
    """
    this, last, earlier = uint32(state_3[0]), uint32(state_3[1]), uint32(state_3[2])
    for r in range(len(parity_r)):
        quantizer_r[r] = this
        this, last, earlier = uint32(uint32(last ^ earlier) ^ parity_r[r]), this, last
    return this, last, earlier


@inline_jit
def add_tile(pairs, half, pairs_VP, sum_V, scale_V, sums_MR, start, band):
    """Add the products of a tile with all tokens to the sums of the rows.

    Args:
        pairs: the pairs of the tile.
        half: by how much its values are raised.
        pairs_VP, sum_V, scale_V: the tokens' columns of this tile; see `digits`.
        sums_MR: the sums, float32.
        start: number of the first row of the band.
        band: rows of the band.
    """
    per_token = len(pairs_VP) // len(sums_MR)
    for v in range(len(pairs_VP)):
        first = int32(-half * sum_V[v])
        to = v // per_token * sums_MR.shape[1] + start
        for r in range(0, band, LANES):
            add_rows(pairs, r, pairs_VP, v * PAIRS, first, scale_V[v], sums_MR, to + r)


@inline_jit
def store_tile(pairs, half, codes_CR, first, start, band):
    """Store the values of a tile as decoded codes, float32.

    Args:
        pairs: the pairs of the tile.
        half: by how much its values are raised.
        codes_CR: receives the values.
        first: number of the first column of the tile.
        start: number of the first row of the band.
        band: rows of the band.
    """
    for c in range(TILE):
        # of two signed halves, the low one holds the first 16 columns
        at, shift = ROWS * (c % PAIRS), int32(0 if c >= PAIRS else 16)
        codes_r = codes_CR[first + c, start : start + band]
        for r in range(len(codes_r)):
            value = int32(int32(pairs[at + r] << shift) >> int32(16))
            codes_r[r] = int32(value - int32(half))


@inline_jit
def add_band_outliers(entries_O, first_BK, count_BKr, b, fixed_MC, unit_MK, running, out, start):
    """Add the products of the outliers of a band to the sums, or the outliers to decoded codes.

    Args:
        entries_O, first_BK, count_BKr: tensors of the layout.
        b: the band.
        fixed_MC, unit_MK: the tokens as integers; see `digits`.  Without tokens, codes are decoded.
        running: as for `add_outliers`.
        out: the sums, M x R, or the codes, C x R, float32.
        start: number of the first row of the band in `out`.
    """
    groups, band = first_BK.shape[1], count_BKr.shape[2]
    for k in range(groups):
        place, count_r, after = first_BK[b, k], count_BKr[b, k], b * groups + k + 1
        end = len(entries_O)
        if after < first_BK.size:
            end = first_BK[after // groups, after % groups]
        if len(fixed_MC) == 0:
            store_outliers(entries_O, place, count_r, out[k * GROUP :], start)
        for m in range(len(fixed_MC)):
            fixed_G, sums_r = fixed_MC[m, k * GROUP :], out[m, start : start + band]
            add_outliers(entries_O, place, end, count_r, fixed_G, unit_MK[m, k], running, sums_r)


@inline_jit
def add_outliers(entries_O, first, stop, count_r, fixed_G, unit, running, sums_r):
    """Add the products of the outliers of one group of columns to the sums of the rows.

    Rows have few entries each, and where they end is hard to predict.  Therefore the products of
    all entries are summed up, and a row's sum is a difference.  Integers make it exact, even if
    the running sum overflows.

    Args:
        entries_O: the entries of the layer, int16.
        first, stop: position of the first entry of the group, and of the next group.
        count_r: number of entries of every row.
        fixed_G: a token's columns of this group as integers, all `GROUP`, int64.
        unit: their unit, float64.
        running: scratch memory for `MOST_ENTRIES` + 1 sums, int64.
        sums_r: the sums, float32.
    """
    begin = min(max(int64(first), 0), len(entries_O))
    entries = max(min(int64(stop), len(entries_O), begin + MOST_ENTRIES) - begin, 0)
    part_O, sums_O = entries_O[begin : begin + entries], running[1:]
    total = running[0] = int64(0)
    for i in range(len(part_O)):
        entry = int64(part_O[i])
        total += fixed_G[entry & 255] * _OUTLIER_VALUES[entry >> 8 & 255]
        sums_O[i] = total
    at, before = 0, int64(0)
    for r in range(len(count_r)):
        at = min(at + max(int64(count_r[r]), 0), entries)
        now = running[at]
        sums_r[r] += float32((now - before) * unit)
        before = now


@inline_jit
def store_outliers(entries_O, first, count_r, codes_CR, start):
    """Add the outliers of one group of columns to decoded codes.

    Args:
        entries_O, first, count_r: as for `add_outliers`.
        codes_CR: the codes from the first column of the group on, float32.
        start: number of the first row of the band in `codes_CR`.
    """
    at = min(max(int64(first), 0), len(entries_O))
    for r in range(len(count_r)):
        stop = min(at + max(int64(count_r[r]), 0), len(entries_O))
        for i in range(at, stop):
            entry = int64(entries_O[i])
            if entry & 255 < len(codes_CR):
                codes_CR[entry & 255, start + r] += float32(_OUTLIER_VALUES[entry >> 8 & 255])
        at = stop
