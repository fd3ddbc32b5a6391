"""Products with weights whose codes are stored in tiles of fixed width.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), and those of the layout,
        which `watersic_hf.nn.packing.PackedCodes` defines: B = bands of rows, T = tiles of a band,
        R, C = rows and columns of all tiles, G = words, O = outlier entries, S = splits of the
        columns.

The kernels read nothing outside the tensors of the layout, whatever these tensors contain.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.launch import on_device_of_tensors
from watersic_kernels.paths import _add_path, as_float, quantizers, value_of
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

#: Largest number of tokens for which the weight is decoded tile by tile inside a matrix product;
#: for more tokens it is decoded once, into scratch memory.
GEMM_TOKENS = 64

#: The exponent bits of a float32.
EXPONENTS = 0xFF << 23

#: Number of programs that keeps a GPU busy; the columns are split until there are as many.  The
#: second is for products of a matrix by a matrix, whose programs have four warps.
PROGRAMS, GEMM_PROGRAMS = 4096, 512


@on_device_of_tensors
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
    M, A = len(x_MN), len(row_scale_A)
    y_MA = x_MN.new_empty(M, A)
    if y_MA.numel() == 0:
        return y_MA
    words_G, tiles_BT, state_BT3, row_order_R, column_order_C, *outliers = layout
    trellis = state_BT3.shape[-1] > 0
    bands, tiles = tiles_BT.shape
    rows = len(row_order_R)
    band = rows // bands
    slots = len(words_G) // band
    tensors = (words_G, tiles_BT, state_BT3, *outliers)
    sizes = (tiles, slots, len(outliers[0]))
    dtype = scratch_dtype(x_MN.dtype)
    if M <= GEMV_TOKENS:
        tokens = triton.next_power_of_2(M)
        folded_CM = fold(x_MN, column_order_C, col_scale_N, tokens, dtype=torch.float32)
        tiles_per_split = triton.cdiv(tiles, max(1, PROGRAMS // bands))
        splits = triton.cdiv(tiles, tiles_per_split)
        sums_SMR = x_MN.new_empty(splits, tokens, rows, dtype=torch.float32)
        arguments = (folded_CM, *tensors, sums_SMR, *sizes, tiles_per_split, EXPONENTS)
        _gemv_kernel[(bands, splits)](
            *arguments,
            TOKENS=tokens,
            BAND=band,
            TRELLIS=trellis,
            num_warps=1,
            enable_fp_fusion=True,
        )
        finish(sums_SMR, row_order_R, row_scale_A, y_MA)
    elif M <= GEMM_TOKENS:
        block = 16 if M <= 16 else 32
        tokens = triton.cdiv(M, block) * block
        tf32 = x_MN.dtype == torch.float16
        folded_CM = fold(x_MN, column_order_C, col_scale_N, tokens, dtype=dtype, tf32=tf32)
        tiles_per_split = triton.cdiv(tiles, max(1, GEMM_PROGRAMS // (bands * (tokens // block))))
        splits = triton.cdiv(tiles, tiles_per_split)
        sums_SMR = x_MN.new_empty(splits, tokens, rows, dtype=torch.float32)
        arguments = (folded_CM, *tensors, sums_SMR, *sizes, tokens, tiles_per_split)
        precision = "tf32" if tf32 else "ieee"
        _gemm_kernel[(bands, tokens // block, splits)](
            *arguments, BLOCK_M=block, BAND=band, PRECISION=precision, TRELLIS=trellis
        )
        finish(sums_SMR, row_order_R, row_scale_A, y_MA)
    else:

        def decode(start: int, count: int) -> Tensor:
            codes_RC = x_MN.new_empty(count * band, tiles * TILE, dtype=dtype)
            arguments = (words_G, tiles_BT, state_BT3, codes_RC, start, tiles, slots)
            _decode_kernel[(count, tiles)](*arguments, BAND=band, TRELLIS=trellis)
            groups = outliers[1].shape[1]
            arguments = (*outliers, codes_RC, start, tiles * TILE, len(outliers[0]))
            _decode_outliers_kernel[(count, groups)](*arguments, BAND=band, num_warps=1)
            return codes_RC.T

        through_scratch(
            decode, bands, x_MN, row_order_R, column_order_C, row_scale_A, col_scale_N, y_MA
        )
    return y_MA


@triton.jit(do_not_specialize=["tiles", "slots", "entries", "tiles_per_split"])
def _gemv_kernel(
    folded_CM,
    words_G,
    tiles_BT,
    state_BT3,
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    sums_SMR,
    tiles,
    slots,
    entries,
    tiles_per_split,
    exponents,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
    TRELLIS: tl.constexpr,
):
    # each lane has rows of its own; all lanes advance through the columns in lockstep
    b = tl.program_id(0)
    s = tl.program_id(1)
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    first_tile = s * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
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
    for t in range(first_tile, last_tile):
        first, width = _locate(tiles_BT + b * tiles + t, slots)
        words = words_G + first.to(tl.int64) * BAND + r[None, :]
        x = folded_CM + t * (32 * TOKENS)
        if TRELLIS:
            parity = tl.load(words, r[None, :] * 0 < width, other=0)
            quantizer = quantizers(parity, state_BT3 + (b * tiles + t) * 3, r[None, :], 1)
        for WIDTH in tl.static_range(1, 9):
            if width == WIDTH:
                if TRELLIS:
                    sums = _add_path(
                        sums, x, words, parity, quantizer, exponents, WIDTH, BAND, TOKENS
                    )
                else:
                    sums = _add_tile(sums, x, words, exponents, WIDTH, BAND, TOKENS)
    rows = tl.num_programs(0) * BAND
    out = sums_SMR + (s * TOKENS + m)[:, None].to(tl.int64) * rows + b * BAND + r[None, :]
    tl.store(out, sums)


@triton.jit
def _locate(tile, slots):
    # position of a tile's words, in units of `BAND` words, and its width; 0, 0 if out of bounds
    tile = tl.load(tile)
    first = tile >> 4
    width = tile & 15
    inside = (first >= 0) & (width <= 8) & (first <= slots - width)
    return tl.where(inside, first, 0), tl.where(inside, width, 0)


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


@triton.jit(do_not_specialize=["tiles", "slots", "entries", "tokens", "tiles_per_split"])
def _gemm_kernel(
    folded_CM,
    words_G,
    tiles_BT,
    state_BT3,
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    sums_SMR,
    tiles,
    slots,
    entries,
    tokens,
    tiles_per_split,
    BLOCK_M: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    TRELLIS: tl.constexpr,
):
    b = tl.program_id(0)
    r = tl.arange(0, BAND)
    j = tl.arange(0, 32)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.program_id(2)
    first_tile = s * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    outliers = _add_outliers(
        tl.zeros((BLOCK_M, BAND), tl.float32),
        folded_CM,
        outliers_O,
        outlier_first_BK,
        outlier_count_BKr,
        b,
        first_tile,
        last_tile,
        m,
        tokens,
        tiles * 32,
        entries,
        BAND,
        1,
    )
    sums = tl.trans(outliers)
    for t in range(first_tile, last_tile):
        first, width = _locate(tiles_BT + b * tiles + t, slots)
        words = words_G + first.to(tl.int64) * BAND
        state = state_BT3 + (b * tiles + t) * 3
        code = _values(words + r[:, None], r[:, None], j[None, :], width, state, BAND, TRELLIS)
        x = tl.load(folded_CM + (t * 32 + j)[:, None].to(tl.int64) * tokens + m[None, :])
        sums = tl.dot(code.to(x.dtype), x, sums, input_precision=PRECISION)
    sums = tl.trans(sums)
    rows = tl.num_programs(0) * BAND
    out = sums_SMR + (s * tokens + m)[:, None].to(tl.int64) * rows + b * BAND + r[None, :]
    tl.store(out, sums)


@triton.jit
def _values(words, r, j, width, state, BAND: tl.constexpr, TRELLIS: tl.constexpr):
    # the values of a tile of any width, as floats
    if TRELLIS:
        parity = tl.load(words, r * 0 < width, other=0)
        quantizer = quantizers(parity, state, r, 0)
        p = (parity >> j) & 1
        rest = _tile(words + BAND, j, tl.maximum(width - 1, 0), BAND)
        code = p + 2 * tl.where(width == 1, -p, rest)
        return value_of(code, (quantizer >> j) & 1).to(tl.float32)
    else:
        return _tile(words, j, width, BAND).to(tl.float32)


@triton.jit
def _tile(words, j, width, BAND: tl.constexpr):
    # the codes of a tile of any width
    bit = j * width
    k = bit >> 5
    shift = (bit & 31).to(tl.uint32)
    low = tl.load(words + k * BAND, bit + width > 0, other=0).to(tl.uint32, bitcast=True)
    split = shift + width > 32
    high = tl.load(words + (k + 1) * BAND, split, other=0).to(tl.uint32, bitcast=True)
    code = low >> shift
    code = tl.where(split, code | (high << ((32 - shift) & 31)), code)
    mask = (1 << width) - 1
    return (code.to(tl.int32, bitcast=True) & mask) - ((1 << width) >> 1)


@triton.jit(do_not_specialize=["start", "tiles", "slots"])
def _decode_kernel(
    words_G,
    tiles_BT,
    state_BT3,
    codes_RC,
    start,
    tiles,
    slots,
    BAND: tl.constexpr,
    TRELLIS: tl.constexpr,
):
    b = tl.program_id(0)
    t = tl.program_id(1)
    r = tl.arange(0, BAND)[:, None]
    j = tl.arange(0, 32)[None, :]
    first, width = _locate(tiles_BT + (start + b) * tiles + t, slots)
    state = state_BT3 + ((start + b) * tiles + t) * 3
    code = _values(words_G + first.to(tl.int64) * BAND + r, r, j, width, state, BAND, TRELLIS)
    out = codes_RC + (b * BAND + r).to(tl.int64) * (tiles * 32) + t * 32 + j
    tl.store(out, code.to(codes_RC.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "columns", "entries"])
def _decode_outliers_kernel(
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    codes_RC,
    start,
    columns,
    entries,
    BAND: tl.constexpr,
):
    b = tl.program_id(0)
    r = b * BAND + tl.arange(0, BAND)
    codes = codes_RC + r.to(tl.int64) * columns
    _decode_outliers(
        codes,
        outliers_O,
        outlier_first_BK,
        outlier_count_BKr,
        start + b,
        tl.program_id(1),
        1,
        columns,
        entries,
        BAND,
    )
