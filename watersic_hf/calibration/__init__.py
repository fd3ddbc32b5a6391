"""From texts to statistics: calibration windows, second moments and sensitivities."""

from watersic_hf.calibration.data import Draw, calibration_windows, text_windows
from watersic_hf.calibration.experts import layers_outside_experts
from watersic_hf.calibration.massive import check_rows, massive_rows, zero_rows
from watersic_hf.calibration.rows import describe
from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.calibration.text_files import pydoc_texts, read_text

__all__ = [
    "Draw",
    "Sensitivity",
    "calibration_windows",
    "check_rows",
    "describe",
    "layer_sensitivities",
    "layers_outside_experts",
    "massive_rows",
    "pydoc_texts",
    "read_text",
    "text_windows",
    "zero_rows",
]
