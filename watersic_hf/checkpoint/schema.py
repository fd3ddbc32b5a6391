"""Names, shapes and dtypes of the tensors that a quantized layer is stored as.

Shapes: A = out_features (rows), N = in_features (columns).

A layer ``L`` with A rows and N columns is three tensors (and its bias, if it has one):

==================  =========  ========  =====================================================
``L.weight``        (bytes,)   uint8     the codec's payload (`watersic_hf/codec/FORMAT.md`)
``L.row_scale``     (A,)       float16   scale of every row
``L.col_scale``     (N,)       float16   step of every column times its gain; 0 = dead column
==================  =========  ========  =====================================================

and its weight is ``diag(row_scale) @ codes @ diag(col_scale)``.  The payload stands under the name
of the dense weight, as a vector of bytes, so that a reader without this package finds a tensor of
the wrong shape and refuses the file, instead of not finding the weight and inventing one.  The
payload's header carries a checksum of the two scales.

A module of experts ``M`` holds a matrix for every expert and projection, stored as layers
``M.packed.<expert>.gate_up`` (or ``up``) and ``M.packed.<expert>.down`` in the place of the model's
fused ``M.gate_up_proj`` and ``M.down_proj``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.core import not_finite

#: Version of the checkpoint: the names, shapes, dtypes and meaning of the tensors above.
FORMAT_VERSION = 1

#: Name, in a module of experts, of what holds the matrices of each.
PACKED = "packed"

_SCALE_DTYPE = torch.float16
_SCALE_BITS = 16
_ROW_EXPONENT_LIMIT = 10


class CheckpointError(ValueError):
    """A stored layer is incomplete, damaged, or of a format that this version does not read."""


def tensor_specs(
    rows: int, columns: int, payload_bytes: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor of a layer, by its name within the layer."""
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
        """(A, N) of the layer's weight."""
        return len(self.row_scale), len(self.col_scale)

    @property
    def stored_bits(self) -> int:
        """Bits that the three tensors take on the disk."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales, tables, classes, offsets and checksums included."""
        return self.stored_bits / max(1, math.prod(self.shape))

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by name within the layer."""
        return {"weight": self.weight, "row_scale": self.row_scale, "col_scale": self.col_scale}

    def verify(self, name: str) -> None:
        """Check every checksum, of the payload and of the scales.

        Raises:
            CheckpointError: something is damaged; the message names the layer and the part.
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
                f"are those of a {self.shape[0]} x {self.shape[1]} layer; the file mixes layers."
            )


def pack_layer(
    codes_AN: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, *, name: str
) -> PackedLayer:
    """Encode the codes, round the scales to 16 bits, and prove that the codes come back.

    Raises:
        CheckpointError: a scale is not finite, or too large or small for float16 in any split
            between rows and columns.
    """
    row_scale, col_scale = _balanced_half_scales(row_scale_A, col_scale_N, name)
    codes_AN = codes_AN.cpu()
    payload = codec.encode(codes_AN, associated=_scale_bytes(row_scale, col_scale))
    if not torch.equal(codec.decode(payload), codes_AN.to(torch.int32)):
        raise CheckpointError(f"{name}: the codec did not give the codes back; please report this.")
    return PackedLayer(weight=payload, row_scale=row_scale, col_scale=col_scale)


def rescale_layer(
    packed: PackedLayer, row_scale_A: Tensor, col_scale_N: Tensor, *, name: str
) -> PackedLayer:
    """The same codes under other scales, rounded to 16 bits; no tensor changes its size.

    The split between rows and columns stays as it is given.

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


def layer_charge(codes_AN: Tensor, rows: int) -> float:
    """Stored bits per weight of a layer of `rows` rows whose codes look like `codes_AN`."""
    columns = codes_AN.shape[1]
    bits = codec.payload_bits(codes_AN, rows=rows) + _SCALE_BITS * (rows + columns)
    return bits / max(1, rows * columns)


def stored_layers(
    headers: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The layers of which a checkpoint holds at least one packed tensor, in its order.

    Args:
        headers: shape and safetensors dtype of every tensor, by name.

    Returns:
        For each layer the shapes of its packed tensors, by name within the layer: all three of
        them, unless the checkpoint is incomplete.  A dense ``weight`` is none of them.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, dtype) in headers.items():
        layer, _, field = name.rpartition(".")
        is_payload = field == "weight" and dtype == "U8" and len(shape) == 1
        if is_payload or field in ("row_scale", "col_scale"):
            layers.setdefault(layer, {})[field] = shape
    return layers


def validate_layer(
    name: str, found: Mapping[str, tuple[int, ...]], rows: int, columns: int
) -> None:
    """Check the shapes of a layer's stored tensors against the layer of the model.

    Args:
        name: the layer, for the messages.
        found: shape of each stored tensor, by its name within the layer.
        rows: A of the model's layer.
        columns: N of the model's layer.

    Raises:
        CheckpointError: a tensor is missing, or its shape is not that of the model's layer.
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
    """The bytes that a payload's checksum binds to its codes (little-endian, rows first)."""
    return b"".join(t.cpu().numpy().astype("<f2").tobytes() for t in (row_scale, col_scale))


def _median(scale: Tensor) -> float:
    """Median magnitude of the scales that are not zero; 1 if all are."""
    magnitudes = scale[scale != 0].double().abs()
    return float(magnitudes.median()) if magnitudes.numel() else 1.0


def _median_exponent(scale: Tensor) -> int:
    return round(math.log2(_median(scale)))


def _balanced_half_scales(
    row_scale_A: Tensor, col_scale_N: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """Round both scales to float16, after a power of two moved between them.

    The split between rows and columns is free, and a power of two changes no mantissa.  Columns
    differ most, so their median goes to 1, far from both ends of float16, as long as the rows,
    which take the rest, stay within 2^-10 .. 2^10.
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
