"""Products with codes that are decoded into scratch memory, some bands of rows at a time.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, r = rows of some bands.

`decode` is a function of the first band and the number of bands.  It returns the codes of these
bands, C x r, in `scratch_dtype`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from watersic_kernels.layers import Layer
from watersic_kernels.product import finish, fold

Decode = Callable[[int, int], Tensor]

#: Approximate number of bytes of decoded codes that are held at a time.
SCRATCH_BYTES = 256 << 20


def scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of decoded codes for an x of `dtype`; float16 cannot hold all codes."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def scratch_product(decode: Decode, x_MN: Tensor, layer: Layer) -> None:
    """Write ``x @ W.T`` into the outputs of a layer.

    Args:
        decode: decodes some bands of the layer.
        x_MN: input.
        layer: the layer.
    """
    *_, row_order_R, column_order_C = layer.layout[:-3]
    folded_MC = _folded(x_MN, column_order_C, layer.col_scale_N)
    for rows, codes_Cr in _decoded(decode, layer, folded_MC.dtype):
        with _tf32_products(x_MN.dtype == torch.float16):
            sums_Mr = folded_MC @ codes_Cr
        finish(sums_Mr[None], row_order_R[rows], layer.row_scale_A, layer.y_MA)


def scratch_gradient(decode: Decode, grad_MA: Tensor, layer: Layer) -> None:
    """Write ``grad @ W``, the gradient of a product in x, into the outputs of a layer, M x N.

    Args:
        decode: decodes some bands of the layer.
        grad_MA: gradient of the product.
        layer: the layer.
    """
    *_, row_order_R, column_order_C = layer.layout[:-3]
    folded_MR = _folded(grad_MA, row_order_R, layer.row_scale_A)
    sums_MC = grad_MA.new_zeros(len(folded_MR), len(column_order_C), dtype=torch.float32)
    for rows, codes_Cr in _decoded(decode, layer, folded_MR.dtype):
        with _tf32_products(grad_MA.dtype == torch.float16):
            sums_MC += folded_MR[:, rows] @ codes_Cr.T
    finish(sums_MC[None], column_order_C, layer.col_scale_N, layer.y_MA)


def _folded(x_MN: Tensor, order_C: Tensor, scale_N: Tensor) -> Tensor:
    """Return ``scale * x`` in the order of the tiles, with M rounded up to whole blocks."""
    block = 16 if len(x_MN) <= 16 else 32
    tokens = triton.cdiv(len(x_MN), block) * block
    options = {"dtype": scratch_dtype(x_MN.dtype), "tf32": x_MN.dtype == torch.float16}
    return fold(x_MN, [order_C], [scale_N], tokens, by_token=True, **options)[0].T


def _decoded(decode: Decode, layer: Layer, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the codes of some rows of the tiles at a time: these rows, and the codes, C x r."""
    columns = len(layer.layout[-4])
    step = max(1, SCRATCH_BYTES // (dtype.itemsize * layer.band * columns))
    for first in range(0, layer.bands, step):
        count = min(step, layer.bands - first)
        yield slice(first * layer.band, (first + count) * layer.band), decode(first, count)


@contextmanager
def _tf32_products(wanted: bool) -> Iterator[None]:
    """Have torch multiply float32 matrices in TF32; their inputs must be rounded to it."""
    # not the older functions, which fail where a program has set this
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if wanted else before
    try:
        yield
    finally:
        settings.fp32_precision = before
