"""Weights in memory without their payload, whole or in part, for engines that shard models.

Shapes: A, N = rows and columns of the stored matrix, r = rows of a part, n = columns of a part.

A `PackedMatrix` keeps its payload, so that it can be saved.  An engine that only runs a model needs
one form of every weight, and under tensor parallelism only some of its rows or columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf import codec
from watersic_hf.checkpoint import CheckpointError, PackedLayer
from watersic_hf.nn import ops
from watersic_hf.nn.decoding import decode_part, decode_weight


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a stored matrix that one process holds."""

    rows_r: Tensor
    """Rows of the stored matrix in the order of the process, int64, on the CPU; none twice."""
    columns: slice
    """Columns of the stored matrix, with step 1."""

    @classmethod
    def whole(cls, shape: tuple[int, int]) -> "Part":
        """Return the whole of a matrix of this shape."""
        rows, columns = shape
        return cls(rows_r=torch.arange(rows, device="cpu"), columns=slice(0, columns))

    def is_whole(self, shape: tuple[int, int]) -> bool:
        """Return whether this is the whole of a matrix of this shape, in its own order."""
        rows, columns = shape
        return self.columns.indices(columns) == (0, columns, 1) and self.has_all_rows(rows)

    def has_all_rows(self, rows: int) -> bool:
        """Return whether these are all rows of the matrix, in its own order."""
        return len(self.rows_r) == rows and torch.equal(self.rows_r, torch.arange(rows))


@dataclass(frozen=True, kw_only=True)
class Form:
    """A part of a weight in one residency."""

    residency: str
    tensors: tuple[Tensor, ...]
    """``dense``: the weight, r x n.  ``stored``: the payload and the scales.  Others: the tensors
    of the layout and the scales."""


def form_of(
    packed: PackedLayer,
    part: Part,
    residency: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    name: str,
) -> Form:
    """Return a part of a stored matrix in the form of a residency.

    Only this part is decoded, except on devices that decode by themselves.

    Args:
        packed: the stored matrix.
        part: rows and columns to hold.
        residency: ``dense``, ``packed``, ``entropy`` or ``stored``.
        dtype: dtype of a dense weight.
        device: device of the tensors.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
        name: name of the layer, for messages.

    Raises:
        CheckpointError: the payload or a scale is damaged; the message names the layer.
    """
    packed.verify(name)
    try:
        if residency == "dense":
            scales = packed.row_scale.to(device), packed.col_scale.to(device)
            weight = decode_weight(packed.weight, scales, part.rows_r, part.columns, dtype, backend)
            return Form(residency=residency, tensors=(weight,))
        row_r = packed.row_scale[part.rows_r].to(device)
        col_n = packed.col_scale[part.columns].to(device)
        if residency == "stored" and part.is_whole(packed.shape):
            payload = packed.weight.to(device, copy=True)
            return Form(residency=residency, tensors=(payload, row_r, col_n))
        codes_rn = decode_part(packed.weight, part.rows_r, part.columns, device, backend)
        path = codec.read_path(packed.weight)
    except ValueError as error:
        raise CheckpointError(f"{name}: the stored weight cannot be decoded: {error}") from error
    if not part.has_all_rows(packed.shape[0]):
        # the path of a trellis visits all rows; its values are ordinary codes for some of them
        path = None
    if residency == "stored":
        payload = codec.encode(codes_rn, path=path).to(device)
        return Form(residency=residency, tensors=(payload, row_r, col_n))
    layout = ops.encode(codes_rn, residency, path).tensors()
    return Form(residency=residency, tensors=(*layout.values(), row_r, col_n))


class JoinedForms(nn.Module):
    """Weights with the same inputs, one below the other, each in a form of its own.

    Args:
        forms: the weights, from the first output to the last.
        rows: number of outputs; those beyond the weights are zero.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
    """

    def __init__(self, forms: list[Form], rows: int, backend: str = "auto") -> None:
        super().__init__()
        self.rows, self.backend = rows, backend
        self.kinds = ",".join(form.residency for form in forms)
        self.count = 0
        for form in forms:
            for tensor in form.tensors:
                self.register_buffer(f"tensor_{self.count}", tensor, persistent=False)
                self.count += 1

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all weights."""
        return [getattr(self, f"tensor_{i}") for i in range(self.count)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the products of `x`, (..., N), with all weights: (..., rows)."""
        stored = "stored" in self.kinds.split(",")
        multiply = ops.joined_stored_linear if stored else ops.joined_linear
        return multiply(x, self.kinds, self.tensors, self.rows, self.backend)

    def gather(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a single weight that is ``packed`` or ``stored``, (*index.shape, N)."""
        *layout, row_A, col_N = self.tensors
        if self.kinds == "packed":
            return ops.packed_rows(index, layout, row_A, col_N, dtype)
        return ops.payload_rows(index, layout[0], row_A, col_N, dtype)
