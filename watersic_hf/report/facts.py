"""Facts about a quantized model, read from its folder, in the form in which the page shows them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import (
    CheckReport,
    LayerLocation,
    LayerReport,
    RunReport,
    kinds_of,
    location_of,
    read_check,
    read_report,
    read_run,
    with_reports,
)
from watersic_hf.core import ColumnProfile

#: Entries of `quantization_config` in config.json that are results, not settings.
_NO_SETTINGS = ("quant_method", "left_dense", "modules_to_not_convert", "tables")


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A quantized layer.  Bits are per weight; None = not recorded in the folder."""

    number: int
    """Index into `Facts.layers`."""
    name: str
    location: LayerLocation
    kind: int
    """Index into `Facts.kinds`."""
    rows: int
    columns: int
    bits: float
    """Stored bits, including scales and metadata."""
    payload_bits: float
    """Stored bits without the scales."""
    target: float | None
    """Bits that the budget allotted to the layer."""
    error: float | None
    """Relative squared error of the layer's output; 0 = not measured."""
    tokens: int | None
    """Calibration tokens; for an expert, those routed to it."""
    seconds: float | None
    pooled_entropy: float | None
    """Entropy of a single histogram of all codes."""
    class_entropy: float | None
    """Entropy of the codes given their row and column classes."""
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
    """Names of the layers within their blocks, such as ``mlp.down_proj``, in model order."""
    layers: list[LayerFacts]
    dense: list[dict[str, Any]]
    """Rows about the dense matrices, as `inspect_checkpoint` returns them."""
    totals: dict[str, Any]
    """Totals of the model, as `inspect_checkpoint` returns them."""
    tokens: int
    """Calibration tokens; 0 = quantized without data, or not recorded."""
    settings: dict[str, Any]
    run: RunReport | None
    check: CheckReport | None = None

    @property
    def error(self) -> float | None:
        """Mean error of the layers' outputs, weighted by size; None if any error is unknown."""
        if any(layer.error is None for layer in self.layers):
            return None
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.error * layer.weights for layer in self.layers) / weights


def read_facts(folder: str | os.PathLike, found: Mapping[str, Any]) -> Facts:
    """Collect what is known about a model.

    Args:
        folder: folder of the model.
        found: result of `inspect_checkpoint` for the folder.  If it has decoded the layers, it adds
            their entropies, and column profiles for layers without one in their report.
    """
    reports = read_report(folder)
    # layers may have other names in the files than in the model; the model's are better known
    pairs = [
        (row["name"] if report is None else report.name, row, report)
        for row, report in with_reports(found["layers"], folder)
    ]
    # reports are in the order of the model, files need not be
    names = [report.name for report in reports] + [name for name, _, _ in pairs]
    position = _model_order(names)
    pairs.sort(key=lambda pair: position[pair[0]])
    kinds = kinds_of(name for name, _, _ in pairs)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    config = _config(folder)
    settings = config.get("quantization_config", {})
    return Facts(
        title=Path(folder).resolve().name,
        architecture=", ".join(config.get("architectures") or ["unknown architecture"]),
        kinds=list(numbers),
        layers=[
            _layer_facts(name, row, report, number=number, kind=numbers[kind])
            for number, ((name, row, report), kind) in enumerate(zip(pairs, kinds, strict=True))
        ],
        dense=found["dense"],
        totals=found["totals"],
        tokens=max((report.tokens for report in reports), default=0),
        settings={k: v for k, v in settings.items() if k not in _NO_SETTINGS},
        run=read_run(folder),
        check=read_check(folder),
    )


def _layer_facts(
    name: str, row: Mapping[str, Any], report: LayerReport | None, *, number: int, kind: int
) -> LayerFacts:
    profile = None if report is None else report.profile
    if profile is None and row["profile"] is not None:
        profile = ColumnProfile(**row["profile"])
    stored = ("rows", "columns", "bits", "payload_bits", "pooled_entropy", "class_entropy")
    return LayerFacts(
        number=number,
        name=name,
        location=location_of(name),
        kind=kind,
        target=None if report is None else report.asked,
        error=None if report is None else report.error,
        tokens=None if report is None else report.tokens,
        seconds=None if report is None else report.seconds,
        profile=profile,
        **{field: row[field] for field in stored},
    )


def _model_order(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Return sort keys: by stack, then by block, then in the order of `names`."""
    locations = {name: location_of(name) for name in names}
    stacks = list(dict.fromkeys(location.stack for location in locations.values()))
    return {
        name: (stacks.index(location.stack), location.block, position)
        for position, (name, location) in enumerate(locations.items())
    }


def _config(folder: str | os.PathLike) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
