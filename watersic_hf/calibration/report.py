"""What is known of a layer once it is quantized."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

#: File beside the weights with a line of JSON per quantized layer.
REPORT_FILE = "watersic_report.jsonl"


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

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def average_bits(reports: Iterable[LayerReport]) -> float:
    """Stored bits per weight over all layers."""
    reports = list(reports)
    return sum(r.bits * r.weights for r in reports) / max(1, sum(r.weights for r in reports))


def write_report(folder: str | os.PathLike, reports: Iterable[LayerReport]) -> None:
    """Write the reports into a model's folder."""
    lines = [json.dumps(asdict(report)) + "\n" for report in reports]
    (Path(folder) / REPORT_FILE).write_text("".join(lines), encoding="utf-8")


def read_report(folder: str | os.PathLike) -> list[LayerReport]:
    """The reports in a model's folder; none if there is no such file."""
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [LayerReport(**{k: row[k] for k in LayerReport.__dataclass_fields__}) for row in rows]
