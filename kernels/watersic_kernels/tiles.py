"""Tiles of fixed width that are decoded whole: products of matrices, and decoding.

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

from watersic_kernels.layers import Layer, is_path
from watersic_kernels.outliers import _add_outliers, decode_outliers
from watersic_kernels.paths import quantizers, value_of
from watersic_kernels.product import TILE, finish, fold
from watersic_kernels.scratch import Decode, scratch_dtype

#: Largest number of tokens for which the weight is decoded tile by tile inside a matrix product;
#: for more tokens it is decoded once, into scratch memory.
GEMM_TOKENS = 64

#: Number of programs, of four warps, that keeps a GPU busy; the columns are split until there are
#: as many.
GEMM_PROGRAMS = 512


def multiply_tiles(x_MN: Tensor, layer: Layer) -> None:
    """Multiply at most `GEMM_TOKENS` tokens with a layer, tile by tile."""
    words_G, tiles_BT, state_BT3, row_order_R, column_order_C, *outliers = layer.layout
    M, band, (bands, tiles) = len(x_MN), layer.band, tiles_BT.shape
    block = 16 if M <= 16 else 32
    tokens = triton.cdiv(M, block) * block
    tf32 = x_MN.dtype == torch.float16
    options = {"dtype": scratch_dtype(x_MN.dtype), "tf32": tf32}
    folded_CM = fold(x_MN, [column_order_C], [layer.col_scale_N], tokens, **options)[0]
    tiles_per_split = triton.cdiv(tiles, max(1, GEMM_PROGRAMS // (bands * (tokens // block))))
    splits = triton.cdiv(tiles, tiles_per_split)
    sums_SMR = x_MN.new_empty(splits, tokens, layer.rows, dtype=torch.float32)
    sizes = (tiles, len(words_G) // band, len(outliers[0]), tokens, tiles_per_split)
    _gemm_kernel[(bands, tokens // block, splits)](
        *(folded_CM, words_G, tiles_BT, state_BT3, *outliers, sums_SMR),
        *sizes,
        BLOCK_M=block,
        BAND=band,
        PRECISION="tf32" if tf32 else "ieee",
        TRELLIS=is_path(layer.layout),
    )
    finish(sums_SMR, row_order_R, layer.row_scale_A, layer.y_MA)


def decoder(layout: Sequence[Tensor], dtype: torch.dtype) -> Decode:
    """Return the function that decodes some bands, for an x of `dtype`."""
    words_G, tiles_BT, state_BT3, row_order_R, _, *outliers = layout
    bands, tiles = tiles_BT.shape
    band = len(row_order_R) // bands
    slots = len(words_G) // band

    def decode(start: int, count: int) -> Tensor:
        codes_RC = words_G.new_empty(count * band, tiles * TILE, dtype=scratch_dtype(dtype))
        arguments = (words_G, tiles_BT, state_BT3, codes_RC, start, tiles, slots)
        _decode_kernel[(count, tiles)](*arguments, BAND=band, TRELLIS=is_path(layout))
        decode_outliers(outliers, codes_RC, start, band)
        return codes_RC.T

    return decode


@triton.jit
def _locate(tile, slots):
    # position of a tile's words, in units of `BAND` words, and its width; 0, 0 if out of bounds
    tile = tl.load(tile)
    first = tile >> 4
    width = tile & 15
    inside = (first >= 0) & (width <= 8) & (first <= slots - width)
    return tl.where(inside, first, 0), tl.where(inside, width, 0)


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
