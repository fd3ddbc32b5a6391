"""Operators on packed layers: the only module that chooses between implementations.

Shapes: A = out_features, N = in_features, B = bytes of the payload; x has any leading dimensions.

Every operator is registered with torch under ``watersic::``, with a reference that runs on any
device and a fake for tracing, so that compiled and exported models call it as one opaque node.
The reference decodes a band of rows at a time into scratch memory of about `SCRATCH_BYTES`.

`coded_linear`, `decode` and `block_step` have Triton kernels on CUDA.  Their `backend` is
``triton``, ``reference`` (the same without kernels, to compare with), or ``auto``: Triton where it
can be imported, and where it cannot, the reference, with a warning.
"""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.core import BlockStep, zsic_block
from watersic_hf.nn import prefix
from watersic_hf.nn.packing import PackedCodes, pack_codes, unpack_bands, unpack_rows
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.nn.tiles import TiledCodes

logger = logging.getLogger(__name__)

#: What runs on compressed weights; see the module docstring.
BACKENDS = ("auto", "triton", "reference")
#: Environment variable with the backend of those who name none.
BACKEND_VARIABLE = "WATERSIC_BACKEND"

#: The residencies that lay codes out anew, and how.
LAYOUTS: dict[str, type[TiledCodes]] = {"packed": PackedCodes, "entropy": prefix.PrefixCodes}

#: Bound on the dense weights that the reference holds at a time.
SCRATCH_BYTES = 32 << 20


@torch.library.custom_op("watersic::dequantize", mutates_args=())
def dequantize(
    payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Dense weight ``diag(row) @ codes @ diag(col)``, computed in float32, rounded once to `dtype`.

    Returns:
        The weight, A x N, on the device of the scales.

    Raises:
        ValueError: the payload holds a matrix of another shape.
        CodecError: the payload is damaged.
    """
    weight_AN = row_scale_A.new_empty((len(row_scale_A), len(col_scale_N)), dtype=dtype)
    for rows, tile in _weight_tiles(payload_B, row_scale_A, col_scale_N, dtype):
        weight_AN[rows] = tile
    return weight_AN


@dequantize.register_fake
def _(payload_B, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((row_scale_A.shape[0], col_scale_N.shape[0]), dtype=dtype)


@torch.library.custom_op("watersic::dequant_linear", mutates_args=())
def dequant_linear(
    x: Tensor, payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Return ``x @ W.T`` with W the dense weight of the payload, in the dtype of `x`.

    W is never whole in memory.  Differentiable in `x`.

    Raises:
        ValueError: x does not end in N entries, or the payload holds a matrix of another shape.
        CodecError: the payload is damaged.
    """
    A, N = len(row_scale_A), len(col_scale_N)
    if x.shape[-1:] != (N,):
        raise ValueError(
            f"dequant_linear: x has shape {tuple(x.shape)}, but a layer of {A} x {N} needs "
            f"(..., {N})"
        )
    y = x.new_empty((*x.shape[:-1], A))
    for rows, tile in _weight_tiles(payload_B, row_scale_A, col_scale_N, x.dtype):
        y[..., rows] = x @ tile.T
    return y


@dequant_linear.register_fake
def _(x, payload_B, row_scale_A, col_scale_N):
    return x.new_empty((*x.shape[:-1], row_scale_A.shape[0]))


@torch.library.custom_op("watersic::dequant_linear_backward", mutates_args=())
def dequant_linear_backward(
    grad_y: Tensor, payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor
) -> Tensor:
    """Gradient of `dequant_linear` in x: ``grad_y @ W``, summed over tiles in float32 or wider."""
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    grad_x = grad_y.new_zeros((*grad_y.shape[:-1], len(col_scale_N)), dtype=wide)
    for rows, tile in _weight_tiles(payload_B, row_scale_A, col_scale_N, grad_y.dtype):
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
def coded_linear(
    x: Tensor,
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    backend: str,
) -> Tensor:
    """Return ``x @ W.T`` with the codes of W as `residency` has them, in the dtype of `x`.

    `layout` is `TiledCodes.tensors` of the class that `LAYOUTS` has for the residency, in their
    order.  Differentiable in `x`.

    Raises:
        ValueError: x does not end in N entries.
        ImportError: `backend` is ``triton``, and it cannot be imported.
    """
    A, N = len(row_scale_A), len(col_scale_N)
    if x.shape[-1:] != (N,):
        raise ValueError(
            f"coded_linear: x has shape {tuple(x.shape)}, but a layer of {A} x {N} needs (..., {N})"
        )
    if x.is_cuda and backend != "reference":
        kernels = _kernels(backend)
        if kernels is not None:
            arguments = (x.reshape(-1, N), *layout, row_scale_A, col_scale_N)
            if residency == "packed":
                y_MA = kernels.packed.packed_linear(*arguments)
            else:
                tables_TW = prefix_tables(x.device).entries_TW
                y_MA = kernels.prefix.prefix_linear(*arguments, tables_TW=tables_TW)
            return y_MA.view(*x.shape[:-1], A)
    y = x.new_empty((*x.shape[:-1], A))
    for rows, weight_rN in coded_bands(residency, layout, row_scale_A, col_scale_N, x.dtype):
        y[..., rows] = x @ weight_rN.T
    return y


@coded_linear.register_fake
def _(x, residency, layout, row_scale_A, col_scale_N, backend):
    return x.new_empty((*x.shape[:-1], row_scale_A.shape[0]))


@torch.library.custom_op("watersic::coded_linear_backward", mutates_args=())
def coded_linear_backward(
    grad_y: Tensor,
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
) -> Tensor:
    """Gradient of `coded_linear` in x: ``grad_y @ W``, summed over bands in float32 or wider."""
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


@torch.library.custom_op("watersic::payload_rows", mutates_args=())
def payload_rows(
    index: Tensor,
    payload_B: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the dense weight by number, each of any number as often as it is asked for.

    Only the chunks of the payload that hold these rows are decoded.

    Returns:
        Rows in `dtype`, the shape of `index` times N, on its device.

    Raises:
        IndexError: there is no row of a number.
        CodecError: the payload is damaged.
    """
    rows_U, where = torch.unique(index, return_inverse=True)
    codes_UN = codec.decode_rows(payload_B, rows_U.cpu()).to(index.device)
    return scale_codes(codes_UN, row_scale_A[rows_U], col_scale_N, dtype)[where]


@payload_rows.register_fake
def _(index, payload_B, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((*index.shape, col_scale_N.shape[0]), dtype=dtype)


@torch.library.custom_op("watersic::packed_rows", mutates_args=())
def packed_rows(
    index: Tensor,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As `payload_rows`, of packed codes: `layout` is `PackedCodes.tensors`, in their order."""
    packed = PackedCodes.of(layout, rows=len(row_scale_A), columns=len(col_scale_N))
    rows_U = index.flatten()
    codes_UN = unpack_rows(packed, rows_U)
    rows_UN = scale_codes(codes_UN, row_scale_A[rows_U], col_scale_N, dtype)
    return rows_UN.view(*index.shape, len(col_scale_N))


@packed_rows.register_fake
def _(index, layout, row_scale_A, col_scale_N, dtype):
    return row_scale_A.new_empty((*index.shape, col_scale_N.shape[0]), dtype=dtype)


@functools.cache
def _kernels(backend: str) -> ModuleType | None:
    """The Triton kernels; None if they cannot be imported and need not be."""
    try:
        import watersic_kernels.packed
        import watersic_kernels.prefix
        import watersic_kernels.rans
        import watersic_kernels.zsic
    except ImportError as error:
        if backend == "triton":
            raise
        logger.warning(
            "Triton's kernels cannot be imported: %s. Layers are quantized, and compressed weights "
            "multiplied, by slow references. Install triton; for products, the residency `dense` "
            "needs no kernel.",
            error,
        )
        return None
    return watersic_kernels


def decode(payload_B: Tensor, device: torch.device, backend: str) -> Tensor:
    """The codes of a payload, A x N, int32, on a device; decoded there if it is a CUDA device.

    Raises:
        CodecError: the payload is damaged.
        ImportError: `backend` is ``triton``, and it cannot be imported.
    """
    kernels = _kernels(backend) if device.type == "cuda" and backend != "reference" else None
    if kernels is None:
        return codec.decode(payload_B).to(device)
    parts = codec.take_apart(payload_B)
    codes_AN = torch.empty(parts.header.rows, parts.header.cols, dtype=torch.int32, device=device)
    good_C = kernels.rans.decode_chunks(
        *(tensor.to(device) for tensor in parts.tensors),
        codes_AN,
        rows_per_lane=parts.header.rows_per_lane,
        cols_per_chunk=parts.header.cols_per_chunk,
        escape_words=parts.header.escape_words,
    )
    bad_C = (good_C == 0).nonzero().flatten()
    if len(bad_C):
        raise codec.CodecError(f"payload: chunk {int(bad_C[0])} does not end where and as it must")
    return codes_AN


def block_step(device: torch.device) -> BlockStep:
    """What `watersic_hf.core.zsic` quantizes a block of columns with on a device.

    Raises:
        ImportError: the backend is ``triton``, and it cannot be imported.
    """
    backend = os.environ.get(BACKEND_VARIABLE, "auto")
    kernels = _kernels(backend) if device.type == "cuda" and backend != "reference" else None
    return zsic_block if kernels is None else kernels.zsic.quantize_block


def encode(codes_AN: Tensor, residency: str) -> TiledCodes:
    """The layout that a residency has for codes, on their device.

    Raises:
        ValueError: there is no code.
    """
    return pack_codes(codes_AN) if residency == "packed" else prefix.encode_codes(codes_AN)


def coded_bands(
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the dense weight after another, each with their numbers."""
    bands = unpack_bands if residency == "packed" else prefix.decode_bands
    coded = LAYOUTS[residency].of(layout, rows=len(row_scale_A), columns=len(col_scale_N))
    for rows, codes_rN in bands(coded):
        yield rows, scale_codes(codes_rN, row_scale_A[rows], col_scale_N, dtype)


def _weight_tiles(
    payload_B: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Bands of rows of the dense weight, each with the slice of rows that it fills."""
    A, N = len(row_scale_A), len(col_scale_N)
    payload_B = payload_B.cpu()
    header = codec.read_header(payload_B)
    if (header.rows, header.cols) != (A, N):
        raise ValueError(
            f"dequantize: the payload holds {header.rows} x {header.cols} codes, "
            f"but the scales are those of a {A} x {N} layer"
        )
    # a range of rows that starts at a multiple of the band splits no chunk
    band = header.geometry.band_rows
    band *= max(1, SCRATCH_BYTES // (4 * max(1, N) * band))
    for start in range(0, A, band):
        rows = slice(start, min(start + band, A))
        codes = codec.decode(payload_B, rows=rows).to(row_scale_A.device)
        yield rows, scale_codes(codes, row_scale_A[rows], col_scale_N, dtype)


def scale_codes(
    codes_AN: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``diag(row) @ codes @ diag(col)``, computed in float32, rounded once to `dtype`."""
    return (row_scale_A[:, None].float() * (codes_AN * col_scale_N.float())).to(dtype)
