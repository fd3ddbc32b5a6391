"""Encode the entropy-coded payload of a layer, one chunk per call, compiled for CPUs.

Shapes and format are those of `rans.py`.
"""

import numpy as np
from numpy import int32, int64

from watersic_kernels.cpu.codes_vectors import find_entries
from watersic_kernels.cpu.rans import LANES, STATE_MIN, inner_jit, jit
from watersic_kernels.cpu.rans_vectors import encode_lanes, encode_low_bits
from watersic_kernels.cpu.vectors import LANES as GROUP
from watersic_kernels.cpu.vectors import prefetch

#: Columns whose entries are found before they are encoded.
BLOCK = 32


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
    columns,
    per_lane,
    escape_words,
    out,
):
    """Encode one chunk.

    Args:
        codes: codes of a matrix, int32, row by row; column by column with a trellis.
        quantizers: with a trellis, what is added to the keys, uint8; otherwise not read.
        trellis: whether the codes are those of a trellis.
        stride: distance of the rows in `codes`, or of the columns with a trellis.
        top, left: first row and first column of the chunk.
        entries: entries of the symbols, 256 of every key: whether it is escaped, its start and its
            frequency, in 8, 12 and 12 bits, uint32.
        shift_K: number of low bits that follow a symbol of each key, uint8.
        first_shifted: the first key with low bits.
        row_class_A: classes of the rows of the chunk, int32.
        col_class_N: classes of its columns, int32, up to the next multiple of eight columns.
        columns: number of its columns.
        per_lane: rows that one lane holds.
        escape_words: words of an escaped value.
        out: receives the words of the states, symbols and low bits at its end, which are written
            backwards, and the escaped values in reverse coding order at its start; uint16.  It
            must have room for two per lane, two per code, the escaped values, and eight.

    Returns:
        Where the words begin, and the number of words of the escaped values.
    """
    rows = len(row_class_A)
    lanes = (rows + per_lane - 1) // per_lane
    states, kept = np.empty(LANES, int32), np.empty(LANES, int32)
    class_L = np.empty(LANES, int32)
    found, lows = np.empty(BLOCK * LANES, int32), np.empty(BLOCK * LANES, int32)
    for lane in range(LANES):
        states[lane] = STATE_MIN
    for i in range(BLOCK * LANES):
        # a frequency of 0 would be no divisor for lanes without a row
        found[i] = 1
    row_step, col_step = (1, stride) if trellis else (stride, 1)
    # a literal 0 would have another type than later values, and would be compiled for by itself
    end, escaped = len(out), int64(0)
    for phase in range(per_lane - 1, -1, -1):
        first = phase * lanes
        active = max(0, min(lanes, rows - first))
        highest_row = int64(0)
        for lane in range(LANES):
            kept[lane] = states[lane]
            class_L[lane] = row_class_A[min(first + lane, rows - 1)]
            highest_row = max(highest_row, class_L[lane])
        for column in range((columns - 1) // BLOCK * BLOCK, -1, -BLOCK):
            end, escaped = _encode_columns(
                codes,
                quantizers,
                trellis,
                stride,
                (top + first) * row_step + (left + column) * col_step,
                entries,
                shift_K,
                first_shifted,
                class_L,
                highest_row,
                active,
                col_class_N,
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
        out[end] = states[lane] & 0xFFFF
        out[end + 1] = states[lane] >> 16 & 0xFFFF
    return end, escaped


@inner_jit
def _encode_columns(
    codes,
    quantizers,
    trellis,
    stride,
    start,
    entries,
    shift_K,
    first_shifted,
    class_L,
    highest_row,
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
    highest = 0
    for i in range(width):
        highest = max(highest, class_N[column + i])
    shifted = int64(highest_row + highest + trellis >= first_shifted)
    # a line of codes that are next to each other is a column with a trellis, and otherwise a row
    if trellis:
        lines, bases, base, line_step, ahead = width, class_N, column, LANES, BLOCK * stride
        count, classes, first, code_step = active, class_L, 0, 1
    else:
        lines, bases, base, line_step, ahead = active, class_L, 0, 1, BLOCK
        count, classes, first, code_step = width, class_N, column, LANES
    flags = 0
    for line in range(lines):
        at = start + line * stride
        # the codes of the next call: the CPU does not foresee so many lines at a time
        prefetch(codes, at - ahead)
        prefetch(codes, at - ahead + BLOCK // 2)
        for n in range(0, count, GROUP):
            flags |= find_entries(
                codes,
                quantizers,
                at + n,
                count - n,
                int64(trellis),
                bases[base + line],
                classes,
                first + n,
                shift_K,
                shifted,
                entries,
                found,
                lows,
                line * line_step + n * code_step,
                code_step,
            )
    col_step, row_step = (stride, 1) if trellis else (1, stride)
    for i in range(width - 1, -1, -1):
        to, at = i * LANES, start + i * col_step
        if flags:
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
