"""Decode payloads, whole or in part, on the device that is to hold the result.

Shapes: A = out_features, N = in_features, B = bytes of the payload, r, n = rows and columns of a
        part.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.nn.backends import kernels_on
from watersic_hf.nn.bands import SCRATCH_BYTES, scale_codes, weight_tiles


def decode(payload_B: Tensor, device: torch.device, backend: str) -> Tensor:
    """Return the codes of a payload, or the values of its trellis, A x N, int32, on a device.

    CUDA devices decode the payload themselves.

    Raises:
        CodecError: the payload is damaged.
        ImportError: `backend` is ``triton`` and Triton cannot be imported.
    """
    kernels = kernels_on(device, backend)
    if kernels is None:
        return codec.decode(payload_B).to(device)
    return decode_with(kernels.rans.decode_chunks, payload_B, device)


def decode_part(
    payload_B: Tensor, rows_r: Tensor, columns: slice, device: torch.device, backend: str
) -> Tensor:
    """Return the codes, or values, of some rows and columns of a payload, int32, on a device.

    CUDA devices decode the whole payload, and keep this part.

    Args:
        payload_B: the payload.
        rows_r: indices of rows, int64, on the CPU.
        columns: slice with step 1.
        device: device of the result.
        backend: one of `BACKENDS`.

    Raises:
        CodecError: the payload is damaged.
        ImportError: `backend` is ``triton`` and Triton cannot be imported.
    """
    if kernels_on(device, backend) is not None:
        return decode(payload_B, device, backend)[rows_r.to(device), columns].contiguous()
    ascending_r, order_r = rows_r.sort()
    codes_rN = codec.decode_rows(payload_B, ascending_r)
    codes_rn = codes_rN.new_empty(len(rows_r), len(range(codes_rN.shape[1])[columns]))
    codes_rn[order_r] = codes_rN[:, columns]
    return codes_rn.to(device)


def decode_weight(
    payload_B: Tensor,
    scales: tuple[Tensor, Tensor],
    rows_r: Tensor,
    columns: slice,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return some rows and columns of the dense weight of a payload, on the scales' device.

    Args:
        payload_B: the payload.
        scales: row scales and column scales of the whole weight.
        rows_r: indices of rows, int64, on the CPU; none twice.
        columns: slice with step 1.
        dtype: dtype of the weight.
        backend: one of `BACKENDS`.

    Raises:
        ValueError: the payload holds a matrix of another shape, or is damaged.
        ImportError: `backend` is ``triton`` and Triton cannot be imported.
    """
    row_scale_A, col_scale_N = scales
    device, col_n = row_scale_A.device, col_scale_N[columns]
    weight_rn = row_scale_A.new_empty((len(rows_r), len(col_n)), dtype=dtype)
    if kernels_on(device, backend) is None:
        place_A = torch.full((len(row_scale_A),), -1)
        place_A[rows_r] = torch.arange(len(rows_r))
        for rows, tile in weight_tiles(payload_B, *scales, dtype, wanted_A=place_A >= 0):
            weight_rn[place_A[rows.cpu()].to(device)] = tile[:, columns]
        return weight_rn
    codes_rn = decode_part(payload_B, rows_r, columns, device, backend)
    row_r = row_scale_A[rows_r.to(device)]
    for part in torch.arange(len(rows_r)).split(max(1, SCRATCH_BYTES // (4 * len(col_n)))):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        weight_rn[rows] = scale_codes(codes_rn[rows], row_r[rows], col_n, dtype)
    return weight_rn


def decode_with(
    decode_chunks: Callable[..., Tensor], payload_B: Tensor, device: torch.device
) -> Tensor:
    """Decode a payload with the kernel, which also works on a CPU in Triton's interpreter."""
    parts = codec.take_apart(payload_B)
    codes_AN = torch.empty(parts.header.rows, parts.header.cols, dtype=torch.int32, device=device)
    order_A = parts.order_A
    good_C = decode_chunks(
        [tensor.to(device) for tensor in parts.tensors],
        codes_AN if order_A is None else codes_AN.T,
        rows_per_lane=parts.header.rows_per_lane,
        cols_per_chunk=parts.header.cols_per_chunk,
        escape_words=parts.header.escape_words,
        order_N=None if order_A is None else order_A.to(device),
    )
    bad_C = (good_C == 0).nonzero().flatten()
    if len(bad_C):
        raise codec.CodecError(
            f"payload: chunk {int(bad_C[0])} is damaged: decoding it ended in a wrong state"
        )
    return codes_AN
