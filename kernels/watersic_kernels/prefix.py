"""Products with weights whose codes are prefix-coded.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), and those of the layout,
        which `watersic_hf.nn.prefix.PrefixCodes` defines: B = bands of rows, S = segments of a
        band, T = tiles of a band, R, C = rows and columns of all tiles, r = rows of a band,
        G = words, O = outlier entries; TW = the entries of the symbol tables.

Each lane decodes the stream of one row of a segment, and all lanes of a band advance through the
columns in lockstep, two codes per look-up.  Whatever the streams contain, a lane reads only words
of the layer: within a tile it advances by at most `PADDING` words, and before every tile it is set
back if fewer than that are ahead.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.launch import on_device_of_tensors
from watersic_kernels.paths import quantizers, value_of
from watersic_kernels.product import (
    GEMV_TOKENS,
    TILE,
    _add_outliers,
    _decode_outliers,
    finish,
    fold,
    scratch_dtype,
    through_scratch,
)

#: Words after the last stream.
PADDING = 18

#: Upper bound on the bits of all streams of a block together.
BLOCK_BITS = tl.constexpr(1 << 30)


@on_device_of_tensors
def prefix_linear(
    x_MN: Tensor,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    *,
    tables_TW: Tensor,
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Up to `GEMV_TOKENS` tokens, products and sums are float32 and always in the same order.  For
    more tokens, and for a trellis, the codes are decoded into scratch memory, and codes and the
    folded x are rounded to bfloat16 if x is bfloat16.  Reference:
    `watersic_hf.nn.ops.coded_linear`.

    Args:
        x_MN: input, of a floating-point dtype, any strides.
        layout: the tensors of `watersic_hf.nn.prefix.PrefixCodes`, in the order of its fields.
        row_scale_A: row scales.
        col_scale_N: column scales.
        tables_TW: entries of the symbol tables, of `watersic_hf.nn.prefix_tables.PrefixTables`.

    Raises:
        ValueError: the tables are not aligned, or the words lack their padding.
    """
    *streams, state_BT3, row_order_R, column_order_C, outliers_O, first_BK, count_BKr = layout
    trellis = state_BT3.shape[-1] > 0
    words_G, _, _, bits_BSr, tiles_BT = streams
    tables, entries = tables_TW.shape
    if tables_TW.data_ptr() % (4 * entries) or not tables_TW.is_contiguous():
        raise ValueError(
            f"prefix_linear: the tables begin at address {tables_TW.data_ptr():#x}, but must be "
            f"contiguous and begin at a multiple of {4 * entries} bytes"
        )
    if len(words_G) < PADDING:
        raise ValueError(
            f"prefix_linear: the layout has {len(words_G)} words, but needs at least {PADDING}, "
            f"which are padding"
        )
    M, A = len(x_MN), len(row_scale_A)
    y_MA = x_MN.new_empty(M, A)
    if y_MA.numel() == 0:
        return y_MA
    bands, segments, band = bits_BSr.shape
    tiles = tiles_BT.shape[1]
    outliers = (outliers_O, first_BK, count_BKr)
    sizes = (tiles, triton.cdiv(tiles, segments), len(words_G), tables - 1)
    window = entries.bit_length() - 1
    if M <= GEMV_TOKENS and not trellis:
        tokens = triton.next_power_of_2(M)
        folded_CM = fold(x_MN, column_order_C, col_scale_N, tokens, dtype=torch.float32)
        sums_SMR = x_MN.new_empty(segments, tokens, bands * band, dtype=torch.float32)
        arguments = (folded_CM, *streams, *outliers, tables_TW, sums_SMR, *sizes, len(outliers_O))
        constants: dict[str, int] = {"TOKENS": tokens, "BAND": band, "WINDOW": window}
        _gemv_kernel[(bands, segments)](*arguments, **constants, num_warps=1, enable_fp_fusion=True)
        finish(sums_SMR, row_order_R, row_scale_A, y_MA)
        return y_MA

    def decode(start: int, count: int) -> Tensor:
        codes_CR = x_MN.new_empty(tiles * TILE, count * band, dtype=scratch_dtype(x_MN.dtype))
        _decode_kernel[(count, segments)](
            *streams, tables_TW, codes_CR, start, *sizes, BAND=band, WINDOW=window, num_warps=1
        )
        if trellis:
            _values_kernel[(count, tiles)](state_BT3, codes_CR, start, BAND=band)
        _decode_outliers_kernel[(count, first_BK.shape[1])](
            *outliers, codes_CR, start, tiles * TILE, len(outliers_O), BAND=band, num_warps=1
        )
        return codes_CR

    through_scratch(
        decode, bands, x_MN, row_order_R, column_order_C, row_scale_A, col_scale_N, y_MA
    )
    return y_MA


@triton.jit(do_not_specialize=["tiles", "tiles_per_segment", "words", "last_table", "entries"])
def _gemv_kernel(
    folded_CM,
    words_G,
    first_BS,
    shortest_BS,
    bits_BSr,
    tiles_BT,
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    tables_TW,
    sums_SMR,
    tiles,
    tiles_per_segment,
    words,
    last_table,
    entries,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    WINDOW: tl.constexpr,
):
    b = tl.program_id(0)
    s = tl.program_id(1)
    segments = tl.num_programs(1)
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    first_tile = s * tiles_per_segment
    last_tile = tl.minimum(first_tile + tiles_per_segment, tiles)
    sums = _add_outliers(
        sums,
        folded_CM,
        outliers_O,
        outlier_first_BK,
        outlier_count_BKr,
        b,
        first_tile,
        last_tile,
        m,
        TOKENS,
        tiles * 32,
        entries,
        BAND,
        4 if TOKENS <= 2 else 1,
    )
    block, at, limit = _streams(
        words_G, first_BS, shortest_BS, bits_BSr, b, segments, s, words, BAND
    )
    w0, w1, w2 = _ahead(block, at)
    for t in range(first_tile, last_tile):
        at = tl.minimum(at, limit)
        table, shift = _table(tiles_BT + b * tiles + t, tables_TW, last_table, WINDOW)
        x = folded_CM + t * (32 * TOKENS)
        if shift == 0:
            sums, at, w0, w1, w2 = _add_tile(sums, x, table, block, at, w0, w1, w2, WINDOW, TOKENS)
        else:
            for j in range(0, 32, 2):
                a, c, at, w0, w1, w2 = _pair(table, shift, block, at, w0, w1, w2, WINDOW)
                sums += tl.load(x + j * TOKENS + m)[:, None] * a
                sums += tl.load(x + (j + 1) * TOKENS + m)[:, None] * c
    rows = tl.num_programs(0) * BAND
    out = sums_SMR + (s * TOKENS + m)[:, None].to(tl.int64) * rows + b * BAND + r[None, :]
    tl.store(out, sums)


@triton.jit
def _add_tile(sums, x, table, block, at, w0, w1, w2, WINDOW: tl.constexpr, TOKENS: tl.constexpr):
    # sums[m, r] += code[r, j] * x[j, m], for codes without low bits, four columns at a time
    for j in tl.static_range(0, 32, 4):
        e0, e1, at, w0, w1, w2 = _two(table, block, at, w0, w1, w2, WINDOW)
        if TOKENS == 1:
            sums += tl.load(x + j) * _first(e0)
            sums += tl.load(x + j + 1) * _second(e0)
            sums += tl.load(x + j + 2) * _first(e1)
            sums += tl.load(x + j + 3) * _second(e1)
        else:
            m = tl.arange(0, TOKENS)[:, None]
            sums += tl.load(x + j * TOKENS + m) * _first(e0)
            sums += tl.load(x + (j + 1) * TOKENS + m) * _second(e0)
            sums += tl.load(x + (j + 2) * TOKENS + m) * _first(e1)
            sums += tl.load(x + (j + 3) * TOKENS + m) * _second(e1)
    return sums, at, w0, w1, w2


@triton.jit(do_not_specialize=["start", "tiles", "tiles_per_segment", "words", "last_table"])
def _decode_kernel(
    words_G,
    first_BS,
    shortest_BS,
    bits_BSr,
    tiles_BT,
    tables_TW,
    codes_CR,
    start,
    tiles,
    tiles_per_segment,
    words,
    last_table,
    BAND: tl.constexpr,
    WINDOW: tl.constexpr,
):
    b = start + tl.program_id(0)
    s = tl.program_id(1)
    rows = tl.num_programs(0) * BAND
    out = codes_CR + tl.program_id(0) * BAND + tl.arange(0, BAND)[None, :]
    out += (s * tiles_per_segment).to(tl.int64) * 32 * rows
    block, at, limit = _streams(
        words_G, first_BS, shortest_BS, bits_BSr, b, tl.num_programs(1), s, words, BAND
    )
    w0, w1, w2 = _ahead(block, at)
    for t in range(s * tiles_per_segment, tl.minimum((s + 1) * tiles_per_segment, tiles)):
        at = tl.minimum(at, limit)
        table, shift = _table(tiles_BT + b * tiles + t, tables_TW, last_table, WINDOW)
        for _ in range(16):
            a, c, at, w0, w1, w2 = _pair(table, shift, block, at, w0, w1, w2, WINDOW)
            tl.store(out, a.to(codes_CR.dtype.element_ty))
            tl.store(out + rows, c.to(codes_CR.dtype.element_ty))
            out += 2 * rows


@triton.jit(do_not_specialize=["start"])
def _values_kernel(state_BT3, codes_CR, start, BAND: tl.constexpr):
    # replaces the codes of a tile of a trellis in scratch memory by its values
    b = tl.program_id(0)
    t = tl.program_id(1)
    r = tl.arange(0, BAND)[None, :]
    j = tl.arange(0, 32)[:, None]
    rows = tl.num_programs(0) * BAND
    address = codes_CR + (t * 32 + j).to(tl.int64) * rows + b * BAND + r
    code = tl.load(address).to(tl.int32)
    # one column per word, in its lowest bit: the state's bits of other columns are cut off
    tile = (start + b) * tl.num_programs(1) + t
    quantizer = quantizers((code & 1) << j, state_BT3 + tile * 3, r, 1)
    value = value_of(code, (quantizer >> j) & 1)
    tl.store(address, value.to(codes_CR.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "columns", "entries"])
def _decode_outliers_kernel(
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    codes_CR,
    start,
    columns,
    entries,
    BAND: tl.constexpr,
):
    b = tl.program_id(0)
    rows = tl.num_programs(0) * BAND
    _decode_outliers(
        codes_CR + b * BAND + tl.arange(0, BAND),
        outliers_O,
        outlier_first_BK,
        outlier_count_BKr,
        start + b,
        tl.program_id(1),
        rows,
        columns,
        entries,
        BAND,
    )


@triton.jit
def _streams(words_G, first_BS, shortest_BS, bits_BSr, b, segments, s, words, BAND: tl.constexpr):
    # the first word of a block, the bits in it at which the streams of its rows begin, two bits
    # early, and the last bit at which a tile may begin
    n = b * segments + s
    first = tl.minimum(tl.maximum(tl.load(first_BS + n), 0), words - 18)
    shortest = tl.load(shortest_BS + n)
    bits = tl.load(bits_BSr + n.to(tl.int64) * BAND + tl.arange(0, BAND)).to(tl.int32)
    bits = (shortest & 0xFFFF) + (bits << ((shortest >> 16) & 15))
    limit = tl.minimum(words - 18 - first, BLOCK_BITS // 32) * 32
    at = tl.minimum(tl.cumsum(bits) - bits, limit)
    return words_G + first.to(tl.int64), at[None, :], limit


@triton.jit
def _ahead(block, at):
    word = block + (at >> 5)
    w0 = tl.load(word).to(tl.uint32, bitcast=True)
    w1 = tl.load(word + 1).to(tl.uint32, bitcast=True)
    w2 = tl.load(word + 2).to(tl.uint32, bitcast=True)
    return w0, w1, w2


@triton.jit
def _table(tile, tables_TW, last_table, WINDOW: tl.constexpr):
    # a table's address as an integer; it is a multiple of the table's size, so that one `or` with
    # an offset gives the address of an entry
    tile = tl.load(tile).to(tl.int32)
    table = tables_TW + tl.minimum(tile & 255, last_table) * (1 << WINDOW)
    return table.to(tl.uint64, bitcast=True), tl.minimum((tile >> 8) & 255, 8)


@triton.jit
def _two(table, block, at, w0, w1, w2, WINDOW: tl.constexpr):
    # two look-ups, of at most WINDOW bits each, in one window of 32 bits
    bits = _window(w0, w1, at)
    e0 = _entry(table, bits, WINDOW)
    e1 = _entry(table, bits >> (e0 & 15), WINDOW)
    after = at + (e0 & 15).to(tl.int32) + (e1 & 15).to(tl.int32)
    w0, w1, w2 = _refill(block, at, after, w0, w1, w2)
    return e0, e1, after, w0, w1, w2


@triton.jit
def _pair(table, shift, block, at, w0, w1, w2, WINDOW: tl.constexpr):
    # one look-up, followed by the low bits of both codes
    bits = _window(w0, w1, at)
    e = _entry(table, bits, WINDOW)
    n = e & 15
    low = bits >> (n + 2)
    ones = ((1 << shift) - 1).to(tl.uint32)
    scale = (1 << shift).to(tl.float32)
    half = ((1 << shift) >> 1).to(tl.float32)
    a = _first(e) * scale + (low & ones).to(tl.float32) - half
    c = _second(e) * scale + ((low >> shift.to(tl.uint32)) & ones).to(tl.float32) - half
    after = at + n.to(tl.int32) + 2 * shift
    w0, w1, w2 = _refill(block, at, after, w0, w1, w2)
    return a, c, after, w0, w1, w2


@triton.jit
def _window(w0, w1, at):
    # the 32 bits from bit `at` on, the first two of which precede the code word; a funnel shift
    s = (at & 31).to(tl.uint32)
    return (w0 >> s) | ((w1 << 1) << (s ^ 31))


@triton.jit
def _entry(table, bits, WINDOW: tl.constexpr):
    MASK: tl.constexpr = ((1 << WINDOW) - 1) << 2
    address = table | (bits & MASK).to(tl.uint64)
    return tl.load(address.to(tl.pointer_type(tl.int32), bitcast=True)).to(tl.uint32, bitcast=True)


@triton.jit
def _refill(block, at, after, w0, w1, w2):
    # a lane that has advanced into the next word loads a new one, which it needs a word later
    word = after >> 5
    crossed = word != (at >> 5)
    w0 = tl.where(crossed, w1, w0)
    w1 = tl.where(crossed, w2, w1)
    found = tl.load(block + word + 2, crossed, other=w2.to(tl.int32, bitcast=True))
    return w0, w1, found.to(tl.uint32, bitcast=True)


@triton.jit
def _first(e):
    return (e & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _second(e):
    return ((e << 16) & 0xFFF00000).to(tl.float32, bitcast=True)
