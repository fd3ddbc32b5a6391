"""From texts to statistics: calibration windows, second moments, sensitivities."""

from watersic_hf.calibration.data import (
    Draw,
    calibration_windows,
    describe,
    pydoc_texts,
    text_windows,
)
from watersic_hf.calibration.experts import outside
from watersic_hf.calibration.massive import check_rows, massive_rows, zero_rows
from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities

__all__ = [
    "Draw",
    "Sensitivity",
    "calibration_windows",
    "check_rows",
    "describe",
    "layer_sensitivities",
    "massive_rows",
    "outside",
    "pydoc_texts",
    "text_windows",
    "zero_rows",
]
