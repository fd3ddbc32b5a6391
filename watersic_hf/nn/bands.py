"""Dense weights, some rows at a time.

Shapes: A = out_features, N = in_features, B = bytes of the payload, r = rows of a band.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.nn.layouts import LAYOUTS

#: Upper bound, in bytes, on the dense weights that are held at a time.
SCRATCH_BYTES = 32 << 20


def coded_bands(
    residency: str,
    layout: Sequence[Tensor],
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the dense weight some rows at a time: their indices and the rows, r x N.

    The arguments are those of `coded_linear`, and the dtype of the result.
    """
    kind = LAYOUTS[residency]
    coded = kind.codes.of(layout, rows=len(row_scale_A), columns=len(col_scale_N))
    for rows, codes_rN in kind.bands(coded):
        yield rows, scale_codes(codes_rN, row_scale_A[rows], col_scale_N, dtype)


def weight_tiles(
    payload_B: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    dtype: torch.dtype,
    wanted_A: Tensor | None = None,
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield the dense weight of a payload as `coded_bands` does.

    Args:
        payload_B: the payload.
        row_scale_A: row scales.
        col_scale_N: column scales.
        dtype: dtype of the weight.
        wanted_A: whether a row is wanted, on the CPU; default: all are.

    Raises:
        ValueError: the payload holds a matrix of another shape.
        CodecError: the payload is damaged.
    """
    A, N = len(row_scale_A), len(col_scale_N)
    payload_B = payload_B.cpu()
    header = codec.read_header(payload_B)
    if (header.rows, header.cols) != (A, N):
        raise ValueError(
            f"dequantize: the payload holds {header.rows} x {header.cols} codes, "
            f"but the scales are those of a {A} x {N} layer"
        )
    for rows in _tile_rows(payload_B, header):
        if wanted_A is not None:
            rows = torch.arange(A)[rows] if isinstance(rows, slice) else rows
            rows = rows[wanted_A[rows]]
            if not len(rows):
                continue
        if isinstance(rows, slice):
            codes_rN = codec.decode(payload_B, rows=rows)
        else:
            codes_rN = codec.decode_rows(payload_B, rows)
            rows = rows.to(row_scale_A.device)
        codes_rN = codes_rN.to(row_scale_A.device)
        yield rows, scale_codes(codes_rN, row_scale_A[rows], col_scale_N, dtype)


def _tile_rows(payload_B: Tensor, header: codec.Header) -> Iterator[slice | Tensor]:
    """Yield the rows of every tile, in ascending order.

    Tiles are complete bands, or paths of a trellis, so that no chunk is decoded twice.
    """
    geometry = header.geometry
    # the columns of a chunk of a trellis are the rows of a path
    band = geometry.cols_per_chunk if header.trellis else geometry.band_rows
    band *= max(1, SCRATCH_BYTES // (4 * max(1, header.cols) * band))
    whole = band >= header.rows
    order_A = None if whole or not header.trellis else codec.read_path(payload_B).order_A
    for start in range(0, header.rows, band):
        rows = slice(start, min(start + band, header.rows))
        yield rows if order_A is None else order_A[rows].sort().values


def scale_codes(
    codes_AN: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``diag(row) @ codes @ diag(col)``, computed in float32, rounded once to `dtype`."""
    return (codes_AN * col_scale_N.float()).mul_(row_scale_A[:, None].float()).to(dtype)
