"""Compare two model folders: identical tensors, and the differences of the weights."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from watersic_hf import codec
from watersic_hf.checkpoint.files import (
    checkpoint_files,
    read_headers,
    read_tensors,
    saved_settings,
)
from watersic_hf.checkpoint.schema import (
    CheckpointError,
    PackedLayer,
    layer_shape,
    stored_layers,
    validate_layer,
)

#: Entries of the quantization config that are results and not settings.
_RESULTS = ("left_dense", "tables")


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """A layer that both models have and at least one has quantized.  Bits are per weight."""

    name: str
    weights: int
    bits_a: float
    bits_b: float
    identical: bool
    """Whether both models store it as the same tensors, byte for byte."""
    difference: float
    """Norm of the difference of the dequantized weights, relative to the norm of the first one."""


def compare_checkpoints(a: str | os.PathLike, b: str | os.PathLike) -> dict[str, Any]:
    """Compare two model folders, one of which may be dense.

    Only one layer at a time is held in memory.

    Args:
        a: folder of the first model.
        b: folder of the second model.

    Returns:
        A dict with the entries

        * ``layers``: for every layer, a dict with the fields of `LayerDifference`;
        * ``totals``: number of layers and weights, average bits of both models, root mean square
          of the differences (averaged over weights), and bytes of the files of both models;
        * ``settings``: both values of every quantization setting that differs, by name, if both
          models are quantized;
        * ``tensors``: the numbers of common tensors that are ``identical`` and ``different``, and
          the names of the tensors in ``only_a`` and ``only_b``.

    Raises:
        CheckpointError: a file or layer is damaged, a layer has different shapes, or the models
            have no layer in common that is quantized in one of them.
    """
    first, second = _Folder(a), _Folder(b)
    common = sorted(first.headers.keys() & second.headers.keys())
    same = {n for n in common if _same_bytes(n, first, second)}
    layers = [
        name
        for name in sorted(first.packed.keys() | second.packed.keys(), key=_natural)
        if first.holds(name) and second.holds(name)
    ]
    if not layers:
        raise CheckpointError(
            f"{a} and {b} have no layer in common that is quantized in one of them. Compare two "
            f"folders of the same model, at least one of them quantized with watersic_hf."
        )
    rows = [
        _difference(name, first, second, same)
        for name in tqdm(layers, desc="Comparing layers", delay=3, leave=False)
    ]
    weights = sum(row.weights for row in rows)

    def average(values: Iterator[float]) -> float:
        return sum(v * row.weights for v, row in zip(values, rows, strict=True)) / weights

    return {
        "layers": [asdict(row) for row in rows],
        "totals": {
            "layers": len(rows),
            "weights": weights,
            "bits_a": average(row.bits_a for row in rows),
            "bits_b": average(row.bits_b for row in rows),
            "difference": math.sqrt(average(row.difference**2 for row in rows)),
            "file_bytes_a": first.file_bytes,
            "file_bytes_b": second.file_bytes,
        },
        "settings": _different_settings(first.settings, second.settings),
        "tensors": {
            "identical": len(same),
            "different": len(common) - len(same),
            "only_a": sorted(first.headers.keys() - second.headers.keys(), key=_natural),
            "only_b": sorted(second.headers.keys() - first.headers.keys(), key=_natural),
        },
    }


class _Folder:
    """A model folder from which single layers are read."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.headers = read_headers(checkpoint_files(folder))
        self.packed = stored_layers({n: (h.shape, h.dtype) for n, h in self.headers.items()})
        self.file_bytes = sum(f.stat().st_size for f in {h.file for h in self.headers.values()})
        self.settings = saved_settings(folder)

    def holds(self, layer: str) -> bool:
        """Return whether the folder has a layer, quantized or dense."""
        return f"{layer}.weight" in self.headers

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor."""
        return read_tensors(self.headers[name].file, [name])[name]

    def tensors(self, layer: str) -> list[str]:
        """Return the names of the tensors that store the weight of a layer."""
        return [f"{layer}.{field}" for field in self.packed.get(layer, ("weight",))]

    def bits(self, layer: str, weights: int) -> float:
        """Return the stored bits per weight of a layer."""
        return 8 * sum(self.headers[n].nbytes for n in self.tensors(layer)) / weights

    def weight(self, layer: str) -> Tensor:
        """Return the weight of a layer, float32, dequantized if necessary."""
        if layer not in self.packed:
            return self.tensor(f"{layer}.weight").float()
        shapes = self.packed[layer]
        validate_layer(layer, shapes, *layer_shape(shapes))
        packed = PackedLayer(**{field: self.tensor(f"{layer}.{field}") for field in shapes})
        packed.verify(layer)
        scaled_AN = codec.decode(packed.weight) * packed.col_scale.float()
        return scaled_AN.mul_(packed.row_scale.float()[:, None])


def _same_bytes(name: str, a: _Folder, b: _Folder) -> bool:
    if a.headers[name][1:] != b.headers[name][1:]:
        return False
    return torch.equal(*(f.tensor(name).contiguous().view(-1).view(torch.uint8) for f in (a, b)))


def _difference(name: str, a: _Folder, b: _Folder, same: set[str]) -> LayerDifference:
    names = a.tensors(name)
    identical = names == b.tensors(name) and same.issuperset(names)
    weight_a = a.weight(name)
    difference = 0.0 if identical else _relative_difference(name, weight_a, b.weight(name))
    return LayerDifference(
        name=name,
        weights=weight_a.numel(),
        bits_a=a.bits(name, weight_a.numel()),
        bits_b=b.bits(name, weight_a.numel()),
        identical=identical,
        difference=difference,
    )


def _relative_difference(name: str, a: Tensor, b: Tensor) -> float:
    # the dense weight of GPT-2's Conv1D is stored transposed
    candidates = [w for w in (b, b.movedim(-1, 0)) if w.shape == a.shape]
    if not candidates:
        raise CheckpointError(
            f"{name}: the weight is {tuple(a.shape)} in the first model and {tuple(b.shape)} in "
            f"the second; only models of one architecture and size can be compared."
        )
    norm = float(a.norm())
    distance = min(float((a - candidate).norm()) for candidate in candidates)
    return distance / norm if norm > 0 else math.inf if distance > 0 else 0.0


def _different_settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    if not (a and b):
        return {}
    names = [name for name in a | b if name not in _RESULTS]
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
