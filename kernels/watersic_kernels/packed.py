"""Products with weights whose codes lie in tiles of fixed width.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), and those of the layout,
        which `watersic_hf.nn.packing.PackedCodes` defines: B = bands of rows, T = tiles of a band,
        R, C = rows and columns of all tiles, G = words, O = outliers, S = splits of the columns.

All of it is ``y = diag(row_scale) @ codes @ (col_scale * x)``: column scales meet x once, in
`_fold_kernel`, and row scales meet the sums once, in `_finish_kernel`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns in a tile.
TILE = 32

#: Most tokens for which the weight is decoded in registers, row by row.
GEMV_TOKENS = 8

#: Most tokens for which the weight is decoded tile by tile in front of a matrix product; with more,
#: it is decoded once into scratch memory.
GEMM_TOKENS = 64

#: The bits of a float32's exponent.
EXPONENTS = 0xFF << 23

#: Programs that keep a GPU busy; the columns are split until there are so many.
PROGRAMS = 4096


def packed_linear(
    x_MN: Tensor,
    words_G: Tensor,
    tiles_BT: Tensor,
    row_order_R: Tensor,
    column_order_C: Tensor,
    outliers_O: Tensor,
    outlier_start_R: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
) -> Tensor:
    """Return ``x @ W.T``, M x A, in the dtype of x.

    Up to `GEMV_TOKENS` tokens, products and sums are float32; with more, codes and the folded x are
    rounded to bfloat16 for a bfloat16 x, and to TF32 for a float16 x.  Sums are float32 and always
    in the same order.  Reference: `watersic_hf.nn.ops.packed_linear`.
    """
    M, A = len(x_MN), len(row_scale_A)
    y_MA = x_MN.new_empty(M, A)
    if y_MA.numel() == 0:
        return y_MA
    bands, tiles = tiles_BT.shape
    rows = len(row_order_R)
    layout = (words_G, tiles_BT, outliers_O, outlier_start_R)
    # programs for whole bands or tiles of them
    band: dict[str, int] = {"BAND": rows // bands}
    if M <= GEMV_TOKENS:
        tokens = triton.next_power_of_2(M)
        folded_CM = _fold(x_MN, column_order_C, col_scale_N, tokens, torch.float32)
        share = triton.cdiv(tiles, max(1, PROGRAMS // bands))
        # the last split is the outliers'
        splits = triton.cdiv(tiles, share) + 1
        sums_SMR = x_MN.new_empty(splits, tokens, rows, dtype=torch.float32)
        _gemv_kernel[(bands, splits)](
            folded_CM,
            *layout,
            sums_SMR,
            tiles,
            share,
            EXPONENTS,
            TOKENS=tokens,
            **band,
            num_warps=1,
        )
    else:
        wide = torch.bfloat16 if x_MN.dtype == torch.bfloat16 else torch.float32
        block = 16 if M <= 16 else 32
        tokens = triton.cdiv(M, block) * block
        folded_CM = _fold(x_MN, column_order_C, col_scale_N, tokens, wide)
        if M <= GEMM_TOKENS:
            sums_SMR = x_MN.new_empty(1, tokens, rows, dtype=torch.float32)
            _gemm_kernel[(bands, tokens // block)](
                folded_CM, *layout, sums_SMR, tiles, tokens, **band, BLOCK_M=block,
                PRECISION="tf32" if x_MN.dtype == torch.float16 else "ieee",
            )  # fmt: skip
        else:
            codes_RC = x_MN.new_empty(rows, tiles * TILE, dtype=wide)
            _decode_kernel[(bands, tiles)](words_G, tiles_BT, codes_RC, tiles, **band)
            _decode_outliers_kernel[(bands,)](
                outliers_O, outlier_start_R, codes_RC, tiles * TILE, **band, num_warps=1
            )
            sums_SMR = (folded_CM.T @ codes_RC.T)[None]
    block = 256
    _finish_kernel[(M, triton.cdiv(rows, block))](
        sums_SMR, row_order_R, row_scale_A, y_MA, A, len(sums_SMR), sums_SMR.stride(0), rows,
        BLOCK_R=block,
    )  # fmt: skip
    return y_MA


def _fold(
    x_MN: Tensor, column_order_C: Tensor, col_scale_N: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    """``col_scale * x`` in the order of the tiles, C x tokens, zeros where there is no token."""
    columns = len(column_order_C)
    folded_CM = x_MN.new_empty(columns, tokens, dtype=dtype)
    block_m = min(tokens, 16)
    block = 1024 // block_m
    _fold_kernel[(triton.cdiv(columns, block), tokens // block_m)](
        x_MN, column_order_C, col_scale_N, folded_CM, *x_MN.shape, columns, *x_MN.stride(), tokens,
        BLOCK_C=block, BLOCK_M=block_m,
    )  # fmt: skip
    return folded_CM


@triton.jit
def _fold_kernel(
    x_MN, order_C, scale_N, folded_CM, M, N, C, stride_m, stride_n, tokens,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(order_C + c, c < C, other=0).to(tl.int32)
    real = (c < C) & (n < N)
    scale = tl.load(scale_N + n, real, other=0.0).to(tl.float32)
    here = real[:, None] & (m < M)[None, :]
    x = tl.load(x_MN + m[None, :].to(tl.int64) * stride_m + n[:, None] * stride_n, here, other=0.0)
    out = folded_CM + c[:, None] * tokens + m[None, :]
    tl.store(out, x.to(tl.float32) * scale[:, None], (c < C)[:, None] & (m < tokens)[None, :])


@triton.jit
def _gemv_kernel(
    folded_CM, words_G, tiles_BT, outliers_O, outlier_start_R, sums_SMR, tiles, share, exponents,
    TOKENS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    # a lane has rows of its own; the columns go by in lockstep
    b = tl.program_id(0)
    s = tl.program_id(1)
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    if s == tl.num_programs(1) - 1:
        starts = outlier_start_R + b * BAND + r
        sums = _add_outliers(sums, folded_CM, outliers_O, starts, m, TOKENS)
    else:
        for t in range(s * share, tl.minimum((s + 1) * share, tiles)):
            tile = tl.load(tiles_BT + b * tiles + t)
            words = words_G + (tile >> 4).to(tl.int64) * BAND + r[None, :]
            x = folded_CM + t * (32 * TOKENS)
            for WIDTH in tl.static_range(1, 9):
                if (tile & 15) == WIDTH:
                    sums = _add_tile(sums, x, words, exponents, WIDTH, BAND, TOKENS)
    rows = tl.num_programs(0) * BAND
    out = sums_SMR + (s * TOKENS + m)[:, None].to(tl.int64) * rows + b * BAND + r[None, :]
    tl.store(out, sums)


@triton.jit
def _add_tile(
    sums, x, words, exponents, WIDTH: tl.constexpr, BAND: tl.constexpr, TOKENS: tl.constexpr
):
    # sums[m, r] += code[r, j] * x[j, m].  A code u at bit s <= 23 - WIDTH of a word becomes a float
    # without a shift and a conversion: below the exponent of 2^(23-s) it is the float 2^(23-s) + u.
    # `exponents` has ones in all bits of the exponent; that they are not known to the compiler
    # keeps it from setting them code by code
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
                    # begins in the word before
                    both = (before >> (32 + j * WIDTH - 32 * k)) | (word << (32 * k - j * WIDTH))
                    code = _float(both | exponents, 0, MASK, HALF)
                elif j * WIDTH - 32 * k + WIDTH <= 23:
                    code = _float(low, j * WIDTH - 32 * k, MASK, HALF)
                else:
                    code = _float(high, j * WIDTH - 32 * k - 16, MASK, HALF)
                if TOKENS == 1:
                    sums += tl.load(x + j) * code
                else:
                    m = tl.arange(0, TOKENS)[:, None]
                    sums += tl.load(x + j * TOKENS + m) * code
        before = word
    return sums


@triton.jit
def _float(word, START: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr):
    bits = word & ((MASK << START) | ((150 - START) << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - START)) + HALF)


@triton.jit
def _add_outliers(sums, folded_CM, outliers_O, starts, m, tokens):
    # every lane walks along the outliers of its rows
    entry = tl.load(starts)
    stop = tl.load(starts + 1)
    c = tl.zeros_like(entry)
    for _ in range(tl.max(stop - entry)):
        here = entry < stop
        gap, code = _outlier(tl.load(outliers_O + entry, here, other=0))
        c += gap
        x = tl.load(folded_CM + c[None, :] * tokens + m[:, None], here[None, :], other=0.0)
        sums += x.to(tl.float32) * code[None, :]
        entry += 1
    return sums


@triton.jit
def _outlier(entry):
    entry = entry.to(tl.int32)
    return entry & 255, ((entry >> 10) << ((entry >> 8) & 3) * 5).to(tl.float32)


@triton.jit
def _gemm_kernel(
    folded_CM, words_G, tiles_BT, outliers_O, outlier_start_R, sums_MR, tiles, tokens,
    BLOCK_M: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    r = tl.arange(0, BAND)
    j = tl.arange(0, 32)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = tl.zeros((BAND, BLOCK_M), tl.float32)
    for t in range(tiles):
        tile = tl.load(tiles_BT + b * tiles + t)
        words = words_G + (tile >> 4).to(tl.int64) * BAND
        code = _tile(words + r[:, None], j[None, :], tile & 15, BAND)
        x = tl.load(folded_CM + (t * 32 + j)[:, None].to(tl.int64) * tokens + m[None, :])
        sums = tl.dot(code.to(x.dtype), x, sums, input_precision=PRECISION)
    starts = outlier_start_R + b * BAND + r
    sums = _add_outliers(tl.trans(sums), folded_CM, outliers_O, starts, m, tokens)
    out = sums_MR + m[:, None].to(tl.int64) * (tl.num_programs(0) * BAND) + b * BAND + r[None, :]
    tl.store(out, sums)


@triton.jit
def _tile(words, j, width, BAND: tl.constexpr):
    # the codes of a tile, whatever its width, as floats
    bit = j * width
    k = bit >> 5
    shift = (bit & 31).to(tl.uint32)
    low = tl.load(words + k * BAND, bit + width > 0, other=0).to(tl.uint32, bitcast=True)
    split = shift + width > 32
    high = tl.load(words + (k + 1) * BAND, split, other=0).to(tl.uint32, bitcast=True)
    code = low >> shift
    code = tl.where(split, code | (high << ((32 - shift) & 31)), code)
    mask = (1 << width) - 1
    return ((code.to(tl.int32, bitcast=True) & mask) - ((1 << width) >> 1)).to(tl.float32)


@triton.jit
def _decode_kernel(words_G, tiles_BT, codes_RC, tiles, BAND: tl.constexpr):
    b = tl.program_id(0)
    t = tl.program_id(1)
    r = tl.arange(0, BAND)[:, None]
    j = tl.arange(0, 32)[None, :]
    tile = tl.load(tiles_BT + b * tiles + t)
    code = _tile(words_G + (tile >> 4).to(tl.int64) * BAND + r, j, tile & 15, BAND)
    out = codes_RC + (b * BAND + r).to(tl.int64) * (tiles * 32) + t * 32 + j
    tl.store(out, code.to(codes_RC.dtype.element_ty))


@triton.jit
def _decode_outliers_kernel(outliers_O, start_R, codes_RC, columns, BAND: tl.constexpr):
    # every lane walks along the outliers of its rows
    r = tl.program_id(0) * BAND + tl.arange(0, BAND)
    entry = tl.load(start_R + r)
    stop = tl.load(start_R + r + 1)
    code_r = codes_RC + r.to(tl.int64) * columns
    for _ in range(tl.max(stop - entry)):
        here = entry < stop
        gap, code = _outlier(tl.load(outliers_O + entry, here, other=0))
        code_r += gap
        code += tl.load(code_r, here, other=0.0).to(tl.float32)
        tl.store(code_r, code.to(codes_RC.dtype.element_ty), here)
        entry += 1


@triton.jit
def _finish_kernel(
    sums_SMR, order_R, scale_A, y_MA, A, splits, stride_s, rows, BLOCK_R: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = sums_SMR + m.to(tl.int64) * rows + r
    for _ in range(splits):
        total += tl.load(sums, r < rows, other=0.0)
        sums += stride_s
    a = tl.load(order_R + r, r < rows, other=0).to(tl.int32)
    real = (r < rows) & (a < A)
    scale = tl.load(scale_A + a, real, other=0.0).to(tl.float32)
    y = total * scale
    tl.store(y_MA + m.to(tl.int64) * A + a, y.to(y_MA.dtype.element_ty), real)
