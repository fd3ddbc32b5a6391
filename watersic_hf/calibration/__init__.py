"""Calibration: from texts to moments, and the loop that quantizes a model block by block."""

from watersic_hf.calibration.blocks import ResidentBlocks
from watersic_hf.calibration.data import (
    Draw,
    calibration_windows,
    describe,
    pydoc_texts,
    text_windows,
)
from watersic_hf.calibration.experts import outside
from watersic_hf.calibration.journal import Journal
from watersic_hf.calibration.layer import LayerQuantizer
from watersic_hf.calibration.massive import check_rows, massive_rows, zero_rows
from watersic_hf.calibration.pipeline import quantize_blocks
from watersic_hf.calibration.report import (
    LayerReport,
    Place,
    RunReport,
    average_bits,
    average_error,
    kinds_of,
    place_of,
    read_report,
    read_run,
    write_report,
)
from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.calibration.settings import CalibrationSettings
from watersic_hf.calibration.tables import (
    TableStatistics,
    quantize_table,
    table_statistics,
)
from watersic_hf.calibration.topology import block_stacks, decoder_blocks
from watersic_hf.calibration.without_data import quantize_without_data

__all__ = [
    "CalibrationSettings",
    "Draw",
    "Journal",
    "LayerQuantizer",
    "LayerReport",
    "Place",
    "ResidentBlocks",
    "RunReport",
    "Sensitivity",
    "TableStatistics",
    "average_bits",
    "average_error",
    "block_stacks",
    "calibration_windows",
    "check_rows",
    "decoder_blocks",
    "describe",
    "kinds_of",
    "layer_sensitivities",
    "massive_rows",
    "outside",
    "place_of",
    "pydoc_texts",
    "quantize_blocks",
    "quantize_table",
    "quantize_without_data",
    "read_report",
    "read_run",
    "table_statistics",
    "text_windows",
    "write_report",
    "zero_rows",
]
