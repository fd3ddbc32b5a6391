"""The paper's method on plain tensors: it knows no files, no modules and no models."""

from watersic_hf.core.metrics import gap_to_bound, relative_output_error
from watersic_hf.core.moments import CalibrationError, MomentAccumulator, Moments
from watersic_hf.core.quantize import LayerSettings, QuantizedWeight, quantize_weight
from watersic_hf.core.rate import narrow
from watersic_hf.core.waterfill import SHAPING_LOSS, rate_at_level
from watersic_hf.core.whiten import whitened_variances

__all__ = [
    "SHAPING_LOSS",
    "CalibrationError",
    "LayerSettings",
    "MomentAccumulator",
    "Moments",
    "QuantizedWeight",
    "gap_to_bound",
    "narrow",
    "quantize_weight",
    "rate_at_level",
    "relative_output_error",
    "whitened_variances",
]
