"""What a folder holds: a row per quantized layer, and a check of every byte of it."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from watersic_hf import codec
from watersic_hf.checkpoint.files import (
    TensorHeader,
    checkpoint_files,
    left_dense,
    read_headers,
    read_tensors,
)
from watersic_hf.checkpoint.schema import (
    PACKED,
    CheckpointError,
    PackedLayer,
    stored_layers,
    validate_layer,
)
from watersic_hf.core import ColumnProfile, column_profile


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One quantized layer of a checkpoint.  Bits and entropies are per weight."""

    name: str
    rows: int
    columns: int
    bits: float
    """Stored bits, everything included."""
    payload_bits: float
    """Stored bits of the payload: without the scales."""
    pooled_entropy: float | None = None
    """Entropy of one histogram of all codes; None, as all that follows, if nothing was decoded."""
    class_entropy: float | None = None
    """Entropy given the row and column classes."""
    row_classes: int | None = None
    column_classes: int | None = None
    escapes: int | None = None
    max_abs_code: int | None = None
    profile: ColumnProfile | None = None
    """What the columns spend, as seen from the codes."""


def inspect_checkpoint(folder: str | os.PathLike, *, decode: bool = True) -> dict[str, Any]:
    """Decode every layer of a model folder, and add up what is stored.

    Args:
        folder: of the model.
        decode: False reads the files' headers only, and leaves out what takes the codes.

    Returns:
        ``layers``: a dict per layer with the fields of `LayerRow`; ``totals``: quantized layers
        and weights, average bits and entropies, bytes of the quantized and of the dense tensors;
        ``dense``: for every name of dense matrices, with ``*`` for numbers in it, how many there
        are, their bytes, and the reason if it is known.

    Raises:
        CheckpointError: a file or layer is damaged, or nothing in the folder is quantized.
    """
    headers = read_headers(checkpoint_files(folder))
    if decode:
        rows = [_row(name, layer) for name, layer in _layers(headers)]
    else:
        rows = [_row_of_headers(name, sh, headers) for name, sh in _shapes(headers).items()]
    weights = sum(row.rows * row.columns for row in rows)

    def average(field: str) -> float:
        return sum(getattr(row, field) * row.rows * row.columns for row in rows) / max(1, weights)

    quantized = {f"{row.name}.{field}" for row in rows for field in PackedLayer.__annotations__}
    averages = ("bits", "payload_bits", *(("pooled_entropy", "class_entropy") if decode else ()))
    totals = {
        "layers": len(rows),
        "weights": weights,
        **{field: average(field) for field in averages},
        "quantized_bytes": sum(h.nbytes for n, h in headers.items() if n in quantized),
        "dense_bytes": sum(h.nbytes for n, h in headers.items() if n not in quantized),
        "file_bytes": sum(file.stat().st_size for file in {h.file for h in headers.values()}),
    }
    dense = {n: h for n, h in headers.items() if n not in quantized and len(h.shape) > 1}
    return {
        "layers": [asdict(row) for row in rows],
        "dense": _dense_rows(dense, left_dense(folder)),
        "totals": totals,
    }


def experts_together(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for the matrices of one kind of all experts of a module, for a table.

    Args:
        layers: rows of `inspect_checkpoint`, with ``error`` added, None where it is not known.

    Returns:
        The rows, in their order; an expert's number is ``*``, and how many there are stands behind
        the name.  Experts have one size, so numbers are plain means, but for the largest code and
        the number of classes, which are maxima.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in layers:
        groups.setdefault(re.sub(rf"(\.{PACKED}\.)\d+(?=\.)", r"\1*", row["name"]), []).append(row)
    found = []
    for name, rows in groups.items():
        errors = [row["error"] for row in rows if row["error"] is not None]
        means = ("bits", "pooled_entropy", "class_entropy", "payload_bits")
        largest = ("row_classes", "column_classes", "max_abs_code")
        together = {
            "name": name if len(rows) == 1 else f"{name} ({len(rows)})",
            "rows": rows[0]["rows"],
            "columns": rows[0]["columns"],
            "error": sum(errors) / len(errors) if errors else None,
        }
        together |= {key: sum(row[key] for row in rows) / len(rows) for key in means}
        found.append(together | {key: max(row[key] for row in rows) for key in largest})
    return found


def _dense_rows(
    headers: Mapping[str, TensorHeader], reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, header in headers.items():
        reason = _reason(name.rpartition(".")[0], reasons)
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason)
        row = rows.setdefault(key, {"name": key[0], "tensors": 0, "bytes": 0, "reason": reason})
        row["tensors"] += 1
        row["bytes"] += header.nbytes
    return list(rows.values())


def _reason(module: str, reasons: Mapping[str, str]) -> str:
    """The reason for a module; its name in the file may have one prefix less, or some more."""
    for name, reason in reasons.items():
        pattern = re.escape(name).replace(r"\*", r"\d+")
        short = pattern.partition(r"\.")[2] or pattern
        if re.fullmatch(rf"(?:.*\.)?{pattern}|{short}", module):
            return reason
    return ""


def verify_checkpoint(folder: str | os.PathLike) -> dict[str, int]:
    """Check every checksum of every layer, and decode all of it.

    Returns:
        How many layers, codes and bytes were checked.

    Raises:
        CheckpointError: something is damaged; the message names the layer and the part.
    """
    headers = read_headers(checkpoint_files(folder))
    checked = {"layers": 0, "codes": 0, "bytes": 0}
    for name, layer in _layers(headers):
        layer.verify(name)
        try:
            codes = codec.decode(layer.weight)
        except codec.CodecError as error:
            raise CheckpointError(f"{name}: {error}") from error
        for field, scale in (("row_scale", layer.row_scale), ("col_scale", layer.col_scale)):
            if not torch.isfinite(scale).all():
                raise CheckpointError(f"{name}.{field}: the scales are not all finite")
        checked["layers"] += 1
        checked["codes"] += codes.numel()
        checked["bytes"] += layer.stored_bits // 8
    return checked


def _shapes(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of every quantized layer of a checkpoint."""
    layers = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
    if not layers:
        raise CheckpointError("the checkpoint holds no layer that watersic_hf quantized")
    for name, shapes in layers.items():
        validate_layer(name, shapes, *_layer_shape(shapes))
    return layers


def _layer_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    rows, columns = (shapes.get(field, (0,))[0] for field in ("row_scale", "col_scale"))
    return rows, columns


def _layers(headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, PackedLayer]]:
    """The quantized layers of a checkpoint, one at a time in memory."""
    layers = _shapes(headers)
    for name, shapes in tqdm(layers.items(), desc="Reading layers", delay=3, leave=False):
        tensors = {}
        for field in shapes:
            key = f"{name}.{field}"
            tensors[field] = read_tensors(headers[key].file, [key])[key]
        yield name, PackedLayer(**tensors)


def _row_of_headers(
    name: str, shapes: Mapping[str, tuple[int, ...]], headers: Mapping[str, TensorHeader]
) -> LayerRow:
    rows, columns = _layer_shape(shapes)
    weights = max(1, rows * columns)
    bits = 8 * sum(headers[f"{name}.{field}"].nbytes for field in shapes) / weights
    payload_bits = 8 * headers[f"{name}.weight"].nbytes / weights
    return LayerRow(name=name, rows=rows, columns=columns, bits=bits, payload_bits=payload_bits)


def _row(name: str, layer: PackedLayer) -> LayerRow:
    layer.verify(name)
    rows, columns = layer.shape
    codes_AN = codec.decode(layer.weight)
    statistics = codec.code_statistics(codes_AN)
    return LayerRow(
        name=name, rows=rows, columns=columns, bits=layer.bits_per_weight,
        payload_bits=8 * len(layer.weight) / max(1, rows * columns),
        pooled_entropy=statistics.pooled_entropy, class_entropy=statistics.class_entropy,
        row_classes=statistics.row_classes, column_classes=statistics.col_classes,
        escapes=statistics.escapes, max_abs_code=statistics.max_abs,
        profile=column_profile(codes_AN, codes_AN.float().square_().mean(0).sqrt_()),
    )  # fmt: skip
