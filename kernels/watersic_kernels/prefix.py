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
from watersic_kernels.layers import (
    Layer,
    _layer,
    _number,
    _store_sums,
    is_path,
    layers_of,
    vector_product,
)
from watersic_kernels.outliers import _add_outliers, decode_outliers
from watersic_kernels.paths import quantizers, value_of
from watersic_kernels.product import GEMV_TOKENS, TILE, _of_layer
from watersic_kernels.scratch import Decode, scratch_dtype, scratch_gradient, scratch_product
from watersic_kernels.streams import (
    _ahead,
    _first,
    _pair,
    _prefetch,
    _second,
    _streams,
    _table,
    _two,
)

#: Words after the last stream.
PADDING = 18


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
    folded x are rounded to bfloat16 if x is bfloat16, and to TF32 if x is float16.  Reference:
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
    y_MA = x_MN.new_empty(len(x_MN), len(row_scale_A))
    prefix_linears(x_MN, [(layout, row_scale_A, col_scale_N)], y_MA, tables_TW=tables_TW)
    return y_MA


@on_device_of_tensors
def prefix_linears(
    x_MN: Tensor,
    weights: Sequence[tuple[Sequence[Tensor], Tensor, Tensor]],
    y_MA: Tensor,
    *,
    tables_TW: Tensor,
) -> None:
    """Write the products of x with several weights side by side into `y_MA`, as `prefix_linear`.

    Up to `GEMV_TOKENS` tokens, weights with as many segments, and bands of as many rows, are
    multiplied in one launch.

    Args:
        x_MN: input.
        weights: layout, row scales and column scales of every weight; all with a trellis, or none.
        y_MA: receives the outputs, in the dtype of x; contiguous in its rows.
        tables_TW: entries of the symbol tables.

    Raises:
        ValueError: as for `prefix_linear`.
    """
    for layout, *_ in weights:
        _check(layout, tables_TW)
    if y_MA.numel() == 0:
        return
    for layers in layers_of(x_MN, weights, y_MA):
        if len(x_MN) <= GEMV_TOKENS and not is_path(layers[0].layout):
            _multiply_vectors(x_MN, layers, tables_TW)
        else:
            for layer in layers:
                scratch_product(_decoder(layer.layout, x_MN.dtype, tables_TW), x_MN, layer)


@on_device_of_tensors
def prefix_gradient(
    grad_MA: Tensor,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    *,
    tables_TW: Tensor,
) -> Tensor:
    """Return ``grad @ W``, M x N: the gradient of `prefix_linear` in x.

    The codes are decoded once, into scratch memory.  They and the scaled gradient are rounded to
    bfloat16 if the gradient is bfloat16, and to TF32 if it is float16.  Reference:
    `watersic_hf.nn.ops.coded_linear_backward`.

    Args:
        grad_MA: gradient of the outputs; the other arguments are those of `prefix_linear`.
        layout: the tensors of `watersic_hf.nn.prefix.PrefixCodes`.
        row_scale_A: row scales.
        col_scale_N: column scales.
        tables_TW: entries of the symbol tables.

    Raises:
        ValueError: as for `prefix_linear`.
    """
    _check(layout, tables_TW)
    if grad_MA.numel() == 0:
        return grad_MA.new_zeros(len(grad_MA), len(col_scale_N))
    grad_MN = grad_MA.new_empty(len(grad_MA), len(col_scale_N))
    layer = Layer(layout, row_scale_A, col_scale_N, grad_MN)
    scratch_gradient(_decoder(layout, grad_MA.dtype, tables_TW), grad_MA, layer)
    return grad_MN


def _check(layout: Sequence[Tensor], tables_TW: Tensor) -> None:
    """Refuse tables and words that the kernels cannot read."""
    words_G, entries = layout[0], tables_TW.shape[1]
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


def _sizes(layout: Sequence[Tensor]) -> tuple[int, int]:
    """Return the tiles of a band, and those of a segment."""
    tiles, segments = layout[4].shape[1], layout[1].shape[1]
    return tiles, triton.cdiv(tiles, segments)


def _multiply_vectors(x_MN: Tensor, layers: Sequence[Layer], tables_TW: Tensor) -> None:
    """Multiply at most `GEMV_TOKENS` tokens with layers of the same kind."""
    layout, (tables, entries) = layers[0].layout, tables_TW.shape
    vector_product(
        _gemv_kernel,
        x_MN,
        layers,
        layout[1].shape[1],
        [(*layer.layout[:5], *layer.layout[-3:]) for layer in layers],
        [(len(layer.layout[0]), len(layer.layout[-3])) for layer in layers],
        tables_TW,
        *_sizes(layout),
        tables - 1,
        BAND=layers[0].band,
        WINDOW=entries.bit_length() - 1,
        # an instruction of NVIDIA's, which Triton's interpreter does not know either
        PREFETCH=x_MN.is_cuda and torch.version.hip is None,
    )


def _decoder(layout: Sequence[Tensor], dtype: torch.dtype, tables_TW: Tensor) -> Decode:
    """Return the function that decodes some bands, for an x of `dtype`."""
    (*streams, state_BT3), outliers = layout[:-5], layout[-3:]
    words_G, bits_BSr = layout[0], layout[3]
    tables, entries = tables_TW.shape
    segments, band = bits_BSr.shape[1:]
    tiles, tiles_per_segment = _sizes(layout)
    sizes = (tiles, tiles_per_segment, len(words_G), tables - 1)
    constants = {"BAND": band, "WINDOW": entries.bit_length() - 1}

    def decode(start: int, count: int) -> Tensor:
        codes_CR = words_G.new_empty(tiles * TILE, count * band, dtype=scratch_dtype(dtype))
        _decode_kernel[(count, segments)](
            *streams, tables_TW, codes_CR, start, *sizes, **constants, num_warps=1
        )
        if is_path(layout):
            _values_kernel[(count, tiles)](state_BT3, codes_CR, start, BAND=band)
        decode_outliers(outliers, codes_CR.T, start, band)
        return codes_CR

    return decode


@triton.jit(do_not_specialize=["tiles", "tiles_per_segment", "last_table"])
def _gemv_kernel(
    folded_LCM,
    words_G,
    first_BS,
    shortest_BS,
    bits_BSr,
    tiles_BT,
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    order_R,
    scale_A,
    y_MA,
    sums_SMR,
    arrived_B,
    first_band,
    outputs,
    words,
    entries,
    tables_TW,
    tiles,
    tiles_per_segment,
    last_table,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    l = _layer(first_band, tl.program_id(0))
    b = tl.program_id(0) - _number(first_band, l)
    s = tl.program_id(1)
    m = tl.arange(0, TOKENS)
    folded_CM = folded_LCM + l * (tiles * (32 * TOKENS))
    tiles_BT = _of_layer(tiles_BT, l)
    first_tile = s * tiles_per_segment
    last_tile = tl.minimum(first_tile + tiles_per_segment, tiles)
    block, at, limit = _streams(
        _of_layer(words_G, l),
        _of_layer(first_BS, l),
        _of_layer(shortest_BS, l),
        _of_layer(bits_BSr, l),
        b,
        tl.num_programs(1),
        s,
        _number(words, l),
        BAND,
    )
    if PREFETCH:
        _prefetch(block, limit, BAND)
    sums = _add_outliers(
        tl.zeros((TOKENS, BAND), tl.float32),
        folded_CM,
        _of_layer(outliers_O, l),
        _of_layer(outlier_first_BK, l),
        _of_layer(outlier_count_BKr, l),
        b,
        first_tile,
        last_tile,
        m,
        TOKENS,
        tiles * 32,
        _number(entries, l),
        BAND,
        4 if TOKENS <= 2 else 1,
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
    _store_sums(
        sums,
        sums_SMR,
        arrived_B,
        _of_layer(order_R, l),
        _of_layer(scale_A, l),
        _of_layer(y_MA, l),
        _number(outputs, l),
        b,
        TOKENS,
        BAND,
    )


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
    code = tl.load(address).to(tl.float32).to(tl.int32)
    # one column per word, in its lowest bit: the state's bits of other columns are cut off
    tile = (start + b) * tl.num_programs(1) + t
    quantizer = quantizers((code & 1) << j, state_BT3 + tile * 3, r, 1)
    value = value_of(code, (quantizer >> j) & 1).to(tl.float32)
    tl.store(address, value.to(codes_CR.dtype.element_ty))
