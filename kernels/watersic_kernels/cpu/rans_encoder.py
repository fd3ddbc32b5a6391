"""Encode the entropy-coded payload of a layer, one chunk per call, compiled for CPUs.

Shapes and format are those of `rans.py`.
"""

import numba
import numpy as np
from numpy import int32, int64, uint16, uint32

from watersic_kernels.cpu.codes_vectors import find_entries
from watersic_kernels.cpu.rans import LANES, STATE_MIN
from watersic_kernels.cpu.rans_vectors import encode_lanes, encode_low_bits
from watersic_kernels.cpu.vectors import LANES as GROUP
from watersic_kernels.cpu.vectors import prefetch

#: Columns whose entries are found before they are encoded.
BLOCK = 32
#: Numbers of 32 bits in a line of memory.
LINE = 16

jit = numba.njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
inner_jit = numba.njit(
    cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True
)


@jit
def encode_chunk(
    codes,
    quantizers,
    trellis,
    stride,
    top,
    left,
    entries,
    shift_K,
    first_shifted,
    row_class_A,
    col_class_N,
    per_lane,
    escape_words,
    out,
):
    """Encode one chunk.

    Args:
        codes: codes of a matrix, int32, row by row; column by column with a trellis.
        quantizers: with a trellis, what is added to the keys, uint8; otherwise it is not read.
        trellis: whether the codes are those of a trellis.
        stride: distance of the rows in `codes`, or of the columns with a trellis.
        top, left: first row and first column of the chunk.
        entries: entries of the symbols, 256 of every key: whether it is escaped, its start and its
            frequency, in 8, 12 and 12 bits, uint32.
        shift_K: number of low bits that follow a symbol of each key, uint8.
        first_shifted: the first key with low bits.
        row_class_A, col_class_N: classes of the rows and columns of the chunk, int64.
        per_lane: rows that one lane holds.
        escape_words: words of an escaped value.
        out: receives the words of the states, symbols and low bits at its end, which are written
            backwards, and the escaped values in reverse coding order at its start; uint16.  It
            must have room for two per lane, two per code, the escaped values, and eight.

    Returns:
        Where the words begin, and the number of words of the escaped values.
    """
    rows, columns = len(row_class_A), len(col_class_N)
    lanes = (rows + per_lane - 1) // per_lane
    states, kept = np.empty(LANES, uint32), np.empty(LANES, uint32)
    for lane in range(LANES):
        states[lane] = STATE_MIN
    class_L = np.zeros(LANES, int32)
    class_N = np.zeros(columns + GROUP, int32)
    for column in range(columns):
        class_N[column] = col_class_N[column]
    # a frequency of 0 would be no divisor for lanes without a row
    found, lows = np.ones(BLOCK * LANES, uint32), np.empty(BLOCK * LANES, uint32)
    row_step, col_step = (1, stride) if trellis else (stride, 1)
    end, escaped = len(out), 0
    for phase in range(per_lane - 1, -1, -1):
        first = phase * lanes
        active = max(0, min(lanes, rows - first))
        for lane in range(LANES):
            kept[lane] = states[lane]
        for lane in range(active):
            class_L[lane] = row_class_A[first + lane]
        for column in range((columns - 1) // BLOCK * BLOCK, -1, -BLOCK):
            end, escaped = _encode_columns(
                codes,
                quantizers,
                trellis,
                row_step,
                col_step,
                (top + first) * row_step + (left + column) * col_step,
                entries,
                shift_K,
                first_shifted,
                class_L,
                active,
                class_N,
                column,
                min(BLOCK, columns - column),
                escape_words,
                states,
                found,
                lows,
                out,
                end,
                escaped,
            )
        for lane in range(active, LANES):
            states[lane] = kept[lane]
    for lane in range(lanes - 1, -1, -1):
        end -= 2
        out[end] = uint16(states[lane] & uint32(0xFFFF))
        out[end + 1] = uint16(states[lane] >> uint32(16))
    return end, escaped


@inner_jit
def _encode_columns(
    codes,
    quantizers,
    trellis,
    row_step,
    col_step,
    start,
    entries,
    shift_K,
    first_shifted,
    class_L,
    active,
    class_N,
    column,
    width,
    escape_words,
    states,
    found,
    lows,
    out,
    end,
    escaped,
):
    """Encode some columns of the active lanes; return the next positions."""
    highest = highest_column = 0
    for lane in range(active):
        highest = max(highest, class_L[lane] + trellis)
    for i in range(width):
        highest_column = max(highest_column, class_N[column + i])
    shifted = int64(highest + highest_column >= first_shifted)
    flags = 0
    if trellis:
        for i in range(width):
            at, base, to = start + i * col_step, class_N[column + i], i * LANES
            for line in range(LANES // LINE):
                prefetch(codes, at - BLOCK * col_step + line * LINE)
            for lane in range(0, active, GROUP):
                flags |= find_entries(
                    codes,
                    quantizers,
                    at + lane,
                    active - lane,
                    1,
                    base,
                    class_L,
                    lane,
                    shift_K,
                    shifted,
                    entries,
                    found,
                    lows,
                    to + lane,
                    1,
                )
    else:
        for lane in range(active):
            at, base = start + lane * row_step, class_L[lane]
            # for the next columns: the CPU does not foresee 32 rows at a time
            for line in range(1, BLOCK // LINE + 1):
                prefetch(codes, at - line * LINE)
            for i in range(0, width, GROUP):
                flags |= find_entries(
                    codes,
                    quantizers,
                    at + i,
                    width - i,
                    0,
                    base,
                    class_N,
                    column + i,
                    shift_K,
                    shifted,
                    entries,
                    found,
                    lows,
                    i * LANES + lane,
                    LANES,
                )
    for i in range(width - 1, -1, -1):
        to = i * LANES
        if flags:
            at = start + i * col_step
            escaped = _put_escaped(
                codes, at, row_step, active, found, to, escape_words, out, escaped
            )
        if shifted:
            for lane in range((active - 1) // GROUP * GROUP, -1, -GROUP):
                mask = (1 << min(GROUP, active - lane)) - 1
                end -= encode_low_bits(states, lane, lows, to + lane, out, end, mask)
        for lane in range((active - 1) // GROUP * GROUP, -1, -GROUP):
            mask = (1 << min(GROUP, active - lane)) - 1
            end -= encode_lanes(states, lane, found, to + lane, out, end, mask)
    return end, escaped


@inner_jit
def _put_escaped(codes, start, row_step, active, found, to, escape_words, out, escaped):
    """Put the escaped values of one column; return the next position."""
    for lane in range(active - 1, -1, -1):
        if found[to + lane] >> 24:
            code = codes[start + lane * row_step]
            out[escaped] = code & 0xFFFF
            if escape_words == 2:
                out[escaped + 1] = code >> 16 & 0xFFFF
            escaped += escape_words
    return escaped
