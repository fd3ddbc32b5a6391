"""What a folder holds: a row per quantized layer, and a check of every byte of it."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from watersic_hf import codec
from watersic_hf.checkpoint.files import (
    TensorHeader,
    checkpoint_files,
    read_headers,
    read_tensors,
    saved_settings,
)
from watersic_hf.checkpoint.schema import (
    PACKED,
    CheckpointError,
    PackedLayer,
    stored_layers,
    validate_layer,
)
from watersic_hf.core import ColumnProfile, column_profile, not_finite


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
    table: bool = False
    """Whether it is an embedding or an output head, whose bits are its own."""
    profile: ColumnProfile | None = None
    """What the columns spend, as seen from the codes."""


def inspect_checkpoint(
    folder: str | os.PathLike, *, decode: bool = True, renamed: Callable[[str], str] = str
) -> dict[str, Any]:
    """Decode every layer of a model folder, and add up what is stored.

    Args:
        folder: of the model.
        decode: False reads the files' headers only, and leaves out what takes the codes.
        renamed: what the model calls a module of the files, to find why it is dense; default: the
            same.

    Returns:
        ``layers``: a dict per layer with the fields of `LayerRow`; ``totals``: quantized layers
        and weights, average bits and entropies, all without embeddings and heads; these apart, as
        ``tables``; the bytes of all quantized and of the dense tensors; and the parameters of the
        whole model, with the bits that each of them takes;
        ``dense``: for every name of dense matrices, with ``*`` for numbers in it, how many there
        are, their bytes, and the reason if it is known.

    Raises:
        CheckpointError: a file or layer is damaged, or nothing in the folder is quantized.
    """
    headers = read_headers(checkpoint_files(folder))
    settings = saved_settings(folder)
    if decode:
        rows = [_row(name, layer) for name, layer in _layers(headers)]
    else:
        rows = [_row_of_headers(name, sh, headers) for name, sh in _shapes(headers).items()]
    names = settings.get("tables", ())
    rows = [replace(row, table=_named(row.name, names) is not None) for row in rows]
    layers, tables = ([row for row in rows if row.table is kind] for kind in (False, True))
    quantized = {f"{row.name}.{field}" for row in rows for field in PackedLayer.__annotations__}
    averages = ("bits", "payload_bits", *(("pooled_entropy", "class_entropy") if decode else ()))
    size = _size(headers)
    totals = {
        "layers": len(layers),
        "weights": _weights(layers),
        **{field: _average(layers, field) for field in averages},
        "tables": len(tables),
        "table_weights": _weights(tables),
        "table_bits": _average(tables, "bits"),
        "quantized_bytes": sum(h.nbytes for n, h in headers.items() if n in quantized),
        "dense_bytes": sum(h.nbytes for n, h in headers.items() if n not in quantized),
        "file_bytes": sum(file.stat().st_size for file in {h.file for h in headers.values()}),
        "model_parameters": size.parameters,
        "model_bits": size.bits,
    }
    dense = {n: h for n, h in headers.items() if n not in quantized and len(h.shape) > 1}
    return {
        "layers": [asdict(row) for row in rows],
        "dense": _dense_rows(dense, settings.get("left_dense", {}), renamed),
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


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model on the disk, quantized or not."""

    parameters: int
    """Weights, biases and all others; a quantized weight counts as what it stands for."""
    nbytes: int
    """Bytes of all tensors."""

    @property
    def bits(self) -> float:
        """Stored bits per parameter, of the whole model."""
        return 8 * self.nbytes / max(1, self.parameters)


def model_size(folder: str | os.PathLike) -> ModelSize:
    """The size of a model folder, read from the headers of its files.

    Raises:
        CheckpointError: a file is damaged, or there is none.
    """
    return _size(read_headers(checkpoint_files(folder)))


def _size(headers: Mapping[str, TensorHeader]) -> ModelSize:
    layers = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
    parameters = sum(math.prod(h.shape) for h in headers.values())
    for shapes in layers.values():
        scales = [shapes.get(field, (0,))[0] for field in ("row_scale", "col_scale")]
        parameters += math.prod(scales) - sum(scales) - shapes.get("weight", (0,))[0]
    return ModelSize(parameters=parameters, nbytes=sum(h.nbytes for h in headers.values()))


def _weights(rows: Iterable[LayerRow]) -> int:
    return sum(row.rows * row.columns for row in rows)


def _average(rows: Sequence[LayerRow], field: str) -> float:
    total = sum(getattr(row, field) * row.rows * row.columns for row in rows)
    return total / max(1, _weights(rows))


def _dense_rows(
    headers: Mapping[str, TensorHeader],
    reasons: Mapping[str, str],
    renamed: Callable[[str], str],
) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, header in headers.items():
        reason = reasons.get(_named(renamed(name.rpartition(".")[0]), reasons), "")
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason)
        row = rows.setdefault(key, {"name": key[0], "tensors": 0, "bytes": 0, "reason": reason})
        row["tensors"] += 1
        row["bytes"] += header.nbytes
    return list(rows.values())


def _named(module: str, names: Iterable[str]) -> str | None:
    """The name among `names` that means a module of the file.

    The file's name may have one prefix less, or some more; ``*`` in a name stands for numbers.  Of
    models of vision and language, files have the parts of a name in another order, or not all.
    """
    names = list(names)
    for name in names:
        pattern = re.escape(name).replace(r"\*", r"\d+")
        short = pattern.partition(r"\.")[2] or pattern
        if re.fullmatch(rf"(?:.*\.)?{pattern}|{short}", module):
            return name
    *inner, last = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module).split(".")
    for name in names:
        *parts, end = name.split(".")
        if end == last and set(inner) <= set(parts):
            return name
    return None


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
            if not_finite(scale):
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
