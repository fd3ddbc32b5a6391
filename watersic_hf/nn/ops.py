"""Operators on packed layers.

Shapes: A = out_features, N = in_features, B = bytes of the payload, M = tokens, U = rows asked
        for, r = rows of a band; x has any leading dimensions.

Every operator is registered with torch under ``watersic::``, with a reference that runs on any
device and a fake for tracing, so that compiled and exported models call it as one opaque node.
The reference decodes a band of rows at a time (`watersic_hf.nn.bands`).  `coded_linear`, its
gradient and `joined_linear` have Triton kernels on CUDA, and the products compiled ones on CPUs;
`watersic_hf.nn.backends` chooses.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from watersic_hf import codec
from watersic_hf.nn.backends import kernels_on, product_kernels
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


def _check_input(operator: str, x: Tensor, rows: int, columns: int) -> None:
    if x.shape[-1:] != (columns,):
        raise ValueError(
            f"{operator}: x has shape {tuple(x.shape)}, but a layer of {rows} x {columns} needs "
            f"(..., {columns})"
        )


@torch.library.custom_op("watersic::dequantize", mutates_args=(), tags=SYNCHRONISES)
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


@torch.library.custom_op("watersic::dequant_linear", mutates_args=(), tags=SYNCHRONISES)
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
    _check_input("dequant_linear", x, A, N)
    y = x.new_empty((*x.shape[:-1], A))
    for rows, tile in weight_tiles(payload_B, row_scale_A, col_scale_N, x.dtype):
        y[..., rows] = x @ tile.T
    return y


@dequant_linear.register_fake
def _(x, payload_B, row_scale_A, col_scale_N):
    return x.new_empty((*x.shape[:-1], row_scale_A.shape[0]))


@torch.library.custom_op("watersic::dequant_linear_backward", mutates_args=(), tags=SYNCHRONISES)
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
    _check_input("coded_linear", x, A, N)
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
    backend: str,
) -> Tensor:
    """Return the gradient of `coded_linear` in x: ``grad_y @ W``, summed in float32 or wider."""
    kernels = kernels_on(grad_y.device, backend)
    if kernels is not None:
        grad_MA = grad_y.reshape(-1, len(row_scale_A))
        weight = layout, row_scale_A, col_scale_N
        grad_MN = LAYOUTS[residency].gradient(kernels, grad_MA, *weight)
        return grad_MN.view(*grad_y.shape[:-1], len(col_scale_N))
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_x = grad_y.new_zeros((*grad_y.shape[:-1], len(col_scale_N)), dtype=wide)
    for rows, weight_rN in coded_bands(residency, layout, row_scale_A, col_scale_N, grad_y.dtype):
        grad_x += grad_y[..., rows] @ weight_rN
    return grad_x.to(grad_y.dtype)


@coded_linear_backward.register_fake
def _(grad_y, residency, layout, row_scale_A, col_scale_N, backend):
    return grad_y.new_empty((*grad_y.shape[:-1], col_scale_N.shape[0]))


def _setup_coded_context(ctx, inputs, output):
    _, ctx.residency, layout, row_scale_A, col_scale_N, ctx.backend = inputs
    ctx.save_for_backward(*layout, row_scale_A, col_scale_N)


def _coded_backward(ctx, grad_y):
    *layout, row_scale_A, col_scale_N = ctx.saved_tensors
    weight = layout, row_scale_A, col_scale_N
    grad_x = coded_linear_backward(grad_y, ctx.residency, *weight, ctx.backend)
    return grad_x, None, [None] * len(layout), None, None, None


coded_linear.register_autograd(_coded_backward, setup_context=_setup_coded_context)


def _joined_linear(
    x: Tensor, kinds: str, tensors: Sequence[Tensor], rows: int, backend: str
) -> Tensor:
    """Return the products with several weights side by side, in the dtype of `x`: (..., rows).

    One operator, so that no compiler takes the concatenation apart.  On CUDA, weights in the same
    layout are multiplied in one launch if there are few tokens.

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
    first, kernels = 0, kernels_on(x.device, backend)
    for kind, parts in groupby(_weights(kinds, tensors), itemgetter(0)):
        weights = [weight for _, weight in parts]
        if kernels is not None and kind in LAYOUTS:
            columns = len(weights[0][-1])
            count = sum(len(row_scale_r) for _, row_scale_r, _ in weights)
            _check_input("joined_linear", x, count, columns)
            y_MA = y.view(-1, rows)[:, first : first + count]
            LAYOUTS[kind].join(kernels, x.reshape(-1, columns), weights, y_MA)
            first += count
            continue
        for weight in weights:
            if kind == "dense":
                part = F.linear(x, weight[0].to(x.dtype))
            elif kind == "stored":
                part = dequant_linear(x, *weight)
            else:
                part = coded_linear(x, kind, *weight, backend)
            y[..., first : first + part.shape[-1]] = part
            first += part.shape[-1]
    y[..., first:] = 0
    return y


def _weights(kinds: str, tensors: Sequence[Tensor]) -> Iterator[tuple[str, tuple]]:
    """Yield the residency of every weight, and the arguments of its operator after x."""
    rest = list(tensors)
    for kind in kinds.split(","):
        count = {"dense": 1, "stored": 3}.get(kind) or len(LAYOUTS[kind].codes.names()) + 2
        found, rest = rest[:count], rest[count:]
        yield kind, (found[:-2], *found[-2:]) if kind in LAYOUTS else tuple(found)


#: The product with several weights; `joined_stored_linear` is for those that are ``stored``, some
#: or all.
joined_linear, joined_stored_linear = (
    torch.library.custom_op(f"watersic::{name}", _as_given(_joined_linear), mutates_args=(), tags=t)
    for name, t in (("joined_linear", ()), ("joined_stored_linear", SYNCHRONISES))
)


@joined_linear.register_fake
@joined_stored_linear.register_fake
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
