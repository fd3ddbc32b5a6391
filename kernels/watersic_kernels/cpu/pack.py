"""Pack codes into tiles of fixed width on CPUs; the contract is that of `watersic_hf.nn.packing`.

Shapes: A = out_features (rows), N = in_features (columns), B = bands of rows, T = tiles of a band,
        C = columns of all tiles, r = rows of a band, j = columns of a tile, K = groups of columns,
        S = slots of a row of words each, O = outlier entries.

Bands are measured first: the widths of their tiles and the numbers of their outliers say where
their words and entries go.  Then they are written, in any order.  Both read one tile at a time into
scratch memory in the first-level cache, column by column, so that vectors hold rows.
"""

import numba
import numpy as np
import torch
from numpy import int32, int64, uint32, uint64
from torch import Tensor

from watersic_kernels.cpu.threads import in_parts
from watersic_kernels.cpu.tiles import GROUP, TILE, inline_jit, quantizers

jit = numba.njit(cache=True, nogil=True, error_model="numpy")


def sizes(codes_AN: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return the size of every row and of every column, to sort them by; see `magnitudes`."""
    rows, columns = codes_AN.shape
    size_A, size_N = np.empty(rows), np.zeros(columns)
    magnitudes(codes_AN.numpy(), largest, size_A, size_N)
    return torch.from_numpy(size_A), torch.from_numpy(size_N)


def measure(
    codes_AN: Tensor,
    row_order_R: Tensor,
    column_order_C: Tensor,
    band: int,
    costs: tuple[int, int, int],
    path_bands: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return widths, states and numbers of outlier entries, as `measure_bands` writes them.

    Args:
        codes_AN, row_order_R, column_order_C, costs, path_bands: its first arguments.
        band: rows of a band.
    """
    bands, tiles = len(row_order_R) // band, len(column_order_C) // TILE
    out = (
        torch.empty(bands, tiles, dtype=torch.int64),
        torch.empty(bands, tiles, 3 if path_bands else 0, dtype=torch.int32),
        torch.zeros(bands, -(-tiles * TILE // GROUP), band, dtype=torch.int64),
    )
    given = codes_AN.numpy(), row_order_R.numpy(), column_order_C.numpy(), costs, path_bands
    arrays = tuple(tensor.numpy() for tensor in out)
    step = path_bands or 1

    def part(first: int, stop: int) -> None:
        measure_bands(*given, first * step, min(stop * step, bands), arrays)

    in_parts(part, -(-bands // step), torch.get_num_threads())
    return out


def write(
    codes_AN: Tensor,
    row_order_R: Tensor,
    column_order_C: Tensor,
    measured: tuple[Tensor, Tensor, Tensor],
    slot_BT: Tensor,
    first_BK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the words, int32 and flat, and the outlier entries, as `write_bands` writes them."""
    widths_BT, state_BT3, count_BKr = measured
    bands, _, band = count_BKr.shape
    words_Sr = torch.empty(int(widths_BT.sum()), band, dtype=torch.int32)
    entries_O = torch.empty(int(count_BKr.sum()), dtype=torch.int16)
    given = tuple(tensor.numpy() for tensor in (codes_AN, row_order_R, column_order_C))
    places = tuple(tensor.numpy() for tensor in measured), slot_BT.numpy(), first_BK.numpy()
    out = words_Sr.numpy().view(np.uint32), entries_O.numpy()

    def part(first: int, stop: int) -> None:
        write_bands(*given, *places, state_BT3.shape[2] > 0, first, stop, out)

    in_parts(part, bands, torch.get_num_threads())
    return words_Sr.flatten(), entries_O


@jit
def magnitudes(codes_AN, largest, size_A, size_N):
    """Measure rows and columns, to sort them.

    Args:
        codes_AN: the codes, of any integer dtype.
        largest: magnitude that larger ones count as.
        size_A: receives the mean magnitude of each row, float64.
        size_N: the magnitudes of each column relative to the means of its rows are added to it.
    """
    for a in range(len(codes_AN)):
        total = int64(0)
        for n in range(len(size_N)):
            total += min(abs(int64(codes_AN[a, n])), largest)
        size_A[a] = total / len(size_N)
        factor = 1 / (size_A[a] + 1e-3)
        for n in range(len(size_N)):
            size_N[n] += min(abs(int64(codes_AN[a, n])), largest) * factor


@jit
def measure_bands(codes_AN, order_R, order_C, costs, path_bands, first, stop, out):
    """Choose the widths of the tiles of some bands, and count their outlier entries.

    Args:
        codes_AN: codes, or the values of a trellis, of any integer dtype.
        order_R: the row at each place, int64; A or more for padding.
        order_C: the column at each place, int64; N or more for padding.
        costs: bits of a width for a whole tile, bits of an outlier, and the largest width.
        path_bands: bands of a path; 0 for codes.
        first, stop: the bands, whole paths.
        out: receives the widths, int64 [B, T], the states of a trellis, int32 [B, T, 3], and the
            numbers of entries, int64 [B, K, r], zero before.
    """
    widths_BT, state_BT3, count_BKr = out
    band, trellis = count_BKr.shape[2], path_bands > 0
    codes_jr = np.empty((TILE, band), int32)
    parity_r, quantizer_r = np.zeros(band, uint32), np.zeros(band, uint32)
    outside_r = np.empty(band, uint32)
    before_T3 = np.zeros((widths_BT.shape[1], 3), uint32)
    for b in range(first, stop):
        if trellis and b % path_bands == 0:
            before_T3[:] = 0
        order_r = order_R[b * band : (b + 1) * band]
        for t in range(widths_BT.shape[1]):
            start = t * TILE
            _read_tile(codes_AN, order_r, order_C[start : start + TILE], trellis, codes_jr)
            width = widths_BT[b, t] = _width_of(codes_jr, costs, trellis)
            if trellis:
                for i in range(3):
                    state_BT3[b, t, i] = int32(before_T3[t, i])
                _parities(codes_jr, parity_r)
                after = quantizers(parity_r, state_BT3[b, t], quantizer_r)
                before_T3[t, 0], before_T3[t, 1], before_T3[t, 2] = after
            _outside(codes_jr, width, outside_r)
            for r in range(band):
                if outside_r[r]:
                    given = outside_r[r], width, trellis, quantizer_r[r]
                    count_BKr[b, start // GROUP, r] += _entries_of(codes_jr, r, given)


@jit
def write_bands(codes_AN, order_R, order_C, measured, slot_BT, first_BK, trellis, first, stop, out):
    """Write the words and the outlier entries of some bands.

    Args:
        codes_AN, order_R, order_C: as for `measure_bands`.
        measured: what that writes.
        slot_BT: the first row of words of each tile, int64.
        first_BK: position of the first entry of each group of columns, int64.
        trellis: whether these are the values of a trellis.
        first, stop: the bands.
        out: receives the words, uint32 [S, r], and the entries, int16 [O].
    """
    widths_BT, state_BT3, count_BKr = measured
    words_Sr, entries_O = out
    band = count_BKr.shape[2]
    codes_jr, place_r = np.empty((TILE, band), int32), np.zeros(band, int64)
    parity_r, quantizer_r = np.zeros(band, uint32), np.zeros(band, uint32)
    outside_r = np.empty(band, uint32)
    for b in range(first, stop):
        order_r = order_R[b * band : (b + 1) * band]
        for t in range(widths_BT.shape[1]):
            start = t * TILE
            _read_tile(codes_AN, order_r, order_C[start : start + TILE], trellis, codes_jr)
            width, slot, group = widths_BT[b, t], slot_BT[b, t], start // GROUP
            if start % GROUP == 0:
                place = first_BK[b, group]
                for r in range(band):
                    place_r[r] = place
                    place += count_BKr[b, group, r]
            if trellis:
                _parities(codes_jr, parity_r)
                quantizers(parity_r, state_BT3[b, t], quantizer_r)
            if width > 0:
                _write_words(codes_jr, width, trellis, parity_r, words_Sr[slot : slot + width])
            _outside(codes_jr, width, outside_r)
            for r in range(band):
                if outside_r[r]:
                    given = outside_r[r], width, trellis, quantizer_r[r]
                    place_r[r] = _write_entries(
                        codes_jr, r, given, start % GROUP, entries_O, place_r[r]
                    )


@jit
def _read_tile(codes_AN, order_r, order_j, trellis, codes_jr):
    """Read the codes of a tile; padding is zero."""
    # unsigned: signed indices would be checked for counting from the end of an array
    rows, columns = uint64(codes_AN.shape[0]), uint64(codes_AN.shape[1])
    for r in range(len(order_r)):
        a = uint64(order_r[r])
        for j in range(len(order_j)):
            n = uint64(order_j[j])
            codes_jr[j, r] = codes_AN[a, n] if a < rows and n < columns else 0
    if trellis:
        for j in range(TILE):
            for r in range(len(order_r)):
                # of the value 2 k - q sign(k)
                code = codes_jr[j, r]
                codes_jr[j, r] = int32(code + int32(code > 0)) >> int32(1)


@jit
def _width_of(codes_jr, costs, trellis):
    """Return the width of a tile that takes the fewest bits, outliers included."""
    per_bit, per_outlier, most = costs
    odd = int32(0)
    for j in range(TILE):
        for r in range(codes_jr.shape[1]):
            odd |= codes_jr[j, r]
    best, width = int64(0), int64(-1)
    # no odd code can be clipped to a width of 0
    for w in range(int64(trellis and odd & 1 == 1), most + 1):
        low, high = _range(w)
        low, high, outside = int32(low), int32(high), int32(0)
        for j in range(TILE):
            for r in range(codes_jr.shape[1]):
                code = codes_jr[j, r]
                outside = int32(outside + int32((code < low) | (code > high)))
        bits = w * per_bit + per_outlier * int64(outside)
        if width < 0 or bits < best:
            best, width = bits, int64(w)
        if outside == 0:
            break
    return width


@jit
def _outside(codes_jr, width, outside_r):
    """Write for each row of a tile which of its codes have outlier entries: column j is bit j."""
    low, high = _range(width)
    low, high = int32(low), int32(high)
    outside_r[:] = 0
    for j in range(TILE):
        for r in range(codes_jr.shape[1]):
            code = codes_jr[j, r]
            outside_r[r] |= uint32(uint32((code < low) | (code > high)) << uint32(j))


@inline_jit
def _range(width):
    """Return the smallest and the largest code of a width."""
    half = int64(1) << width >> 1
    return -half, max(half - 1, 0)


@inline_jit
def _clipped(code, low, high, trellis):
    """Return a code clipped to a range, with a trellis to the nearest one of the same parity."""
    clipped = min(max(int64(code), low), high)
    if trellis and low < high and clipped != code and (clipped ^ code) & 1:
        clipped += 1 if clipped > code else -1
    return clipped


@inline_jit
def _rest(code, low, high, trellis, quantizer):
    """Return what the words of a tile cannot hold of a code, or of its value."""
    clipped = _clipped(code, low, high, trellis)
    rest = int64(code) - clipped
    if trellis:
        sign = int64(code > 0) - int64(code < 0)
        rest = 2 * rest - quantizer * (sign - int64(clipped > 0) + int64(clipped < 0))
    return rest


@inline_jit
def _entries_of(codes_jr, r, given):
    """Return the number of outlier entries of one row of a tile."""
    outside, width, trellis, quantizers_j = given
    (low, high), number, j = _range(width), int64(0), 0
    while outside:
        if outside & uint32(1):
            quantizer = int64(quantizers_j >> uint32(j)) & 1
            rest = _rest(codes_jr[j, r], low, high, trellis, quantizer)
            while rest:
                rest -= _leading_digit(rest)[1]
                number += 1
        outside, j = outside >> uint32(1), j + 1
    return number


@inline_jit
def _write_entries(codes_jr, r, given, column, entries_O, place):
    """Write the outlier entries of one row of a tile; return the place behind them."""
    outside, width, trellis, quantizers_j = given
    (low, high), j = _range(width), 0
    while outside:
        if outside & uint32(1):
            quantizer = int64(quantizers_j >> uint32(j)) & 1
            rest = _rest(codes_jr[j, r], low, high, trellis, quantizer)
            while rest:
                byte, value = _leading_digit(rest)
                rest -= value
                entries_O[place] = byte << 8 | column + j
                place += 1
        outside, j = outside >> uint32(1), j + 1
    return place


@inline_jit
def _leading_digit(value):
    """Return the leading base-32 digit of a value: as the high byte of an entry, and its value."""
    exponent = int64(0)
    while exponent < 3 and not -32 <= value >> 5 * exponent <= 31:
        exponent += 1
    digit = min(max(value >> 5 * exponent, -32), 31)
    return digit << 2 | exponent, digit << 5 * exponent


@jit
def _parities(codes_jr, parity_r):
    """Write the parities of the codes of each row of a tile as a word."""
    parity_r[:] = 0
    for j in range(TILE):
        for r in range(codes_jr.shape[1]):
            parity_r[r] |= uint32(uint32(codes_jr[j, r] & int32(1)) << uint32(j))


@jit
def _write_words(codes_jr, width, trellis, parity_r, words_wr):
    """Write the words of a tile of width 1 or more."""
    words_wr[:] = 0
    low, high = _range(width)
    slot, shift = 0, int32(0)
    if trellis:
        for r in range(len(parity_r)):
            words_wr[0, r] = parity_r[r]
        slot, shift, width = 1, int32(1), width - 1
    low, high, half = int32(low), int32(high), int32(int64(1) << width >> 1)
    stored_r, odd = np.empty_like(parity_r), int32(trellis)
    for j in range(TILE if width else 0):
        for r in range(len(stored_r)):
            code = codes_jr[j, r]
            clipped = min(max(code, low), high)
            # of a trellis, to the nearest code of the same parity
            inwards = int32(clipped > code) - int32(clipped < code)
            clipped = int32(clipped + inwards * int32((clipped ^ code) & odd))
            stored_r[r] = uint32(int32(clipped >> shift) + half)
        word, bit = uint64(slot + (j * width >> 5)), uint32(j * width & 31)
        for r in range(len(stored_r)):
            words_wr[word, r] |= uint32(stored_r[r] << bit)
        if bit + width > 32:
            for r in range(len(stored_r)):
                words_wr[word + uint64(1), r] |= uint32(stored_r[r] >> (uint32(32) - bit))
