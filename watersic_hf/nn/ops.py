"""Operators on packed layers.

Shapes: A = out_features, N = in_features, B = bytes of the payload, M = tokens, U = rows asked
        for, r = rows of a band; x has any leading dimensions.

Every operator is registered with torch under ``watersic::``, with a reference that runs on any
device and a fake for tracing, so that compiled and exported models call it as one opaque node.
The reference decodes a band of rows at a time (`watersic_hf.nn.bands`).  `coded_linear` has Triton
kernels on CUDA, and compiled ones for `packed` on CPUs; `watersic_hf.nn.backends` chooses.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from watersic_hf import codec
from watersic_hf.nn.backends import product_kernels
from watersic_hf.nn.bands import coded_bands, scale_codes, weight_tiles
from watersic_hf.nn.layouts import LAYOUTS
from watersic_hf.nn.packing import PackedCodes, unpack_rows
from watersic_hf.nn.tiles import TiledCodes

#: Tag of operators that wait for the device, which the capture of a CUDA graph does not allow.
SYNCHRONISES = (torch.Tag.cudagraph_unsafe,)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast, where it is on, gives the input of a linear layer."""
    kind = x.device.type
    # autocast leaves float64 as it is, and knows no meta device
    left = kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind)
    return x.dtype if left else torch.get_autocast_dtype(kind)


def _as_given(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have an operator compute in the dtypes of its arguments, also where autocast is on."""

    @functools.wraps(operator)
    def compute(x: Tensor, *args: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args)

    return compute


@torch.library.custom_op("watersic::dequantize", mutates_args=())
def dequantize(
    payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the dense weight ``diag(row) @ codes @ diag(col)``, A x N, on the scales' device.

    The weight is computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: the payload holds a matrix of another shape.
        CodecError: the payload is damaged.
    """
    weight_AN = row_scale_A.new_empty((len(row_scale_A), len(col_scale_N)), dtype=dtype)
    for rows, tile in weight_tiles(payload_B, row_scale_A, col_scale_N, dtype):
        if isinstance(rows, slice) and len(tile) == len(weight_AN):
            return tile
        weight_AN[rows] = tile
    return weight_AN


@dequantize.register_fake
def _(payload_B, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((row_scale_A.shape[0], col_scale_N.shape[0]), dtype=dtype)


@torch.library.custom_op("watersic::dequant_linear", mutates_args=())
@_as_given
def dequant_linear(
    x: Tensor, payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``x @ W.T`` in the dtype of `x`, where W is the dense weight of the payload.

    W is decoded band by band and never held whole.  Differentiable in `x`.

    Raises:
        ValueError: the last dimension of `x` is not N, or the payload holds a matrix of another
            shape.
        CodecError: the payload is damaged.
    """
    A, N = len(row_scale_A), len(col_scale_N)
    if x.shape[-1:] != (N,):
        raise ValueError(
            f"dequant_linear: x has shape {tuple(x.shape)}, but a layer of {A} x {N} needs "
            f"(..., {N})"
        )
    y = x.new_empty((*x.shape[:-1], A))
    for rows, tile in weight_tiles(payload_B, row_scale_A, col_scale_N, x.dtype):
        y[..., rows] = x @ tile.T
    return y


@dequant_linear.register_fake
def _(x, payload_B, row_scale_A, col_scale_N):
    return x.new_empty((*x.shape[:-1], row_scale_A.shape[0]))


@torch.library.custom_op("watersic::dequant_linear_backward", mutates_args=())
@_as_given
def dequant_linear_backward(
    grad_y: Tensor, payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return the gradient of `dequant_linear` in x: ``grad_y @ W``, summed in float32 or wider."""
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_x = grad_y.new_zeros((*grad_y.shape[:-1], len(col_scale_N)), dtype=wide)
    for rows, tile in weight_tiles(payload_B, row_scale_A, col_scale_N, grad_y.dtype):
        grad_x += grad_y[..., rows] @ tile
    return grad_x.to(grad_y.dtype)


@dequant_linear_backward.register_fake
def _(grad_y, payload_B, row_scale_A, col_scale_N):
    return grad_y.new_empty((*grad_y.shape[:-1], col_scale_N.shape[0]))


def _setup_context(ctx, inputs, output):
    _, payload_B, row_scale_A, col_scale_N = inputs
    ctx.save_for_backward(payload_B, row_scale_A, col_scale_N)


def _backward(ctx, grad_y):
    return dequant_linear_backward(grad_y, *ctx.saved_tensors), None, None, None


dequant_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("watersic::coded_linear", mutates_args=())
@_as_given
def coded_linear(
    x: Tensor,
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    backend: str,
) -> Tensor:
    """Return ``x @ W.T`` in the dtype of `x`, where the codes of W are in a layout of `LAYOUTS`.

    Differentiable in `x`.

    Args:
        x: input, (..., N).
        residency: a key of `LAYOUTS`.
        layout: the tensors of the codes, in the order of `TiledCodes.tensors`.
        row_scale_A: row scales.
        col_scale_N: column scales.
        backend: one of `BACKENDS`.

    Raises:
        ValueError: the last dimension of `x` is not N.
        ImportError: `backend` is ``triton`` and Triton cannot be imported.
    """
    A, N = len(row_scale_A), len(col_scale_N)
    if x.shape[-1:] != (N,):
        raise ValueError(
            f"coded_linear: x has shape {tuple(x.shape)}, but a layer of {A} x {N} needs (..., {N})"
        )
    kind = LAYOUTS[residency]
    kernels = product_kernels(x, backend)
    if kernels is not None:
        y_MA = kind.multiply(kernels, x.reshape(-1, N), layout, row_scale_A, col_scale_N)
        return y_MA.view(*x.shape[:-1], A)
    y = x.new_empty((*x.shape[:-1], A))
    for rows, weight_rN in coded_bands(residency, layout, row_scale_A, col_scale_N, x.dtype):
        y[..., rows] = x @ weight_rN.T
    return y


@coded_linear.register_fake
def _(x, residency, layout, row_scale_A, col_scale_N, backend):
    return x.new_empty((*x.shape[:-1], row_scale_A.shape[0]))


@torch.library.custom_op("watersic::coded_linear_backward", mutates_args=())
@_as_given
def coded_linear_backward(
    grad_y: Tensor,
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
) -> Tensor:
    """Return the gradient of `coded_linear` in x: ``grad_y @ W``, summed in float32 or wider."""
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_x = grad_y.new_zeros((*grad_y.shape[:-1], len(col_scale_N)), dtype=wide)
    for rows, weight_rN in coded_bands(residency, layout, row_scale_A, col_scale_N, grad_y.dtype):
        grad_x += grad_y[..., rows] @ weight_rN
    return grad_x.to(grad_y.dtype)


@coded_linear_backward.register_fake
def _(grad_y, residency, layout, row_scale_A, col_scale_N):
    return grad_y.new_empty((*grad_y.shape[:-1], col_scale_N.shape[0]))


def _setup_coded_context(ctx, inputs, output):
    _, ctx.residency, layout, row_scale_A, col_scale_N, _ = inputs
    ctx.save_for_backward(*layout, row_scale_A, col_scale_N)


def _coded_backward(ctx, grad_y):
    *layout, row_scale_A, col_scale_N = ctx.saved_tensors
    grad_x = coded_linear_backward(grad_y, ctx.residency, layout, row_scale_A, col_scale_N)
    return grad_x, None, [None] * len(layout), None, None, None


coded_linear.register_autograd(_coded_backward, setup_context=_setup_coded_context)


@torch.library.custom_op("watersic::joined_linear", mutates_args=())
@_as_given
def joined_linear(
    x: Tensor, kinds: str, tensors: Sequence[Tensor], rows: int, backend: str
) -> Tensor:
    """Return the products with several weights side by side, in the dtype of `x`: (..., rows).

    One operator, so that no compiler takes the concatenation apart.

    Args:
        x: input, (..., N).
        kinds: residencies of the weights, separated by commas.
        tensors: the tensors of `watersic_hf.nn.forms.Form` of all weights.
        rows: number of outputs; those beyond the weights are zero.
        backend: one of `BACKENDS`.

    Raises:
        ValueError: the last dimension of `x` is not N.
    """
    y = x.new_empty((*x.shape[:-1], rows))
    first, rest = 0, list(tensors)
    for kind in kinds.split(","):
        count = {"dense": 1, "stored": 3}.get(kind) or len(LAYOUTS[kind].codes.names()) + 2
        found, rest = rest[:count], rest[count:]
        if kind == "dense":
            part = F.linear(x, found[0].to(x.dtype))
        elif kind == "stored":
            part = dequant_linear(x, *found)
        else:
            *layout, row_scale_r, col_scale_N = found
            part = coded_linear(x, kind, layout, row_scale_r, col_scale_N, backend)
        y[..., first : first + part.shape[-1]] = part
        first += part.shape[-1]
    y[..., first:] = 0
    return y


@joined_linear.register_fake
def _(x, kinds, tensors, rows, backend):
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("watersic::payload_rows", mutates_args=(), tags=SYNCHRONISES)
def payload_rows(
    index: Tensor,
    payload_B: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gather rows of the dense weight of a payload.

    Only the chunks of the payload that hold these rows are decoded.

    Args:
        index: row indices of any shape; a row may occur several times.
        payload_B: the payload.
        row_scale_A: row scales.
        col_scale_N: column scales.
        dtype: dtype of the result.

    Returns:
        The rows, (*index.shape, N), on the device of `index`.

    Raises:
        IndexError: an index is out of range.
        CodecError: the payload is damaged.
    """
    rows_U, inverse = torch.unique(index, return_inverse=True)
    codes_UN = codec.decode_rows(payload_B, rows_U.cpu()).to(index.device)
    return scale_codes(codes_UN, row_scale_A[rows_U], col_scale_N, dtype)[inverse]


@payload_rows.register_fake
def _(index, payload_B, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((*index.shape, col_scale_N.shape[0]), dtype=dtype)


@torch.library.custom_op("watersic::packed_rows", mutates_args=(), tags=SYNCHRONISES)
def packed_rows(
    index: Tensor,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gather rows of a dense weight as `payload_rows` does, from the tensors of `PackedCodes`."""
    packed = PackedCodes.of(layout, rows=len(row_scale_A), columns=len(col_scale_N))
    rows_U = index.flatten()
    codes_UN = unpack_rows(packed, rows_U)
    rows_UN = scale_codes(codes_UN, row_scale_A[rows_U], col_scale_N, dtype)
    return rows_UN.view(*index.shape, len(col_scale_N))


@packed_rows.register_fake
def _(index, layout, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((*index.shape, col_scale_N.shape[0]), dtype=dtype)


def encode(codes_AN: Tensor, residency: str, path: codec.Path | None = None) -> TiledCodes:
    """Encode codes, on their device, in the layout of a residency.

    Args:
        codes_AN: codes, or the values of a trellis.
        residency: a key of `LAYOUTS`.
        path: path of the values; default: these are codes.

    Raises:
        ValueError: the matrix is empty.
    """
    return LAYOUTS[residency].encode(codes_AN, path)
