"""Encode and decode the entropy-coded payload of a layer, one chunk per call, compiled for CPUs.

Shapes: A x N codes of the matrix as it is stored, K = keys, S = 256 symbols, W = 16-bit words.

`watersic_hf/codec/FORMAT.md` defines the format, and what the words of a chunk are.  All functions
release the interpreter's lock, so that threads work on several chunks at a time.  Whatever the
words contain, nothing outside the arrays is read or written.
"""

import numba
import numpy as np
from numpy import float64, int32, int64, uint16, uint32, uint64

from watersic_kernels.cpu.threads import in_parts  # noqa: F401, what shares the chunks out

#: Lanes of a chunk.
LANES = 32
#: Smallest state, and the state in which the encoder starts.
STATE_MIN = 1 << 16
#: Symbol of the escape.
ESCAPE = -128
#: Columns that are decoded before they are written.
BLOCK = 16

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
inline_jit = numba.njit(nogil=True, error_model="numpy", inline="always")


@jit
def decode_chunk(
    words_W,
    page_K,
    pages,
    shift_K,
    first_shifted,
    row_class_A,
    col_class_N,
    per_lane,
    escape_words,
    trellis,
    start,
    place_N,
    out,
):
    """Decode one chunk into `out`.

    Args:
        words_W: words of the chunk, uint16, at least two per lane.
        page_K: first entry of the table of every key in `pages`, int64.
        pages: tables of 4096 entries: the symbol, the slot relative to the symbol's first, and the
            frequency, in 8, 12 and 12 bits; uint32.
        shift_K: number of low bits that follow a symbol of each key, uint8.
        first_shifted: the first key with low bits.
        row_class_A, col_class_N: classes of the rows and columns of the chunk, int64; the sum of
            any two, plus 1 with a trellis, must be a key.
        per_lane: rows that one lane holds.
        escape_words: words of an escaped value.
        trellis: whether to return the values of a trellis, whose quantizer is added to the keys.
        start: the row of `out` that receives the first row of the chunk.
        place_N: the column of `out` for each column of the chunk, int64; others are left out.
        out: receives the codes, int32; transposed with a trellis.

    Returns:
        The number of words left, the number of words of the escaped values, and the number of
        lanes that do not end in the state in which the encoder starts.
    """
    rows, columns = len(row_class_A), len(col_class_N)
    lanes = (rows + per_lane - 1) // per_lane
    states = np.zeros(LANES, uint32)
    keys, class_L = np.zeros(LANES, int32), np.zeros(LANES, int32)
    # the quantizers of this step and of the two before it
    path_3L = np.zeros((3, LANES), int32)
    codes_BL = np.zeros((BLOCK, LANES), int32)
    for lane in range(lanes):
        states[lane] = uint32(words_W[2 * lane]) | uint32(words_W[2 * lane + 1]) << uint32(16)
    tables = page_K, pages, shift_K, first_shifted
    at, end = uint64(2 * lanes), len(words_W)
    for phase in range(per_lane):
        first = phase * lanes
        active = max(0, min(lanes, rows - first))
        for lane in range(active):
            class_L[lane] = row_class_A[first + lane]
        path_3L[:] = 0
        for column in range(0, columns, BLOCK):
            col_class_B = col_class_N[column : column + BLOCK]
            state = keys, states, path_3L, at, end
            at, end = _columns(
                words_W,
                tables,
                class_L[:active],
                col_class_B,
                escape_words,
                trellis,
                state,
                codes_BL,
            )
            place_B = place_N[column : column + BLOCK]
            _write(codes_BL[:, :active], place_B, trellis, start + first, out)
    moved = 0
    for lane in range(lanes):
        moved += states[lane] != STATE_MIN
    return len(words_W) - int64(at), len(words_W) - end, moved


@jit
def _columns(words_W, tables, class_L, col_class_B, escape_words, trellis, state, codes_BL):
    """Decode some columns of the active lanes; return the next positions.

    Arrays that are arguments or slices cost as much as some codes, so this one function computes.
    """
    page_K, pages, shift_K, first_shifted = tables
    keys, states, path_3L, at, end = state
    lanes, last_word, highest = len(class_L), uint64(len(words_W) - 1), 0
    for lane in range(lanes):
        highest = max(highest, class_L[lane] + trellis)
    for i in range(len(col_class_B)):
        for lane in range(lanes):
            keys[lane] = int32(class_L[lane] + int32(col_class_B[i])) + path_3L[0, lane]
        for lane in range(lanes):
            state = states[lane]
            entry = pages[uint64(page_K[uint64(keys[lane])]) + uint64(state & uint32(4095))]
            codes_BL[i, lane] = int32(entry)
            state = uint32(uint32(entry & uint32(4095)) * uint32(state >> uint32(12)))
            state = uint32(state + uint32(entry >> uint32(12) & uint32(4095)))
            small = state < uint32(STATE_MIN)
            # no word is read outside the chunk, whatever it contains
            word = uint32(words_W[min(at, last_word)])
            states[lane] = uint32(state << uint32(16) | word) if small else state
            at += uint64(small)
        least = int32(0)
        for lane in range(lanes):
            codes_BL[i, lane] >>= int32(24)
            least = min(least, codes_BL[i, lane])
        if highest + col_class_B[i] >= first_shifted:
            at = _low_bits(words_W, shift_K, keys, states, at, codes_BL[i, :lanes])
        if least == ESCAPE:
            end = _escaped_values(words_W, keys, escape_words, end, codes_BL[i, :lanes])
        if trellis:
            for lane in range(lanes):
                code, this, last = codes_BL[i, lane], path_3L[0, lane], path_3L[1, lane]
                sign = int32(code > 0) - int32(code < 0)
                codes_BL[i, lane] = int32(2 * code - this * sign)
                path_3L[0, lane] = int32(int32(last ^ path_3L[2, lane]) ^ code & int32(1))
                path_3L[1, lane], path_3L[2, lane] = this, last
    return at, end


@jit
def _low_bits(words_W, shift_K, keys, states, at, codes):
    """Decode the low bits of all lanes; a key of -1 says that a code is no escape any more."""
    for lane in range(len(codes)):
        shift = int64(shift_K[keys[lane]])
        if shift:
            state = states[lane]
            low = int64(state) & (1 << shift) - 1
            state = uint32(state >> uint32(shift))
            if state < uint32(STATE_MIN):
                word = uint32(words_W[min(at, uint64(len(words_W) - 1))])
                state, at = uint32(state << uint32(16) | word), at + uint64(1)
            states[lane] = state
            if codes[lane] != ESCAPE:
                codes[lane] = (int64(codes[lane]) << shift) + low - (1 << shift >> 1)
                keys[lane] = -1
    return at


@jit
def _escaped_values(words_W, keys, escape_words, end, codes):
    """Read the escaped values from the end of the chunk; return where the next one ends."""
    for lane in range(len(codes)):
        if codes[lane] == ESCAPE and keys[lane] >= 0:
            end -= escape_words
            value = int64(words_W[max(end, 0)])
            if escape_words == 2:
                value |= int64(words_W[max(end + 1, 0)]) << 16
                codes[lane] = (value ^ 0x80000000) - 0x80000000
            else:
                codes[lane] = (value ^ 0x8000) - 0x8000
    return end


@jit
def _write(codes_BL, place_B, trellis, start, out):
    """Write the codes of some columns, in the order in which the output lies in memory."""
    lanes = codes_BL.shape[1]
    if trellis:
        for i in range(len(place_B)):
            if 0 <= place_B[i] < len(out):
                for lane in range(lanes):
                    out[place_B[i], start + lane] = codes_BL[i, lane]
    else:
        for lane in range(lanes):
            for i in range(len(place_B)):
                if 0 <= place_B[i] < out.shape[1]:
                    out[start + lane, place_B[i]] = codes_BL[i, lane]


@jit
def encode_chunk(
    codes_AN, quantizer_AN, entry_KS, shift_K, row_class_A, col_class_N, per_lane, escape_words, out
):
    """Encode one chunk.

    Args:
        codes_AN: codes of the chunk, int32.
        quantizer_AN: what is added to the keys, uint8, for the codes of a trellis; otherwise of no
            columns.
        entry_KS: entries of the symbols by key: whether it is escaped, its start and its frequency,
            in 8, 12 and 12 bits, uint32.
        shift_K: number of low bits that follow a symbol of each key, uint8.
        row_class_A, col_class_N: classes of the rows and columns, int64.
        per_lane: rows that one lane holds.
        escape_words: words of an escaped value.
        out: receives the words of the states, symbols and low bits at its end, which are written
            backwards, and the escaped values in reverse coding order at its start; uint16.  It
            must have room for two per lane, two per code, and the escaped values.

    Returns:
        Where the words begin, and the number of words of the escaped values.
    """
    rows, columns = codes_AN.shape
    lanes = (rows + per_lane - 1) // per_lane
    states, entries = np.empty(LANES, uint32), np.empty(LANES, uint32)
    states[:] = STATE_MIN
    at = len(out)
    trellis = quantizer_AN.shape[1] > 0
    escaped = 0
    for phase in range(per_lane - 1, -1, -1):
        first = phase * lanes
        active = max(0, min(lanes, rows - first))
        for column in range(columns - 1, -1, -1):
            for lane in range(active - 1, -1, -1):
                row = first + lane
                key = row_class_A[row] + col_class_N[column]
                if trellis:
                    key += quantizer_AN[row, column]
                code, shift = int64(codes_AN[row, column]), int64(shift_K[key])
                entry = entry_KS[uint64(key), uint64(_symbol(code, shift))]
                entries[lane] = entry
                if shift:
                    at = _put_low_bits(states, lane, code, shift, out, at)
                if entry >> uint32(24):
                    out[escaped] = uint16(code & 0xFFFF)
                    if escape_words == 2:
                        out[escaped + 1] = uint16(code >> 16 & 0xFFFF)
                    escaped += escape_words
            for lane in range(active - 1, -1, -1):
                at = _put_symbol(states, lane, entries[lane], out, at)
    for lane in range(lanes - 1, -1, -1):
        at -= 2
        out[at] = uint16(states[lane] & uint32(0xFFFF))
        out[at + 1] = uint16(states[lane] >> uint32(16))
    return at, escaped


@inline_jit
def _put_low_bits(states, lane, code, shift, out, at):
    """Encode the low bits of a code with equal probabilities; return the position of the words."""
    state = int64(states[lane])
    if state >> (32 - shift):
        at -= 1
        out[at] = uint16(state & 0xFFFF)
        state >>= 16
    states[lane] = uint32(state << shift | code + (1 << shift >> 1) & (1 << shift) - 1)
    return at


@inline_jit
def _put_symbol(states, lane, entry, out, at):
    """Encode a symbol; return the position of the words."""
    state = states[lane]
    frequency = uint32(entry & uint32(4095))
    full = uint32(state >> uint32(20)) >= frequency
    # the word counts only if the state is too large for the symbol
    out[at - 1] = uint16(state & uint32(0xFFFF))
    at -= full
    state = uint32(state >> uint32(16)) if full else state
    # exact: a float64 quotient of integers below 2^32 never rounds up to the next integer
    quotient = uint32(float64(state) / float64(frequency))
    rest = uint32(state - quotient * frequency)
    start = uint32(entry >> uint32(12) & uint32(4095))
    states[lane] = uint32(quotient << uint32(12)) + rest + start
    return at


@inline_jit
def _symbol(code, shift):
    """Return the byte of the symbol of a code: of the multiple of 2^shift that is nearest to it."""
    value = code + (1 << shift >> 1) >> shift
    return min(max(value, -128), 128) & 0xFF


@jit
def count_symbols(codes_AN, quantizer_AN, shift_K, row_class_A, col_class_N, count_KS):
    """Count the codes of every key by symbol.

    Args:
        codes_AN: codes, int32.
        quantizer_AN: as for `encode_chunk`.
        shift_K: number of low bits of every key, uint8.
        row_class_A, col_class_N: classes of the rows and columns, int64.
        count_KS: int64; the counts are added to it.
    """
    rows, columns = codes_AN.shape
    trellis = quantizer_AN.shape[1] > 0
    for row in range(rows):
        for column in range(columns):
            key = row_class_A[row] + col_class_N[column]
            if trellis:
                key += quantizer_AN[row, column]
            count_KS[key, _symbol(int64(codes_AN[row, column]), int64(shift_K[key]))] += 1
