"""Products with weights whose codes are stored in tiles of fixed width.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), and those of the layout,
        which `watersic_hf.nn.packing.PackedCodes` defines: B = bands of rows, T = tiles of a band,
        R, C = rows and columns of all tiles, G = words, O = outlier entries, S = splits of the
        columns.

The kernels read nothing outside the tensors of the layout, whatever these tensors contain.
"""

from collections.abc import Sequence

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
from watersic_kernels.outliers import _add_outliers
from watersic_kernels.paths import _add_path, as_float, quantizers
from watersic_kernels.product import GEMV_TOKENS, _of_layer
from watersic_kernels.scratch import scratch_gradient, scratch_product
from watersic_kernels.tiles import GEMM_TOKENS, _locate, decoder, multiply_tiles

#: The exponent bits of a float32.
EXPONENTS = 0xFF << 23

#: Number of programs that keeps a GPU busy; the columns are split until there are as many.
PROGRAMS = 4096


def packed_linear(
    x_MN: Tensor, layout: Sequence[Tensor], row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Up to `GEMV_TOKENS` tokens, products and sums are float32.  For more tokens, codes and the
    folded x are rounded to bfloat16 if x is bfloat16, and to TF32 if x is float16.  Sums are
    float32 and always in the same order.  Reference: `watersic_hf.nn.ops.coded_linear`.

    Args:
        x_MN: input, of a floating-point dtype, any strides.
        layout: the tensors of `watersic_hf.nn.packing.PackedCodes`, in the order of its fields.
        row_scale_A: row scales.
        col_scale_N: column scales.
    """
    y_MA = x_MN.new_empty(len(x_MN), len(row_scale_A))
    packed_linears(x_MN, [(layout, row_scale_A, col_scale_N)], y_MA)
    return y_MA


@on_device_of_tensors
def packed_linears(
    x_MN: Tensor, weights: Sequence[tuple[Sequence[Tensor], Tensor, Tensor]], y_MA: Tensor
) -> None:
    """Write the products of x with several weights side by side into `y_MA`, as `packed_linear`.

    Up to `GEMV_TOKENS` tokens, weights whose tiles have as many rows are multiplied in one launch.

    Args:
        x_MN: input.
        weights: layout, row scales and column scales of every weight.
        y_MA: receives the outputs, in the dtype of x; contiguous in its rows.
    """
    if y_MA.numel() == 0:
        return
    for layers in layers_of(x_MN, weights, y_MA):
        if len(x_MN) <= GEMV_TOKENS:
            _multiply_vectors(x_MN, layers)
        elif len(x_MN) <= GEMM_TOKENS:
            multiply_tiles(x_MN, *layers)
        else:
            for layer in layers:
                scratch_product(decoder(layer.layout, x_MN.dtype), x_MN, layer)


def _multiply_vectors(x_MN: Tensor, layers: Sequence[Layer]) -> None:
    """Multiply at most `GEMV_TOKENS` tokens with layers of the same kind."""
    tiles, band = layers[0].layout[1].shape[1], layers[0].band
    tiles_per_split = triton.cdiv(tiles, max(1, PROGRAMS // sum(layer.bands for layer in layers)))
    vector_product(
        _gemv_kernel,
        x_MN,
        layers,
        triton.cdiv(tiles, tiles_per_split),
        [(*layer.layout[:3], *layer.layout[-3:]) for layer in layers],
        [(len(layer.layout[0]) // band, len(layer.layout[-3])) for layer in layers],
        tiles,
        tiles_per_split,
        EXPONENTS,
        BAND=band,
        TRELLIS=is_path(layers[0].layout),
    )


@on_device_of_tensors
def packed_gradient(
    grad_MA: Tensor, layout: Sequence[Tensor], row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``grad @ W``, M x N: the gradient of `packed_linear` in x.

    The codes are decoded once, into scratch memory.  They and the scaled gradient are rounded to
    bfloat16 if the gradient is bfloat16, and to TF32 if it is float16.  Reference:
    `watersic_hf.nn.ops.coded_linear_backward`.

    Args:
        grad_MA: gradient of the outputs; the other arguments are those of `packed_linear`.
        layout: the tensors of `watersic_hf.nn.packing.PackedCodes`.
        row_scale_A: row scales.
        col_scale_N: column scales.
    """
    if grad_MA.numel() == 0:
        return grad_MA.new_zeros(len(grad_MA), len(col_scale_N))
    grad_MN = grad_MA.new_empty(len(grad_MA), len(col_scale_N))
    decode = decoder(layout, grad_MA.dtype)
    scratch_gradient(decode, grad_MA, Layer(layout, row_scale_A, col_scale_N, grad_MN))
    return grad_MN


@triton.jit(do_not_specialize=["tiles", "tiles_per_split"])
def _gemv_kernel(
    folded_LCM,
    words_G,
    tiles_BT,
    state_BT3,
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
    slots,
    entries,
    tiles,
    tiles_per_split,
    exponents,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    TRELLIS: tl.constexpr,
):
    # each lane has rows of its own; all lanes advance through the columns in lockstep
    l = _layer(first_band, tl.program_id(0))
    b = tl.program_id(0) - _number(first_band, l)
    s = tl.program_id(1)
    r = tl.arange(0, BAND)
    folded_CM = folded_LCM + l * (tiles * (32 * TOKENS))
    words_G = _of_layer(words_G, l) + r[None, :]
    tiles_BT = _of_layer(tiles_BT, l)
    first_tile = s * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    sums = _add_outliers(
        tl.zeros((TOKENS, BAND), tl.float32),
        folded_CM,
        _of_layer(outliers_O, l),
        _of_layer(outlier_first_BK, l),
        _of_layer(outlier_count_BKr, l),
        b,
        first_tile,
        last_tile,
        tl.arange(0, TOKENS),
        TOKENS,
        tiles * 32,
        _number(entries, l),
        BAND,
        4 if TOKENS <= 2 else 1,
    )
    for t in range(first_tile, last_tile):
        first, width = _locate(tiles_BT + b * tiles + t, _number(slots, l))
        words = words_G + first.to(tl.int64) * BAND
        x = folded_CM + t * (32 * TOKENS)
        if TRELLIS:
            parity = tl.load(words, r[None, :] * 0 < width, other=0)
            state = _of_layer(state_BT3, l) + (b * tiles + t) * 3
            quantizer = quantizers(parity, state, r[None, :], 1)
        for WIDTH in tl.static_range(1, 9):
            if width == WIDTH:
                if TRELLIS:
                    sums = _add_path(
                        sums, x, words, parity, quantizer, exponents, WIDTH, BAND, TOKENS
                    )
                else:
                    sums = _add_tile(sums, x, words, exponents, WIDTH, BAND, TOKENS)
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
def _add_tile(
    sums, x, words, exponents, WIDTH: tl.constexpr, BAND: tl.constexpr, TOKENS: tl.constexpr
):
    # sums[m, r] += code[r, j] * x[j, m].  `exponents` has all exponent bits set, for `as_float`; as
    # the compiler does not know its value, it sets the exponent once per word, not once per code
    MASK: tl.constexpr = (1 << WIDTH) - 1
    HALF: tl.constexpr = (1 << WIDTH) // 2
    before = tl.zeros((1, BAND), tl.uint32)
    for k in tl.static_range(WIDTH):
        word = tl.load(words + k * BAND).to(tl.uint32, bitcast=True)
        low = word | exponents
        high = (word >> 16) | exponents
        for j in tl.static_range(32):
            if j * WIDTH + WIDTH > 32 * k and j * WIDTH + WIDTH <= 32 * k + 32:
                if j * WIDTH < 32 * k:
                    # the code begins in the previous word
                    both = (before >> (32 + j * WIDTH - 32 * k)) | (word << (32 * k - j * WIDTH))
                    code = as_float(both | exponents, 0, MASK, HALF)
                elif j * WIDTH - 32 * k + WIDTH <= 23:
                    code = as_float(low, j * WIDTH - 32 * k, MASK, HALF)
                else:
                    code = as_float(high, j * WIDTH - 32 * k - 16, MASK, HALF)
                if TOKENS == 1:
                    sums += tl.load(x + j) * code
                else:
                    m = tl.arange(0, TOKENS)[:, None]
                    sums += tl.load(x + j * TOKENS + m) * code
        before = word
    return sums
