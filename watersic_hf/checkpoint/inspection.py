"""Inspect a model folder: a row per quantized layer, the totals, and a check of every byte."""

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
    layer_shape,
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
    """Stored bits of the payload, without the scales."""
    pooled_entropy: float | None = None
    """Entropy of the histogram of all codes.  This and the fields below except `table` are None if
    the codes were not decoded."""
    class_entropy: float | None = None
    """Conditional entropy of the codes, given their row and column classes."""
    row_classes: int | None = None
    column_classes: int | None = None
    escapes: int | None = None
    max_abs_code: int | None = None
    table: bool = False
    """Whether the layer is a vocabulary matrix (an embedding or an output head).  Its bits are not
    part of the model's average."""
    profile: ColumnProfile | None = None
    """Rates of the columns, estimated from the codes."""


def inspect_checkpoint(
    folder: str | os.PathLike, *, decode: bool = True, renamed: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return the quantized layers of a model folder, the dense matrices, and the stored sizes.

    Args:
        folder: folder of the model.
        decode: whether to decode the codes; False reads only the headers of the files, and omits
            entropies, classes and profiles.  Default: True.
        renamed: function from the name of a module in the files to its name in the model, by which
            the reasons for dense layers are stored; default: the names are the same.

    Returns:
        A dict with the entries

        * ``layers``: for every quantized layer, a dict with the fields of `LayerRow`;
        * ``totals``: number of layers and weights, average bits and entropies, without vocabulary
          matrices; the numbers for vocabulary matrices (keys with ``table``); bytes of the
          quantized tensors, of the dense tensors and of the files; number of parameters of the
          whole model, and stored bits per parameter;
        * ``dense``: for every name of dense matrices, with ``*`` in place of numbers, their number,
          their bytes, and the reason why they are dense, if it is known.

    Raises:
        CheckpointError: a file or layer is damaged, or no layer of the folder is quantized.
    """
    headers = read_headers(checkpoint_files(folder))
    settings = saved_settings(folder)
    if decode:
        rows = [_row(name, layer) for name, layer in _layers(headers)]
    else:
        rows = [_row_of_headers(name, sh, headers) for name, sh in _shapes(headers).items()]
    vocabulary_names = settings.get("tables", ())
    rows = [replace(row, table=_named(row.name, vocabulary_names) is not None) for row in rows]
    layers = [row for row in rows if not row.table]
    vocabulary = [row for row in rows if row.table]
    quantized = {f"{row.name}.{field}" for row in rows for field in PackedLayer.__annotations__}
    averages = ("bits", "payload_bits", *(("pooled_entropy", "class_entropy") if decode else ()))
    size = _size(headers)
    totals = {
        "layers": len(layers),
        "weights": _weights(layers),
        **{field: _average(layers, field) for field in averages},
        "tables": len(vocabulary),
        "table_weights": _weights(vocabulary),
        "table_bits": _average(vocabulary, "bits"),
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
    """Merge the rows of all experts of a module into one row per kind of matrix.

    Args:
        layers: rows of `inspect_checkpoint`, with an additional entry ``error``, which is None if
            it is unknown.

    Returns:
        The merged rows, in the order of the layers.  In their names, ``*`` replaces the number of
        the expert, and the number of merged rows follows in parentheses.  As the experts of a
        module have the same size, the numbers are plain means, except for the largest code and the
        numbers of classes, which are maxima.
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
    """Size of a model on the disk, quantized or not."""

    parameters: int
    """Number of parameters; a quantized weight counts with its original number of elements."""
    nbytes: int
    """Bytes of all stored tensors."""

    @property
    def bits(self) -> float:
        """Stored bits per parameter of the whole model."""
        return 8 * self.nbytes / max(1, self.parameters)


def model_size(folder: str | os.PathLike) -> ModelSize:
    """Return the size of the model in a folder, read from the headers of the files.

    Args:
        folder: folder of the model.

    Raises:
        CheckpointError: a file is damaged, or there is none.
    """
    return _size(read_headers(checkpoint_files(folder)))


def _size(headers: Mapping[str, TensorHeader]) -> ModelSize:
    layers = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
    parameters = sum(math.prod(h.shape) for h in headers.values())
    for shapes in layers.values():
        scales = layer_shape(shapes)
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
    """Return the name, of those that the model uses, for a module of the files.

    The name in the files may lack the first component, or have additional ones in front.  In
    vision-language models it may also lack other components, or have them in another order.

    Args:
        module: name of the module in the files.
        names: names in the model, in which ``*`` stands for any number.

    Returns:
        The matching name, or None if there is none.
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
    """Check all checksums of all quantized layers, and decode the layers.

    Args:
        folder: folder of the model.

    Returns:
        The number of ``layers``, ``codes`` and ``bytes`` that were checked.

    Raises:
        CheckpointError: a layer is damaged; the message names the layer and the part.
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
            bad = not_finite(scale)
            if bad:
                raise CheckpointError(
                    f"{name}.{field}: {bad} of {scale.numel()} scales are not finite. Download or "
                    f"copy the file again."
                )
        checked["layers"] += 1
        checked["codes"] += codes.numel()
        checked["bytes"] += layer.stored_bits // 8
    return checked


def _shapes(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of every quantized layer, after a check."""
    layers = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
    if not layers:
        raise CheckpointError(
            "the checkpoint holds no layer that watersic_hf quantized. Choose the folder of a "
            "quantized model."
        )
    for name, shapes in layers.items():
        validate_layer(name, shapes, *layer_shape(shapes))
    return layers


def _layers(headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, PackedLayer]]:
    """Yield the names and tensors of the quantized layers, one at a time in memory."""
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
    rows, columns = layer_shape(shapes)
    weights = max(1, rows * columns)
    bits = 8 * sum(headers[f"{name}.{field}"].nbytes for field in shapes) / weights
    payload_bits = 8 * headers[f"{name}.weight"].nbytes / weights
    return LayerRow(name=name, rows=rows, columns=columns, bits=bits, payload_bits=payload_bits)


def _row(name: str, layer: PackedLayer) -> LayerRow:
    layer.verify(name)
    rows, columns = layer.shape
    codes_AN = codec.decode(layer.weight)
    path = codec.read_path(layer.weight)
    statistics = codec.code_statistics(codes_AN, path=path)
    deviation_N = codes_AN.float().square_().mean(0).sqrt_()
    return LayerRow(
        name=name,
        rows=rows,
        columns=columns,
        bits=layer.bits_per_weight,
        payload_bits=8 * len(layer.weight) / max(1, rows * columns),
        pooled_entropy=statistics.pooled_entropy,
        class_entropy=statistics.class_entropy,
        row_classes=statistics.row_classes,
        column_classes=statistics.col_classes,
        escapes=statistics.escapes,
        max_abs_code=statistics.max_abs,
        profile=column_profile(codes_AN, deviation_N, trellis=path is not None),
    )
