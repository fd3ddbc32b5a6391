"""What is known of a layer once it is quantized, and of the run that quantized it."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from watersic_hf.core import ColumnProfile

#: File beside the weights: a line of JSON for the run, and one per quantized layer.
REPORT_FILE = "watersic_report.jsonl"

_PACKAGES = ("watersic-hf", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer's line in the report.  Bits are per weight."""

    name: str
    rows: int
    columns: int
    asked: float
    """Bits that the budget gave to the layer."""
    bits: float
    """Bits that it takes on the disk."""
    error: float
    """Relative error of the layer's output, |W X - W^ X|^2 / |W X|^2."""
    damping: float
    """Damping that was used, relative to the mean second moment of the inputs."""
    tokens: int
    """Calibration tokens; 0 = quantized without data."""
    seconds: float
    """Time that the layer took, its calibration not included."""
    profile: ColumnProfile | None = None
    """What its columns spend; None in reports of versions that did not write it."""
    pooled: float = 0.0
    """Share of all the layer's tokens in the statistics of an expert that few of them reach."""
    table: bool = False
    """Whether it is an output head or an embedding, whose bits are its own."""
    stored_as: str | None = None
    """Its name in the files that the report was saved with, where that is another one."""

    @property
    def stored_name(self) -> str:
        """Its name in the files."""
        return self.stored_as or self.name

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """When, where and with what a model was quantized."""

    date: str
    """At its end, in UTC."""
    seconds: float
    """From the first look at the model to the last layer, in the process that got there."""
    peak_bytes: int | None
    """Most memory that the process held; None where the system does not say."""
    machine: str
    """Processor, threads, and GPU if there is one."""
    versions: dict[str, str]
    """Of Python and of the packages that matter."""


class LayerLocation(NamedTuple):
    """Where a layer stands, by its name."""

    stack: str
    """``model.layers``; empty if the layer is in no list of blocks."""
    block: int
    kind: str
    """Its name within the block, ``*`` for numbers in it: what layers of all blocks share."""


def location_of(name: str) -> LayerLocation:
    """Read where a layer stands from its name: ``model.layers.3.mlp.down_proj`` is in block 3."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
    if found is None:
        return LayerLocation("", 0, name)
    return LayerLocation(found[1], int(found[2]), re.sub(r"(?<=\.)\d+(?=\.)", "*", found[3]))


def kinds_of(names: Iterable[str]) -> list[str]:
    """The kind of every layer; with the name of its stack, if there are several stacks."""
    places = [location_of(name) for name in names]
    several = len({place.stack for place in places if place.stack}) > 1
    return [f"{p.stack}.*.{p.kind}" if several and p.stack else p.kind for p in places]


def describe_run(seconds: float) -> RunReport:
    """The report of a run in this process that ends now."""
    return RunReport(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        machine=_machine(),
        versions={"python": platform.python_version()} | {p: version_of(p) for p in _PACKAGES},
    )


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int | None:
    """The memory that this process holds now; None where the system does not say."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    text = status.read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    machine = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{machine}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else machine


def version_of(package: str) -> str:
    """The version of a package, or that it is not installed, as one that runs from a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def average_bits(reports: Iterable[LayerReport]) -> float:
    """Stored bits per weight over all layers but heads and embeddings."""
    reports = [report for report in reports if not report.table]
    return sum(r.bits * r.weights for r in reports) / max(1, sum(r.weights for r in reports))


def average_error(reports: Iterable[LayerReport]) -> float:
    """Relative output error over all layers, every layer by its weights."""
    reports = list(reports)
    return sum(r.error * r.weights for r in reports) / max(1, sum(r.weights for r in reports))


def write_report(
    folder: str | os.PathLike, reports: Iterable[LayerReport], run: RunReport | None = None
) -> None:
    """Write the reports into a model's folder."""
    rows: list[dict[str, Any]] = [] if run is None else [{"run": asdict(run)}]
    rows += map(asdict, reports)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")


def read_report(folder: str | os.PathLike) -> list[LayerReport]:
    """The layers' reports in a model's folder; none if there is no such file."""
    return [layer_report(row) for row in _rows(folder) if "run" not in row]


def with_reports(
    layers: Iterable[Mapping[str, Any]], folder: str | os.PathLike
) -> list[tuple[Mapping[str, Any], LayerReport | None]]:
    """Return each layer that a model's files hold together with its report.

    Args:
        layers: rows with the `name` that a layer has in the files, as `inspect_checkpoint` and
            `compare_checkpoints` return them.
        folder: folder of the model, which may have no report.

    Returns:
        Pairs in the order of `layers`; the report is None if the folder has none of the layer.
    """
    reports = {report.stored_name: report for report in read_report(folder)}
    return [(layer, reports.get(layer["name"])) for layer in layers]


def read_run(folder: str | os.PathLike) -> RunReport | None:
    """The run's report in a model's folder, if it is there."""
    return next((RunReport(**row["run"]) for row in _rows(folder) if "run" in row), None)


def _rows(folder: str | os.PathLike) -> list[dict[str, Any]]:
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def layer_report(row: dict[str, Any]) -> LayerReport:
    """The report that a row was made of."""
    known = {f.name: row[f.name] for f in fields(LayerReport) if f.name in row}
    if known.get("profile") is not None:
        known["profile"] = ColumnProfile(**{k: tuple(v) for k, v in known["profile"].items()})
    return LayerReport(**known)
