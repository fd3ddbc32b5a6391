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

# by the width of codes, the first bit of code j in its byte, 7 minus that, and that of its pair in
# `quantizers`: tables, as LLVM would otherwise compute with 64 bits, eight times as slowly
_SHIFT = (np.arange(9)[:, None] * np.arange(8) & 7).astype(uint8)
_BACK = 7 - _SHIFT
_EVEN = np.zeros((9, 1), uint8) + (np.arange(8) & 6).astype(uint8)

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
def quantizers(parity_r, state_3, words_3r):
    """Compute the quantizers of all rows of a tile, and pair them with the parities.

    Args:
        parity_r: parities of the codes, a bit per column, uint32.
        state_3: the state before the first row, int32.
        words_3r: receives, uint32, the opposites of the parities, and the pairs of the even and of
            the odd columns: two bits per column, the quantizer and above it the parity.
    """
    quantizer_r, even_r, odd_r = words_3r[0], words_3r[1], words_3r[2]
    this, last, earlier = uint32(state_3[0]), uint32(state_3[1]), uint32(state_3[2])
    for r in range(len(parity_r)):
        quantizer_r[r] = this
        this, last, earlier = uint32(uint32(last ^ earlier) ^ parity_r[r]), this, last
    low, high = uint32(0x55555555), uint32(0xAAAAAAAA)
    for r in range(len(parity_r)):
        p, q = parity_r[r], quantizer_r[r]
        even_r[r] = uint32(uint32(q & low) | uint32(uint32(p & low) << uint32(1)))
        odd_r[r] = uint32(uint32(uint32(q & high) >> uint32(1)) | uint32(p & high))
        quantizer_r[r] = ~p


@inline_jit
def cut_values(planes, pairs, width, tile):
    """Cut codes without their lowest bits out of planes, and replace them by values of a trellis.

    With k the code and Q the quantizer, ``g = 2 k + Q`` consists of bits that only need to be put
    together.  The value is g if g is negative, and otherwise ``g - 2 Q``, but at least 0.

    Args:
        planes: planes of bytes of the codes, uint8.
        pairs: planes of the quantizers and parities, first of the even and then of the odd columns.
        width: bits of the codes, at most 6, which are raised by half of their range.
        tile: receives the values, int8.
    """
    zero, half, mask = int8(0), int8(2 << width), uint8((1 << width) - 1)
    for j in range(8):
        shift = uint8(_SHIFT[width, j] & uint8(7))
        back = uint8(_BACK[width, j] & uint8(7))
        place = uint8(_EVEN[width, j] & uint8(7))
        start, pair = STEP * (j * width >> 3 & 7), STEP * (j & 1)
        for i in range(STEP):
            code = uint8(planes[start + i] >> shift)
            code |= uint8(uint8(planes[start + STEP + i] << back) << uint8(1))
            two = uint8(uint8(pairs[pair + i] >> place) & uint8(3))
            g = int8(int8(uint8(uint8(code & mask) << uint8(2)) | two) - half)
            twice = int8(uint8(two & uint8(1)) << uint8(1))
            positive = int8(max(int8(max(g, zero) - twice), zero))
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
