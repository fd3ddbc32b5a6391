"""The checkpoint format: names, shapes and dtypes of the tensors that store a quantized layer.

Shapes: A = out_features (rows), N = in_features (columns).

A layer ``L`` with A rows and N columns is stored as three tensors (and its bias, if it has one):

==================  =========  ========  =====================================================
``L.weight``        (bytes,)   uint8     payload of the codec (`watersic_hf/codec/FORMAT.md`)
``L.row_scale``     (A,)       float16   scale of every row
``L.col_scale``     (N,)       float16   spacing times gain of every column; 0 = dead column
==================  =========  ========  =====================================================

Its weight is ``diag(row_scale) @ codes @ diag(col_scale)``.  The payload has the name of the dense
weight, so that a reader without this package finds a tensor of the wrong shape and refuses the
file.  Under another name the weight would be missing, and such a reader would initialize it at
random.  The header of the payload has a checksum of the two scales.

A module of experts ``M`` has a matrix for every expert and projection.  They are stored as layers
``M.packed.<expert>.gate_up`` (or ``up``) and ``M.packed.<expert>.down`` and replace the fused
``M.gate_up_proj`` and ``M.down_proj`` of the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.codec import Path
from watersic_hf.core import not_finite

#: Version of the checkpoint format: names, shapes, dtypes and meaning of the tensors above.
FORMAT_VERSION = 1

#: Name of the submodule of a module of experts that holds the matrices of the experts.
PACKED = "packed"

_SCALE_DTYPE = torch.float16
_SCALE_BITS = 16
#: Row scales have a median within 2^-10 .. 2^10.
_ROW_EXPONENT_LIMIT = 10


class CheckpointError(ValueError):
    """A stored layer is incomplete, damaged, or of a format that this version does not read."""


def tensor_specs(
    rows: int, columns: int, payload_bytes: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of every stored tensor of a layer, by its name within the layer.

    Args:
        rows: number of rows A.
        columns: number of columns N.
        payload_bytes: size of the payload in bytes.
    """
    return {
        "weight": ((payload_bytes,), torch.uint8),
        "row_scale": ((rows,), _SCALE_DTYPE),
        "col_scale": ((columns,), _SCALE_DTYPE),
    }


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """The stored form of one layer; see the module docstring for the three tensors."""

    weight: Tensor
    row_scale: Tensor
    col_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (A, N) of the layer's weight."""
        return len(self.row_scale), len(self.col_scale)

    @property
    def stored_bits(self) -> int:
        """Size of the three tensors on the disk, in bits."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, including scales, tables, classes, offsets and checksums."""
        return self.stored_bits / max(1, math.prod(self.shape))

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, by name within the layer."""
        return {"weight": self.weight, "row_scale": self.row_scale, "col_scale": self.col_scale}

    def verify(self, name: str) -> None:
        """Check the checksums of the payload and of the scales.

        Args:
            name: name of the layer, for the message.

        Raises:
            CheckpointError: a tensor is damaged; the message names the layer and the part.
        """
        try:
            codec.verify(self.weight, associated=_scale_bytes(self.row_scale, self.col_scale))
            header = codec.read_header(self.weight)
        except codec.CodecError as error:
            raise CheckpointError(
                f"{name}: the stored weight is damaged: {error}. Download or copy the file again."
            ) from error
        if (header.rows, header.cols) != self.shape:
            raise CheckpointError(
                f"{name}: the payload holds a {header.rows} x {header.cols} matrix, but the scales "
                f"are those of a {self.shape[0]} x {self.shape[1]} layer; the file mixes layers. "
                f"Download or copy it again."
            )


def pack_layer(
    codes_AN: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    *,
    path: Path | None = None,
    name: str,
) -> PackedLayer:
    """Encode the codes, round the scales to float16, and check that the payload decodes.

    Args:
        codes_AN: codes, or values of a trellis, any integer dtype.
        row_scale_A: scale of every row.
        col_scale_N: scale of every column.
        path: path of the values of a trellis; default: the layer has codes.
        name: name of the layer, for messages.

    Raises:
        CheckpointError: a scale is not finite, or the scales are too large or too small for float16
            however they are balanced between rows and columns.
    """
    row_scale, col_scale = _balanced_half_scales(row_scale_A, col_scale_N, name)
    codes_AN = codes_AN.cpu()
    payload = codec.encode(codes_AN, path=path, associated=_scale_bytes(row_scale, col_scale))
    if not torch.equal(codec.decode(payload), codes_AN.to(torch.int32)):
        raise CheckpointError(
            f"{name}: the payload does not decode to its codes; please report this."
        )
    return PackedLayer(weight=payload, row_scale=row_scale, col_scale=col_scale)


def rescale_layer(
    packed: PackedLayer, row_scale_A: Tensor, col_scale_N: Tensor, *, name: str
) -> PackedLayer:
    """Return a layer with the same codes and other scales, of the same size.

    The scales are rounded to float16 as they are, without balancing rows and columns.

    Args:
        packed: layer to take the codes from.
        row_scale_A: new scale of every row.
        col_scale_N: new scale of every column.
        name: name of the layer, for messages.

    Raises:
        CheckpointError: a scale is not finite in float16; the message names the layer.
        CodecError: the payload is damaged.
    """
    scales = {}
    for field, scale in (("row_scale", row_scale_A), ("col_scale", col_scale_N)):
        scales[field] = scale.cpu().to(_SCALE_DTYPE)
        bad = not_finite(scales[field])
        if bad:
            raise CheckpointError(
                f"{name}.{field}: {bad} of {scale.numel()} new scales are not finite in float16. "
                f"Finetune with a smaller learning rate."
            )
    payload = codec.reassociate(packed.weight, _scale_bytes(**scales))
    return PackedLayer(weight=payload, **scales)


def layer_charge(codes_AN: Tensor, rows: int, path: Path | None = None) -> float:
    """Return the predicted bits per weight of a stored layer; see `watersic_hf.core.rate.Charge`.

    Args:
        codes_AN: all codes of the layer, or a sample of its rows.
        rows: number of rows of the layer.
        path: path of the values of a trellis through these rows; default: the layer has codes.
    """
    columns = codes_AN.shape[1]
    bits = codec.payload_bits(codes_AN, rows=rows, path=path) + _SCALE_BITS * (rows + columns)
    return bits / max(1, rows * columns)


def stored_layers(
    headers: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the quantized layers of a checkpoint, in its order.

    A layer is quantized if the checkpoint has at least one of its three tensors.

    Args:
        headers: shape and safetensors dtype of every tensor, by name.

    Returns:
        For each layer, the shapes of its tensors by name within the layer.  In an incomplete
        checkpoint some of the three may be missing.  A dense ``weight`` is not included.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, dtype) in headers.items():
        layer, _, field = name.rpartition(".")
        is_payload = field == "weight" and dtype == "U8" and len(shape) == 1
        if is_payload or field in ("row_scale", "col_scale"):
            layers.setdefault(layer, {})[field] = shape
    return layers


def layer_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the shape (A, N) of a layer's weight, given the shapes of its stored tensors.

    A scale that is missing counts as empty.
    """
    rows, columns = (shapes.get(field, (0,))[0] for field in ("row_scale", "col_scale"))
    return rows, columns


def validate_layer(
    name: str, found: Mapping[str, tuple[int, ...]], rows: int, columns: int
) -> None:
    """Check the shapes of a layer's stored tensors against the layer of the model.

    Args:
        name: name of the layer, for messages.
        found: shape of every stored tensor, by its name within the layer.
        rows: number of rows A of the model's layer.
        columns: number of columns N of the model's layer.

    Raises:
        CheckpointError: a tensor is missing, or has a different shape than the model's layer.
    """
    payload_bytes = found.get("weight", (0,))[0]
    for field, (shape, _) in tensor_specs(rows, columns, payload_bytes).items():
        if field not in found:
            raise CheckpointError(
                f"{name}: the checkpoint has no tensor {name}.{field}, which a quantized layer "
                f"needs. The file is incomplete: save the model again, or download it again."
            )
        if tuple(found[field]) != shape:
            raise CheckpointError(
                f"{name}.{field}: the checkpoint has shape {tuple(found[field])}, but a layer of "
                f"{rows} x {columns} needs {shape}. The file belongs to another model."
            )


def _scale_bytes(row_scale: Tensor, col_scale: Tensor) -> bytes:
    """Return the bytes of the scales for the checksum in the payload: little-endian, rows first."""
    return b"".join(t.cpu().numpy().astype("<f2").tobytes() for t in (row_scale, col_scale))


def _median(scale: Tensor) -> float:
    """Return the median magnitude of the non-zero scales; 1 if all are zero."""
    magnitudes = scale[scale != 0].double().abs()
    return float(magnitudes.median()) if magnitudes.numel() else 1.0


def _median_exponent(scale: Tensor) -> int:
    return round(math.log2(_median(scale)))


def _balanced_half_scales(
    row_scale_A: Tensor, col_scale_N: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Round both scales to float16, after moving a power of two between them.

    Only the products of row and column scales matter, and a power of two changes no mantissa.  The
    column scales vary most.  Their median is moved to about 1, far from both ends of the range of
    float16, as long as the median of the row scales stays within 2^-10 .. 2^10.
    """
    for field, scale in (("row_scale", row_scale_A), ("col_scale", col_scale_N)):
        bad = not_finite(scale)
        if bad:
            raise CheckpointError(
                f"{name}.{field}: {bad} of {scale.numel()} scales are not finite. Quantize the "
                f"layer again with more calibration tokens or a larger `damping`."
            )
    row_exponent, col_exponent = (_median_exponent(s) for s in (row_scale_A, col_scale_N))
    total = row_exponent + col_exponent
    shift = min(max(total, -_ROW_EXPONENT_LIMIT), _ROW_EXPONENT_LIMIT) - row_exponent
    scales = []
    for field, scale, exponent in (
        ("row_scale", row_scale_A, shift),
        ("col_scale", col_scale_N, -shift),
    ):
        half = torch.ldexp(scale.double().cpu(), torch.tensor(exponent)).to(_SCALE_DTYPE)
        small = torch.finfo(_SCALE_DTYPE).smallest_normal
        if not_finite(half) or _median(half) < small:
            magnitudes = scale[scale != 0].abs()
            raise CheckpointError(
                f"{name}.{field}: scales from {float(magnitudes.min()):.3g} to "
                f"{float(magnitudes.max()):.3g} do not fit float16. Leave the layer dense with "
                f"`modules_to_not_convert`."
            )
        scales.append(half)
    return scales[0], scales[1]
