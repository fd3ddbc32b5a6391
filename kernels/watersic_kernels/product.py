"""The common part of products with tiles of codes: scales, outliers, decoding to scratch memory.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, O = outlier entries, S = splits of the columns.

All products are ``y = diag(row_scale) @ codes @ (col_scale * x)``: `fold` multiplies x by the
column scales once, and `finish` multiplies the sums by the row scales once.  The layouts are
defined in `watersic_hf.nn.tiles`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a tile.
TILE = 32

#: Largest number of tokens for which the weight is decoded in registers, row by row.
GEMV_TOKENS = 8

#: Approximate number of bytes of decoded codes that are held at a time.
SCRATCH_BYTES = 256 << 20


def fold(
    x_MN: Tensor,
    column_order_C: Tensor,
    col_scale_N: Tensor,
    tokens: int,
    *,
    dtype: torch.dtype,
    tf32: bool = False,
    by_token: bool = False,
) -> Tensor:
    """Return ``col_scale * x`` with columns in the order of the tiles, C x `tokens`.

    Args:
        x_MN: input.
        column_order_C: the column of x for each column of the tiles; N or more for padding.
        col_scale_N: column scales.
        tokens: M rounded up as the caller needs it; the tokens beyond M are zero.
        dtype: dtype of the result.
        tf32: whether to round to TF32, whose units would cut the other bits off; default: False.
        by_token: whether the columns of a token are contiguous; default: the tokens of a column.
    """
    columns = len(column_order_C)
    if by_token:
        folded_CM = x_MN.new_empty(tokens, columns, dtype=dtype).T
    else:
        folded_CM = x_MN.new_empty(columns, tokens, dtype=dtype)
    block_m = min(tokens, 16)
    block_c = 1024 // block_m
    tensors = (x_MN, column_order_C, col_scale_N, folded_CM)
    sizes = (*x_MN.shape, columns, *x_MN.stride(), *folded_CM.stride(), tokens)
    _fold_kernel[(triton.cdiv(columns, block_c), tokens // block_m)](
        *tensors, *sizes, BLOCK_C=block_c, BLOCK_M=block_m, TF32=tf32
    )
    return folded_CM


def finish(sums_SMR: Tensor, row_order_R: Tensor, row_scale_A: Tensor, y_MA: Tensor) -> None:
    """Write the outputs of some rows of the tiles into `y_MA`: the sum over all splits, scaled.

    Args:
        sums_SMR: sums over the columns of each split, float32; may have more tokens than y.
        row_order_R: the row of the weight for each row of the tiles; A or more for padding.
        row_scale_A: row scales.
        y_MA: receives the outputs.
    """
    rows, splits = len(row_order_R), len(sums_SMR)
    # with many splits, few rows per program: there are few tokens then
    block_s = min(16, triton.next_power_of_2(splits))
    block_r = 256 if splits == 1 else 64
    tensors = (sums_SMR, row_order_R, row_scale_A, y_MA)
    sizes = (len(row_scale_A), splits, sums_SMR.stride(0), rows)
    _finish_kernel[(len(y_MA), triton.cdiv(rows, block_r))](
        *tensors, *sizes, BLOCK_S=block_s, BLOCK_R=block_r
    )


def through_scratch(
    decode: Callable[[int, int], Tensor],
    bands: int,
    x_MN: Tensor,
    row_order_R: Tensor,
    column_order_C: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    y_MA: Tensor,
) -> None:
    """Compute a product by decoding some bands at a time into scratch memory.

    Args:
        decode: returns the codes of some bands, C x r, in `scratch_dtype`; called with the first
            band and the number of bands.
        bands: number of bands.
        x_MN: input.
        row_order_R: the row of the weight for each row of the tiles.
        column_order_C: the column of the weight for each column of the tiles.
        row_scale_A: row scales.
        col_scale_N: column scales.
        y_MA: receives the outputs.
    """
    block = 16 if len(x_MN) <= 16 else 32
    tokens = triton.cdiv(len(x_MN), block) * block
    wide, tf32 = scratch_dtype(x_MN.dtype), x_MN.dtype == torch.float16
    options = {"dtype": wide, "tf32": tf32, "by_token": True}
    folded_MC = fold(x_MN, column_order_C, col_scale_N, tokens, **options).T
    band = len(row_order_R) // bands
    step = max(1, SCRATCH_BYTES // (wide.itemsize * band * len(column_order_C)))
    for first in range(0, bands, step):
        count = min(step, bands - first)
        with _float32_products("high" if tf32 else None):
            sums_MR = folded_MC @ decode(first, count)
        finish(sums_MR[None], row_order_R[first * band :][: count * band], row_scale_A, y_MA)


@contextmanager
def _float32_products(precision: str | None) -> Iterator[None]:
    """Have torch multiply float32 matrices with another precision, such as ``high`` for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of decoded codes for an x of `dtype`; float16 cannot hold all codes."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@triton.jit(do_not_specialize=["M", "N", "C", "tokens"])
def _fold_kernel(
    x_MN,
    order_C,
    scale_N,
    folded_CM,
    M,
    N,
    C,
    stride_m,
    stride_n,
    out_stride_c,
    out_stride_m,
    tokens,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TF32: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.load(order_C + c, c < C, other=0).to(tl.int32)
    real = (c < C) & (n >= 0) & (n < N)
    scale = tl.load(scale_N + n, real, other=0.0).to(tl.float32)
    here = real[:, None] & (m < M)[None, :]
    # in 64 bits: long prompts have more than 2^31 inputs
    m = m[None, :].to(tl.int64)
    x = tl.load(x_MN + m * stride_m + n[:, None].to(tl.int64) * stride_n, here, other=0.0)
    folded = x.to(tl.float32) * scale[:, None]
    if TF32:
        bits = folded.to(tl.int32, bitcast=True)
        # to the nearest of the numbers whose last 13 bits are 0; of two, to the even one
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
        folded = bits.to(tl.float32, bitcast=True)
    out = folded_CM + c[:, None].to(tl.int64) * out_stride_c + m * out_stride_m
    tl.store(out, folded, (c < C)[:, None] & (m < tokens))


@triton.jit(do_not_specialize=["A", "splits", "rows"])
def _finish_kernel(
    sums_SMR,
    order_R,
    scale_A,
    y_MA,
    A,
    splits,
    stride_s,
    rows,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        sums = sums_SMR + s[:, None].to(tl.int64) * stride_s + m.to(tl.int64) * rows + r[None, :]
        total += tl.load(sums, (s < splits)[:, None] & (r < rows)[None, :], other=0.0)
    total = tl.sum(total, 0)
    a = tl.load(order_R + r, r < rows, other=0).to(tl.int32)
    real = (r < rows) & (a >= 0) & (a < A)
    scale = tl.load(scale_A + a, real, other=0.0).to(tl.float32)
    y = total * scale
    tl.store(y_MA + m.to(tl.int64) * A + a, y.to(y_MA.dtype.element_ty), real)


@triton.jit
def _add_outliers(
    sums,
    folded_CM,
    outliers_O,
    first_BK,
    count_BKr,
    b,
    first_tile,
    last_tile,
    m,
    tokens,
    columns,
    entries,
    BAND: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # the outliers of the groups of columns that begin in some tiles, so many of a row at once;
    # whatever the entries contain, only x is read
    groups = tl.cdiv(columns, 256)
    for k in range(tl.cdiv(first_tile, 8), tl.cdiv(last_tile, 8)):
        entry, stop = _outliers_of(first_BK, count_BKr, b * groups + k, entries, BAND)
        for first in range(0, tl.max(stop - entry), AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                here = entry + first + i < stop
                c, code = _outlier(tl.load(outliers_O + entry + first + i, here, other=0), k)
                here &= c < columns
                x = tl.load(folded_CM + c[None, :] * tokens + m[:, None], here[None, :], other=0.0)
                sums += x.to(tl.float32) * code[None, :]
    return sums


@triton.jit
def _decode_outliers(
    codes, outliers_O, first_BK, count_BKr, b, k, stride_c, columns, entries, BAND: tl.constexpr
):
    # as `_add_outliers`, but adds to the decoded codes of the rows; a value of several entries is
    # added up before it is stored, so that nothing is read after it was written
    groups = tl.cdiv(columns, 256)
    entry, stop = _outliers_of(first_BK, count_BKr, b * groups + k, entries, BAND)
    last = tl.full((BAND,), -1, tl.int32)
    total = tl.zeros((BAND,), tl.float32)
    for i in range(tl.max(stop - entry)):
        here = entry + i < stop
        c, code = _outlier(tl.load(outliers_O + entry + i, here, other=0), k)
        here &= c < columns
        address = codes + c.to(tl.int64) * stride_c
        known = tl.load(address, here & (c != last), other=0.0).to(tl.float32)
        total = tl.where(c == last, total, known) + code
        tl.store(address, total.to(codes.dtype.element_ty), here)
        last = c


@triton.jit
def _outliers_of(first_BK, count_BKr, n, entries, BAND: tl.constexpr):
    # where the entries of every row in group n of all bands' groups begin and end
    count = tl.load(count_BKr + n.to(tl.int64) * BAND + tl.arange(0, BAND)).to(tl.int32)
    stop = tl.load(first_BK + n) + tl.cumsum(count)
    return _within(stop - count, entries), _within(stop, entries)


@triton.jit
def _within(entry, entries):
    return tl.minimum(tl.maximum(entry, 0), entries)


@triton.jit
def _outlier(entry, k):
    # column and value of an entry in group k
    entry = entry.to(tl.int32)
    return k * 256 + (entry & 255), ((entry >> 10) << (((entry >> 8) & 3) * 5)).to(tl.float32)
