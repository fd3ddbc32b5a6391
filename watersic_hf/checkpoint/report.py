"""Reports of quantized layers and of the run that quantized them, and the file that holds both.

The fields of `LayerReport` and `RunReport` are the keys of `REPORT_FILE`: renaming one would make
the reports of earlier versions unreadable.
"""

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

#: Name of the report next to the weights: a line of JSON for the run, and one per quantized layer.
REPORT_FILE = "watersic_report.jsonl"

#: A model is broken whose KL is both so many times the expected one, and so many bits per token.
BROKEN_RATIO, BROKEN_BITS = 5, 0.1

#: Packages whose versions are reported.
_PACKAGES = ("watersic-hf", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Report of one quantized layer.  Units: bits are bits per weight."""

    name: str
    rows: int
    columns: int
    asked: float
    """Bits that the budget allowed the layer."""
    bits: float
    """Bits that the layer takes in the files."""
    error: float
    """Relative squared error of the layer's output, |W X - W^ X|^2 / |W X|^2."""
    damping: float
    """Damping of the second moments, relative to the mean of their diagonal."""
    tokens: int
    """Number of calibration tokens; 0 if the layer was quantized without data, or as without it
    since its input is zero for all of them."""
    seconds: float
    """Time that the layer took, without its calibration."""
    profile: ColumnProfile | None = None
    """Bits of the columns; None for vocabulary matrices, and in reports of earlier versions."""
    pooled: float = 0.0
    """Fraction of an expert's statistics that comes from the tokens of all experts, from 0 to 1; it
    is above 0 if few tokens reach the expert."""
    table: bool = False
    """Whether the layer is a vocabulary matrix: an output head or an embedding.  Its bits are not
    part of the average of the layers."""
    octaves: float | None = None
    """Distance of the lattice step from that for Gaussian columns, in octaves, near which the
    search in the next layer of the kind begins; None for vocabulary matrices, for weights of zeros,
    and in reports of earlier versions."""
    stored_as: str | None = None
    """Name of the layer in the files that the report was saved with, if that is another name."""

    @property
    def stored_name(self) -> str:
        """Name of the layer in the files."""
        return self.stored_as or self.name

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """When, where and with which software a model was quantized."""

    date: str
    """End of the run in UTC, as in ISO 8601."""
    seconds: float
    """Wall-clock time from preparing the model to its last layer, in the process that finished."""
    peak_bytes: int | None
    """Peak resident memory of the process; None if the system does not report it."""
    machine: str
    """Processor, number of threads, and the GPU if there is one."""
    versions: dict[str, str]
    """Versions of Python and of the main packages, by name."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Comparison of a saved model with its original, on a little text that calibration never saw.

    KL is KL(original || quantized) in bits per token.
    """

    tokens: int
    """Number of predicted tokens."""
    kl_mean: float
    kl_median: float
    kl_p90: float
    """90th percentile over the tokens."""
    kl_expected: float
    """KL that the errors of the layers let expect; see `watersic_hf.evaluation.check`."""
    top1_agreement: float
    """Fraction of tokens for which both models predict the same most likely token."""
    text: str
    """What the saved model writes; empty if it was not asked to."""
    suspects: tuple[str, ...] = ()
    """Layers that differ most from the original, if the model is broken."""

    @property
    def broken(self) -> bool:
        """Whether the model is much worse than the errors of its layers let expect."""
        return not self.kl_mean <= max(BROKEN_RATIO * self.kl_expected, BROKEN_BITS)


class LayerLocation(NamedTuple):
    """Where a layer stands in a model, as its name tells."""

    stack: str
    """Name of the list of blocks, as ``model.layers``; empty if the layer is in none."""
    block: int
    """Index of the block in its stack; 0 if the layer is in none."""
    kind: str
    """Name within the block, with ``*`` for numbers: layers of one kind share it in all blocks."""


def location_of(name: str) -> LayerLocation:
    """Return where a layer stands: ``model.layers.3.mlp.down_proj`` is in block 3."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
    if found is None:
        return LayerLocation("", 0, name)
    return LayerLocation(found[1], int(found[2]), re.sub(r"(?<=\.)\d+(?=\.)", "*", found[3]))


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return the kind of every layer, preceded by its stack if the layers are in several stacks."""
    locations = [location_of(name) for name in names]
    several = len({location.stack for location in locations if location.stack}) > 1
    return [
        f"{location.stack}.*.{location.kind}" if several and location.stack else location.kind
        for location in locations
    ]


def describe_run(seconds: float) -> RunReport:
    """Return the report of a run of this process that ends now.

    Args:
        seconds: wall-clock time of the run.
    """
    return RunReport(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        machine=_machine(),
        versions={"python": platform.python_version()}
        | {package: version_of(package) for package in _PACKAGES},
    )


def peak_bytes() -> int | None:
    """Return the peak resident memory of this process; None if the system does not report it."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int | None:
    """Return the resident memory of this process; None if the system does not report it."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    # Linux only; other systems have no such file
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
    """Return the version of a package; "not installed" if it is absent or runs from a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def average_bits(reports: Iterable[LayerReport]) -> float:
    """Return the stored bits per weight of all layers except the vocabulary matrices."""
    reports = [report for report in reports if not report.table]
    return sum(r.bits * r.weights for r in reports) / max(1, sum(r.weights for r in reports))


def average_error(reports: Iterable[LayerReport]) -> float:
    """Return the mean relative output error of all layers, weighted by their number of weights."""
    reports = list(reports)
    return sum(r.error * r.weights for r in reports) / max(1, sum(r.weights for r in reports))


def write_report(
    folder: str | os.PathLike, reports: Iterable[LayerReport], run: RunReport | None = None
) -> None:
    """Write the report of a model.

    Args:
        folder: folder of the model.
        reports: reports of its quantized layers, in the order in which they are written.
        run: report of the run (default: none is written).
    """
    rows: list[dict[str, Any]] = [] if run is None else [{"run": asdict(run)}]
    rows += map(asdict, reports)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(folder) / REPORT_FILE).write_text(text, encoding="utf-8")


def read_report(folder: str | os.PathLike) -> list[LayerReport]:
    """Return the reports of the layers in a model's folder; an empty list if it has no report."""
    return [layer_report(row) for row in _rows(folder) if "name" in row]


def with_reports(
    layers: Iterable[Mapping[str, Any]], folder: str | os.PathLike
) -> list[tuple[Mapping[str, Any], LayerReport | None]]:
    """Return each layer that a model's files hold together with its report.

    Args:
        layers: rows with the ``name`` of a layer in the files, as `inspect_checkpoint` and
            `compare_checkpoints` return them.
        folder: folder of the model; it may have no report.

    Returns:
        Pairs in the order of `layers`; the report is None if the layer has none.
    """
    reports = {report.stored_name: report for report in read_report(folder)}
    return [(layer, reports.get(layer["name"])) for layer in layers]


def read_run(folder: str | os.PathLike) -> RunReport | None:
    """Return the report of the run in a model's folder; None if it has none."""
    return next((RunReport(**row["run"]) for row in _rows(folder) if "run" in row), None)


def add_check(folder: str | os.PathLike, check: CheckReport) -> None:
    """Add the comparison with the original to the report in a model's folder."""
    with (Path(folder) / REPORT_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"check": asdict(check)}) + "\n")


def read_check(folder: str | os.PathLike) -> CheckReport | None:
    """Return the comparison with the original in a model's folder; None if there was none."""
    row = next((row["check"] for row in _rows(folder) if "check" in row), None)
    return None if row is None else CheckReport(**row | {"suspects": tuple(row["suspects"])})


def _rows(folder: str | os.PathLike) -> list[dict[str, Any]]:
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def layer_report(row: dict[str, Any]) -> LayerReport:
    """Return the report of a layer from its row in a file.

    Keys that this version does not know are ignored: they come from a later version.
    """
    known = {f.name: row[f.name] for f in fields(LayerReport) if f.name in row}
    if known.get("profile") is not None:
        known["profile"] = ColumnProfile(**{k: tuple(v) for k, v in known["profile"].items()})
    return LayerReport(**known)
