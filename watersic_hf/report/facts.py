"""What the files of a model's folder say, in the form that the page shows it."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import (
    LayerLocation,
    LayerReport,
    RunReport,
    kinds_of,
    location_of,
    read_report,
    read_run,
)
from watersic_hf.core import ColumnProfile

#: Of config.json's `quantization_config`, what is no choice of anybody's.
_NO_SETTINGS = ("quant_method", "left_dense", "modules_to_not_convert", "tables")


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A quantized layer; what the files do not say is None.  Bits are per weight."""

    number: int
    """Its place in `Facts.layers`."""
    name: str
    location: LayerLocation
    kind: int
    """Index into `Facts.kinds`."""
    rows: int
    columns: int
    bits: float
    payload_bits: float
    asked: float | None
    error: float | None
    tokens: int | None
    """Calibration tokens, of which an expert sees its share."""
    seconds: float | None
    pooled_entropy: float | None
    class_entropy: float | None
    profile: ColumnProfile | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A quantized model."""

    title: str
    architecture: str
    kinds: list[str]
    """What layers of all blocks share, as ``mlp.down_proj``, in the order of the model."""
    layers: list[LayerFacts]
    dense: list[dict[str, Any]]
    totals: dict[str, Any]
    tokens: int
    """Calibration tokens; 0 = quantized without data, or not known."""
    settings: dict[str, Any]
    run: RunReport | None

    @property
    def error(self) -> float | None:
        """Mean error of the layers' outputs, by weights; None where it is not known."""
        if any(layer.error is None for layer in self.layers):
            return None
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.error * layer.weights for layer in self.layers) / weights


def read_facts(folder: str | os.PathLike, found: Mapping[str, Any]) -> Facts:
    """What is known of a model.

    Args:
        folder: of the model.
        found: what `inspect_checkpoint` says of it.  Where it has decoded the layers, there are
            entropies, and profiles of the columns of layers whose report has none.
    """
    reports = {report.name: report for report in read_report(folder)}
    # files may have other names than the model; the model's are known better
    names = {report.stored_name: report.name for report in reports.values()}
    rows = [{**row, "name": names.get(row["name"], row["name"])} for row in found["layers"]]
    rows = _in_order(rows, list(reports))
    kinds = kinds_of(row["name"] for row in rows)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    config = _config(folder)
    settings = config.get("quantization_config", {})
    return Facts(
        title=Path(folder).resolve().name,
        architecture=", ".join(config.get("architectures") or ["unknown architecture"]),
        kinds=list(numbers),
        layers=[
            _layer(number, row, numbers[kind], reports.get(row["name"]))
            for number, (row, kind) in enumerate(zip(rows, kinds, strict=True))
        ],
        dense=found["dense"],
        totals=found["totals"],
        tokens=max((report.tokens for report in reports.values()), default=0),
        settings={k: v for k, v in settings.items() if k not in _NO_SETTINGS},
        run=read_run(folder),
    )


def _layer(
    number: int, row: Mapping[str, Any], kind: int, report: LayerReport | None
) -> LayerFacts:
    fields = ("name", "rows", "columns", "bits", "payload_bits", "pooled_entropy", "class_entropy")
    reported = {
        f: getattr(report, f, None) for f in ("asked", "error", "tokens", "seconds", "profile")
    }
    if reported["profile"] is None and row["profile"] is not None:
        reported["profile"] = ColumnProfile(**row["profile"])
    told = {field: row[field] for field in fields}
    return LayerFacts(
        number=number, location=location_of(row["name"]), kind=kind, **told, **reported
    )


def _in_order(
    rows: Sequence[Mapping[str, Any]], reported: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Stack by stack and block by block, within a block in the order of the reports."""
    names = [*reported, *(row["name"] for row in rows)]
    stacks = list(dict.fromkeys(location_of(name).stack for name in names))
    position = {name: number for number, name in reversed(list(enumerate(names)))}

    def key(row: Mapping[str, Any]) -> tuple[int, int, int]:
        location = location_of(row["name"])
        return stacks.index(location.stack), location.block, position[row["name"]]

    return sorted(rows, key=key)


def _config(folder: str | os.PathLike) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
