"""Decode the entropy-coded payload of a layer, one chunk per call, compiled for CPUs.

Shapes: A x N codes of the matrix as it is stored, K = keys, W = 16-bit words, L = lanes.

`watersic_hf/codec/FORMAT.md` defines the format, and what the words of a chunk are.  All functions
release the interpreter's lock, so that threads work on several chunks at a time.  Whatever the
words contain, nothing outside the arrays is read or written.
"""

import numba
import numpy as np
from numpy import int32, int64

from watersic_kernels.cpu.rans_vectors import (
    copy_lanes,
    decode_lanes,
    decode_low_bits,
    look_up,
    walk_lanes,
    write_square,
)
from watersic_kernels.cpu.vectors import LANES as GROUP

#: Lanes of a chunk.
LANES = 32
#: Smallest state, and the state in which the encoder starts.
STATE_MIN = 1 << 16
#: Columns that are decoded before they are written.
BLOCK = 32

jit = numba.njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
inner_jit = numba.njit(
    cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True
)


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
    stride,
):
    """Decode one chunk into `out`.

    Args:
        words_W: words of the chunk, uint16, at least two per lane, and `LANES` copies of the last
            one, which are read if the chunk is damaged.
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
        start: the row of the output that receives the first row of the chunk; with a trellis, its
            column.
        place_N: the column of the output for each column of the chunk, int64; with a trellis, its
            row.  Places outside the output are left out.
        out: the output, row by row, int32; it has all rows, or with a trellis all columns.
        stride: columns of the output.

    Returns:
        The number of words left, the number of words of the escaped values, and the number of
        lanes that do not end in the state in which the encoder starts.
    """
    rows, columns, count = len(row_class_A), len(col_class_N), len(words_W) - LANES
    lanes = (rows + per_lane - 1) // per_lane
    states, kept = np.empty(LANES, int32), np.empty(LANES, int32)
    keys, path = np.empty(LANES, int32), np.empty(4 * LANES, int32)
    codes = np.empty(BLOCK * LANES, int32)
    for lane in range(LANES):
        words = min(2 * lane, count - 2)
        states[lane] = int64(words_W[words]) | int64(words_W[words + 1]) << 16
    at, end = 2 * lanes, count
    for phase in range(per_lane):
        first = phase * lanes
        active = max(0, min(lanes, rows - first))
        for lane in range(4 * LANES):
            path[lane] = 0
        for lane in range(LANES):
            # lanes without a row decode something, too, and get their states back
            kept[lane] = states[lane]
            keys[lane] = path[lane] = row_class_A[min(first + lane, rows - 1)]
        for left in range(0, columns, BLOCK):
            width = min(BLOCK, columns - left)
            at, end = _decode_columns(
                words_W,
                count,
                page_K,
                pages,
                shift_K,
                first_shifted,
                col_class_N,
                left,
                width,
                active,
                escape_words,
                trellis,
                states,
                keys,
                path,
                codes,
                at,
                end,
            )
            _write(codes, place_N, left, width, trellis, start + first, active, out, stride)
        for lane in range(active, LANES):
            states[lane] = kept[lane]
    moved = 0
    for lane in range(lanes):
        moved += states[lane] != STATE_MIN
    return count - at, count - end, moved


@inner_jit
def _decode_columns(
    words_W,
    count,
    page_K,
    pages,
    shift_K,
    first_shifted,
    col_class_N,
    left,
    width,
    active,
    escape_words,
    trellis,
    states,
    keys,
    path,
    codes,
    at,
    end,
):
    """Decode some columns of the active lanes; return the next positions.

    From the position `count` on, the words are copies of the last one.
    """
    highest = 0
    for lane in range(active):
        highest = max(highest, path[lane] + trellis)
    for i in range(width):
        col_class, to = col_class_N[left + i], i * LANES
        for lane in range(0, active, GROUP):
            look_up(states, keys, lane, page_K, col_class, pages, codes, to + lane)
        # beyond the end, more words are counted than there are
        first = position = min(at, count)
        escaped = int64(0)
        for lane in range(0, active, GROUP):
            mask = (1 << min(GROUP, active - lane)) - 1
            found = decode_lanes(states, lane, codes, to + lane, words_W, position, mask)
            position += found & 0xFF
            escaped |= found >> 8 << lane
        at += position - first
        if highest + col_class >= first_shifted:
            first = position = min(at, count)
            for lane in range(0, active, GROUP):
                mask = (1 << min(GROUP, active - lane)) - 1
                position += decode_low_bits(
                    states,
                    keys,
                    lane,
                    shift_K,
                    col_class,
                    codes,
                    to + lane,
                    words_W,
                    position,
                    mask,
                )
            at += position - first
        if escaped:
            end = _escaped_values(words_W, escape_words, escaped, codes, to, end)
        if trellis:
            for lane in range(0, active, GROUP):
                walk_lanes(path, keys, lane, codes, to + lane)
    return at, end


@inner_jit
def _escaped_values(words_W, escape_words, escaped, codes, to, end):
    """Read the escaped values of some lanes, which are bits; return where the next one ends."""
    for lane in range(LANES):
        if escaped >> lane & 1:
            end -= escape_words
            value = int64(words_W[max(end, 0)])
            if escape_words == 2:
                value |= int64(words_W[max(end + 1, 0)]) << 16
                codes[to + lane] = (value ^ 0x80000000) - 0x80000000
            else:
                codes[to + lane] = (value ^ 0x8000) - 0x8000
    return end


@inner_jit
def _write(codes, place_N, left, width, trellis, start, active, out, stride):
    """Write the codes of some columns of the active lanes."""
    if trellis:
        places, place_step, lane_step = len(out) // stride, stride, 1
    else:
        places, place_step, lane_step = stride, 1, stride
    whole, squares = active // GROUP * GROUP, int64(0)
    if not trellis and _in_order(place_N, left, width, places):
        squares = width // GROUP * GROUP
    # in the order in which the output lies in memory
    for lane in range(0, whole, GROUP):
        for i in range(0, squares, GROUP):
            to = (start + lane) * stride + place_N[left] + i
            write_square(codes, i * LANES + lane, out, to, stride)
    for i in range(width):
        place, done = place_N[left + i], whole if i < squares else 0
        if 0 <= place < places:
            if trellis:
                for lane in range(0, whole, GROUP):
                    copy_lanes(codes, i * LANES + lane, out, place * stride + start + lane)
                done = whole
            for lane in range(done, active):
                out[place * place_step + (start + lane) * lane_step] = codes[i * LANES + lane]


@inner_jit
def _in_order(place_N, left, width, places):
    """Return whether some places are next to each other, and in the output."""
    place = place_N[left]
    found = 0 <= place <= places - width
    for i in range(width):
        found &= place_N[left + i] == place + i
    return found
