"""Tiles of fixed width as values, and their products with tokens, compiled for CPUs.

Shapes: M = tokens, r = rows of a band, 32 columns of a tile.

A tile is decoded into bytes in the first-level cache, 32 columns of `ROWS` bytes each, so that the
lanes of all vector instructions are rows: first the words are spread over planes of bytes, then the
codes of every column are cut out of two planes, 32 rows per instruction.  The quantizers of a
trellis follow row by row from words of 32 columns.  In a tile, column ``8 g + j`` is at place
``4 j + g``: then the same bits of the bytes belong to four columns in a row.

All loops over rows have constant distances between the columns; otherwise LLVM does not vectorize
them.  The functions are inlined into the one that calls them, as numba would optimize each of them
again in all of its callers.  numba compiles a cached function again if its own file changes, not if
this one does: after changes here, delete its files in `__pycache__`.
"""

import numba
import numpy as np
from numpy import float32, float64, int8, int64, uint8, uint32

#: Columns of a tile.
TILE = 32
#: Largest number of rows of a tile: the distance of columns and planes in scratch memory.
ROWS = 128
#: Columns of a group of outliers.
GROUP = 256
#: Largest number of outlier entries of a group: four for every code.
MOST_ENTRIES = 4 * GROUP * ROWS
#: Bytes of four columns or planes.
STEP = 4 * ROWS

# by the width of codes, the first bit of code j in its byte, 7 minus that, and j itself: tables, as
# LLVM would otherwise compute with integers of 64 bits, eight times as slowly
_SHIFT = (np.arange(9)[:, None] * np.arange(8) & 7).astype(uint8)
_BACK = 7 - _SHIFT
_PLACE = np.zeros((9, 1), uint8) + np.arange(8, dtype=uint8)

#: How all functions are compiled.  Products and sums may be fused, but not be reordered.
jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
#: The same for functions that are parts of others.
inline_jit = numba.njit(nogil=True, error_model="numpy", inline="always")


@inline_jit
def spread(words_r, first, byte, width, planes):
    """Spread the bytes of the words of all rows over planes.

    The 32 columns are four groups of eight, and a group of codes of w bits takes w bytes of a row.
    Byte n of group g goes to plane ``4 n + g``.

    Args:
        words_r: a word of every row, uint32.
        first: number of the first plane of the codes.
        byte: number of the first byte of the word in its row.
        width: bits of a code.
        planes: receives the bytes, uint8.
    """
    for i in range(4):
        group, n = (byte + i) // width, (byte + i) % width
        start, shift = ROWS * (first + 4 * n + group), uint32(8 * i)
        out = planes[start : start + ROWS]
        for r in range(len(words_r)):
            out[r] = uint8(words_r[r] >> shift)


@inline_jit
def cut(planes, width, low, tile):
    """Cut the codes of a tile out of its planes.

    Args:
        planes: planes of bytes, uint8.
        width: bits of a code, from 1 to 8.
        low: what is added to every code, int8.
        tile: receives the codes, int8.
    """
    mask = uint8((1 << width) - 1)
    for j in range(8):
        # the code may begin in one plane and end in the next
        shift = uint8(_SHIFT[width, j] & uint8(7))
        back = uint8(_BACK[width, j] & uint8(7))
        start = STEP * (j * width >> 3 & 7)
        for i in range(STEP):
            code = uint8(planes[start + i] >> shift)
            code |= uint8(uint8(planes[start + STEP + i] << back) << uint8(1))
            tile[j * STEP + i] = int8(uint8(code & mask) + low)


@inline_jit
def quantizers(parity_r, state_3, quantizer_r):
    """Compute the quantizers of all rows of a tile: a bit per column.

    Args:
        parity_r: parities of the codes, uint32.
        state_3: the state before the first row, int32.
        quantizer_r: receives the quantizers, uint32.
    """
    this, last, earlier = uint32(state_3[0]), uint32(state_3[1]), uint32(state_3[2])
    for r in range(len(parity_r)):
        quantizer_r[r] = this
        this, last, earlier = uint32(uint32(last ^ earlier) ^ parity_r[r]), this, last


@inline_jit
def values(parity, quantizer, width, tile):
    """Replace the codes of a tile, without their lowest bits, by the values of a trellis.

    With k the code and Q the quantizer, ``g = 2 k + Q`` consists of bits that only need to be put
    together.  The value is g if g is negative, and otherwise ``g - 2 Q``, but at least 0.

    Args:
        parity, quantizer: the parities of the codes and the quantizers, four planes, uint8.
        width: bits of the codes, at most 6, which are raised by half of their range.
        tile: the codes, int8; receives the values.
    """
    zero, one, half = int8(0), uint8(1), int8(2 << width)
    for j in range(8):
        shift = uint8(_PLACE[width, j] & uint8(7))
        for i in range(STEP):
            p = int8(uint8(parity[i] >> shift) & one)
            q = int8(uint8(quantizer[i] >> shift) & one)
            g = int8(int8(int8(tile[j * STEP + i] << 2) | int8(int8(p << 1) | q)) - half)
            positive = int8(max(int8(max(g, zero) - int8(q << 1)), zero))
            tile[j * STEP + i] = int8(min(g, zero) + positive)


@inline_jit
def add_product(tile, x_32, sums_r):
    """Add the products of a tile with the columns of one token to the sums of the rows.

    Args:
        tile: the values of the tile, of an integer type.
        x_32: the token's columns, float32.
        sums_r: the sums, float32.
    """
    for r in range(len(sums_r)):
        # four sums: the latency of a sum would be longer than the time that its terms take
        a = x_32[0] * float32(tile[0 * ROWS + r])
        b = x_32[8] * float32(tile[1 * ROWS + r])
        c = x_32[16] * float32(tile[2 * ROWS + r])
        d = x_32[24] * float32(tile[3 * ROWS + r])
        a += x_32[1] * float32(tile[4 * ROWS + r])
        b += x_32[9] * float32(tile[5 * ROWS + r])
        c += x_32[17] * float32(tile[6 * ROWS + r])
        d += x_32[25] * float32(tile[7 * ROWS + r])
        a += x_32[2] * float32(tile[8 * ROWS + r])
        b += x_32[10] * float32(tile[9 * ROWS + r])
        c += x_32[18] * float32(tile[10 * ROWS + r])
        d += x_32[26] * float32(tile[11 * ROWS + r])
        a += x_32[3] * float32(tile[12 * ROWS + r])
        b += x_32[11] * float32(tile[13 * ROWS + r])
        c += x_32[19] * float32(tile[14 * ROWS + r])
        d += x_32[27] * float32(tile[15 * ROWS + r])
        a += x_32[4] * float32(tile[16 * ROWS + r])
        b += x_32[12] * float32(tile[17 * ROWS + r])
        c += x_32[20] * float32(tile[18 * ROWS + r])
        d += x_32[28] * float32(tile[19 * ROWS + r])
        a += x_32[5] * float32(tile[20 * ROWS + r])
        b += x_32[13] * float32(tile[21 * ROWS + r])
        c += x_32[21] * float32(tile[22 * ROWS + r])
        d += x_32[29] * float32(tile[23 * ROWS + r])
        a += x_32[6] * float32(tile[24 * ROWS + r])
        b += x_32[14] * float32(tile[25 * ROWS + r])
        c += x_32[22] * float32(tile[26 * ROWS + r])
        d += x_32[30] * float32(tile[27 * ROWS + r])
        a += x_32[7] * float32(tile[28 * ROWS + r])
        b += x_32[15] * float32(tile[29 * ROWS + r])
        c += x_32[23] * float32(tile[30 * ROWS + r])
        d += x_32[31] * float32(tile[31 * ROWS + r])
        sums_r[r] += (a + b) + (c + d)


@inline_jit
def store_values(tile, codes_r, column):
    """Store the values of a column of a tile as decoded codes, float32."""
    start = ROWS * (4 * (column & 7) + (column >> 3))
    for r in range(len(codes_r)):
        codes_r[r] = tile[start + r]


@inline_jit
def outlier_value(entry):
    """Return the value that an outlier entry, int64, adds to a code."""
    return (entry >> 10) << 5 * (entry >> 8 & 3)


@inline_jit
def add_outliers(entries_O, first, count_r, x_C, running, sums_r):
    """Add the products of the outliers of one group of columns to the sums of the rows.

    Rows have few entries each, and where they end is hard to predict.  Therefore the products of
    all entries are summed up, and a row's sum is a difference; float64 keeps it exact enough.

    Args:
        entries_O: the entries of the layer, int16.
        first: position of the first entry of the group.
        count_r: number of entries of every row.
        x_C: a token's columns of this group, all `GROUP`, float32.
        running: scratch memory for `MOST_ENTRIES` + 1 sums, float64.
        sums_r: the sums, float32.
    """
    begin = min(max(int64(first), 0), len(entries_O))
    entries = 0
    for r in range(len(count_r)):
        entries += max(int64(count_r[r]), 0)
    entries = min(entries, len(entries_O) - begin, MOST_ENTRIES)
    total = running[0] = float64(0)
    for i in range(entries):
        entry = int64(entries_O[begin + i])
        total += float64(x_C[entry & 255] * float32(outlier_value(entry)))
        running[i + 1] = total
    at = 0
    for r in range(len(count_r)):
        stop = min(at + max(int64(count_r[r]), 0), entries)
        sums_r[r] += float32(running[stop] - running[at])
        at = stop


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
                codes_CR[entry & 255, start + r] += float32(outlier_value(entry))
        at = stop
