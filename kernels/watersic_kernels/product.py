"""The common part of products with tiles of codes: scales and sums.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, S = splits of the columns, L = layers.

All products are ``y = diag(row_scale) @ codes @ (col_scale * x)``: `fold` multiplies x by the
column scales once, and `finish` multiplies the sums by the row scales once.  The layouts are
defined in `watersic_hf.nn.tiles`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a tile.
TILE = 32

#: Largest number of tokens for which the weight is decoded in registers, row by row.
GEMV_TOKENS = 8


def fold(
    x_MN: Tensor,
    orders: Sequence[Tensor],
    scales: Sequence[Tensor],
    tokens: int,
    *,
    dtype: torch.dtype,
    tf32: bool = False,
    by_token: bool = False,
    cleared: Tensor | None = None,
) -> Tensor:
    """Return ``col_scale * x`` with columns in the order of the tiles, L x C x `tokens`.

    Args:
        x_MN: input.
        orders: for every layer, the column of x for each of its C columns; N or more for padding.
        scales: for every layer, column scales.
        tokens: M rounded up as the caller needs it; the tokens beyond M are zero.
        dtype: dtype of the result.
        tf32: whether to round to TF32, whose units would cut the other bits off; default: False.
        by_token: whether the columns of a token are contiguous; default: the tokens of a column.
        cleared: vector of integers that are set to 0; default: none.
    """
    layers, columns = len(orders), len(orders[0])
    if by_token:
        folded_LCM = x_MN.new_empty(layers, tokens, columns, dtype=dtype).mT
    else:
        folded_LCM = x_MN.new_empty(layers, columns, tokens, dtype=dtype)
    block_m = min(tokens, 16)
    block_c = 1024 // block_m
    count = 0 if cleared is None else len(cleared)
    tensors = (x_MN, tuple(orders), tuple(scales), folded_LCM)
    sizes = (*x_MN.shape, columns, *x_MN.stride(), *folded_LCM.stride(), tokens, count)
    _fold_kernel[(triton.cdiv(max(columns, count), block_c), tokens // block_m, layers)](
        *tensors,
        folded_LCM if cleared is None else cleared,
        *sizes,
        BLOCK_C=block_c,
        BLOCK_M=block_m,
        TF32=tf32,
    )
    return folded_LCM


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
    sizes = (len(row_scale_A), splits, *sums_SMR.stride()[:2], rows, y_MA.stride(0))
    _finish_kernel[(len(y_MA), triton.cdiv(rows, block_r))](
        *tensors, *sizes, BLOCK_S=block_s, BLOCK_R=block_r
    )


@triton.jit(
    do_not_specialize=[
        *("M", "N", "C", "stride_m", "stride_n", "out_stride_l", "out_stride_m", "tokens", "count")
    ]
)
def _fold_kernel(
    x_MN,
    order_C,
    scale_N,
    folded_LCM,
    cleared,
    M,
    N,
    C,
    stride_m,
    stride_n,
    out_stride_l,
    out_stride_c,
    out_stride_m,
    tokens,
    count,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TF32: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    l = tl.program_id(2)
    tl.store(cleared + c, 0, c < tl.where(l + tl.program_id(1) == 0, count, 0))
    n = tl.load(_of_layer(order_C, l) + c, c < C, other=0).to(tl.int32)
    real = (c < C) & (n >= 0) & (n < N)
    scale = tl.load(_of_layer(scale_N, l) + n, real, other=0.0).to(tl.float32)
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
    out = folded_LCM + l.to(tl.int64) * out_stride_l
    out += c[:, None].to(tl.int64) * out_stride_c + m * out_stride_m
    tl.store(out, folded, (c < C)[:, None] & (m < tokens))


@triton.jit(do_not_specialize=["A", "splits", "stride_s", "stride_m", "rows", "stride_y"])
def _finish_kernel(
    sums_SMR,
    order_R,
    scale_A,
    y_MA,
    A,
    splits,
    stride_s,
    stride_m,
    rows,
    stride_y,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = sums_SMR + m * stride_m + r[None, :]
    y_A = y_MA + m * stride_y
    _finish(sums, order_R + r, scale_A, y_A, A, splits, stride_s, r < rows, BLOCK_S, BLOCK_R)


@triton.jit
def _finish(
    sums,
    order,
    scale_A,
    y_A,
    A,
    splits,
    stride_s,
    inside,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # the outputs of some rows: `sums` and `order` are the addresses of their entries.  Sums are
    # read past the L1 cache, which does not see what other programs write
    total = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)[:, None]
        here = (s < splits) & inside[None, :]
        total += tl.load(sums + s.to(tl.int64) * stride_s, here, other=0.0, cache_modifier=".cg")
    total = tl.sum(total, 0)
    a = tl.load(order, inside, other=0).to(tl.int32)
    real = inside & (a >= 0) & (a < A)
    scale = tl.load(scale_A + a, real, other=0.0).to(tl.float32)
    tl.store(y_A + a, (total * scale).to(y_A.dtype.element_ty), real)


@triton.jit
def _of_layer(values, l):
    # the entry of a layer in a tuple, which only constants can index
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(l == i, values[i], found)
    return found
