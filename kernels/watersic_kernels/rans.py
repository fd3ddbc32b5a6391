"""Decode the entropy-coded payload of a layer: all chunks at once, one warp per chunk.

Shapes: A x N codes, C = chunks, K = keys, W = 16-bit words.

`watersic_hf/codec/FORMAT.md` defines the format, and what the words of a chunk are.  The matrix is
the stored one: for a trellis (rule 2), its rows are the columns of the weight.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.launch import on_device_of_tensors


@on_device_of_tensors
def decode_chunks(
    payload: Sequence[Tensor],
    codes_AN: Tensor,
    *,
    rows_per_lane: int,
    cols_per_chunk: int,
    escape_words: int,
    order_N: Tensor | None = None,
) -> Tensor:
    """Decode all chunks into `codes_AN`; nothing else is written, whatever the chunks contain.

    With `order_N`, rows are paths of a trellis, and `codes_AN` receives values instead of codes.

    Reference: `watersic_hf.codec.decode`.

    Args:
        payload: the tensors of a payload, on the device of `codes_AN`:

            * words_W: int16, the words of all chunks.
            * offsets_C: int64, the first word of every chunk, and at the end the number of words;
              all must be within `words_W`.
            * row_class_A, col_class_N: int32; the sum of any two must be a key, and with a trellis
              also the number after it.
            * table: int32, 4096 entries per key: the symbol, the slot relative to the symbol's
              first, and the frequency, in 8, 12 and 12 bits.
            * shift_K: int32, the number of low bits that follow a symbol of each key.
        codes_AN: int32, any strides; receives the codes.
        rows_per_lane: rows that one lane decodes; this and the following are in the payload's
            header.
        cols_per_chunk: columns of a chunk.
        escape_words: words of an escaped value.
        order_N: for a trellis, the column of `codes_AN` that receives each stored column, int64;
            all must be within `codes_AN`.  Default: the payload holds codes, in their places.

    Returns:
        For every chunk, int32: 1 if it ended in the state and at the word where it must, else 0.
    """
    words_W, offsets_C, *model = payload
    chunks = len(offsets_C) - 1
    good_C = offsets_C.new_empty(chunks, dtype=codes_AN.dtype)
    if chunks:
        trellis = order_N is not None
        # any pointer will do without a trellis: the kernel does not read it
        tensors = (words_W, offsets_C, *model, order_N if trellis else offsets_C, codes_AN, good_C)
        sizes = (*codes_AN.shape, *codes_AN.stride(), rows_per_lane, cols_per_chunk, escape_words)
        _decode_kernel[(chunks,)](*tensors, *sizes, TRELLIS=trellis, num_warps=1)
    return good_C


@triton.jit(
    do_not_specialize=[
        *("A", "N", "stride_row", "stride_column"),
        *("rows_per_lane", "cols_per_chunk", "escape_words"),
    ]
)
def _decode_kernel(
    words_W,
    offsets_C,
    row_class_A,
    col_class_N,
    table,
    shift_K,
    order_N,
    codes_AN,
    good_C,
    A,
    N,
    stride_row,
    stride_column,
    rows_per_lane,
    cols_per_chunk,
    escape_words,
    TRELLIS: tl.constexpr,
):
    chunk = tl.program_id(0)
    lane = tl.arange(0, 32)
    segments = tl.cdiv(N, cols_per_chunk)
    top = chunk // segments * 32 * rows_per_lane
    left = chunk % segments * cols_per_chunk
    height = tl.minimum(32 * rows_per_lane, A - top)
    lanes = tl.cdiv(height, rows_per_lane)
    start = tl.load(offsets_C + chunk)
    stop = tl.load(offsets_C + chunk + 1)

    head = start + 2 * lane
    x = _word(words_W, head, start, stop, lane < lanes)
    x |= _word(words_W, head + 1, start, stop, lane < lanes) << 16
    at = start + 2 * lanes
    end = stop
    for p in range(rows_per_lane):
        row = p * lanes + lane
        active = (lane < lanes) & (row < height)
        row_class = tl.load(row_class_A + top + row, active, other=0)
        out = codes_AN + (top + row).to(tl.int64) * stride_row
        # quantizers of this step and of the two before it; a path begins with quantizer 0
        this = tl.zeros((32,), tl.int32)
        last = tl.zeros((32,), tl.int32)
        earlier = tl.zeros((32,), tl.int32)
        for step in range(tl.minimum(cols_per_chunk, N - left)):
            col = left + step
            key = row_class + tl.load(col_class_N + col)
            slot = (x & 4095).to(tl.int32)
            # without a trellis, `this` stays 0
            entry = tl.load(table + (key + this) * 4096 + slot, active, other=0)
            low_part = ((entry >> 12) & 4095).to(tl.uint32)
            x = tl.where(active, (entry & 4095).to(tl.uint32) * (x >> 12) + low_part, x)
            x, at = _take(x, at, words_W, start, stop, active)
            symbol = entry >> 24
            code = symbol
            shift = tl.load(shift_K + key, active, other=0)
            if tl.max(shift) > 0:
                low = (x & ((1 << shift) - 1).to(tl.uint32)).to(tl.int32)
                x = x >> shift.to(tl.uint32)
                x, at = _take(x, at, words_W, start, stop, active & (shift > 0))
                code = tl.where(shift > 0, (symbol << shift) + low - ((1 << shift) >> 1), symbol)
            escaped = active & (symbol == -128)
            if tl.max(escaped.to(tl.int32)) > 0:
                value_at = end - escape_words * tl.cumsum(escaped.to(tl.int32))
                value = _word(words_W, value_at, start, stop, escaped)
                if escape_words == 2:
                    value |= _word(words_W, value_at + 1, start, stop, escaped) << 16
                else:
                    value = ((value ^ 0x8000) - 0x8000).to(tl.uint32)
                code = tl.where(escaped, value.to(tl.int32, bitcast=True), code)
                end -= escape_words * tl.sum(escaped.to(tl.int32))
            if TRELLIS:
                # 2 k - q sign(k)
                sign = (code > 0).to(tl.int32) - (code < 0).to(tl.int32)
                place = tl.load(order_N + col)
                tl.store(out + place * stride_column, 2 * code - this * sign, active)
                following = last ^ earlier ^ (code & 1)
                earlier = last
                last = this
                this = following
            else:
                tl.store(out + col.to(tl.int64) * stride_column, code, active)
    moved = tl.sum(((x != 1 << 16) & (lane < lanes)).to(tl.int32))
    tl.store(good_C + chunk, ((moved == 0) & (at == end)).to(tl.int32))


@triton.jit
def _take(x, at, words_W, start, stop, active):
    # every lane whose state has become small takes one word, in the order of the lanes
    small = active & (x < 1 << 16)
    count = small.to(tl.int32)
    word = _word(words_W, at + tl.cumsum(count) - count, start, stop, small)
    return tl.where(small, (x << 16) | word, x), at + tl.sum(count)


@triton.jit
def _word(words_W, at, start, stop, wanted):
    # never read outside the chunk, however damaged it is
    word = tl.load(words_W + at, wanted & (at >= start) & (at < stop), other=0)
    return word.to(tl.int32).to(tl.uint32, bitcast=True) & 0xFFFF
