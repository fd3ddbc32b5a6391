"""The method of the paper on plain tensors, independent of files, modules and models."""

from watersic_hf.core.accumulator import MomentAccumulator
from watersic_hf.core.metrics import gap_to_bound, relative_output_error
from watersic_hf.core.moments import (
    CalibrationError,
    Moments,
    not_finite,
    pool_fraction,
)
from watersic_hf.core.profile import (
    BINS_PER_BIT,
    ColumnProfile,
    column_deviations,
    column_profile,
)
from watersic_hf.core.projected import (
    ProjectedAccumulator,
    ProjectedMoments,
    is_large,
    is_wide,
)
from watersic_hf.core.quantize import LATTICES, LayerSettings, QuantizedWeight, quantize_weight
from watersic_hf.core.rate import to_smallest_dtype
from watersic_hf.core.tall import ROWS_PER_BAND, quantize_tall
from watersic_hf.core.trellis import Path, PathSearch
from watersic_hf.core.waterfill import SHAPING_LOSS, rate_at_level
from watersic_hf.core.whiten import Whitening
from watersic_hf.core.wide import quantize_wide
from watersic_hf.core.zsic import BlockStep, zsic_block

__all__ = [
    "BINS_PER_BIT",
    "LATTICES",
    "ROWS_PER_BAND",
    "SHAPING_LOSS",
    "BlockStep",
    "CalibrationError",
    "ColumnProfile",
    "LayerSettings",
    "MomentAccumulator",
    "Moments",
    "Path",
    "PathSearch",
    "ProjectedAccumulator",
    "ProjectedMoments",
    "QuantizedWeight",
    "Whitening",
    "column_deviations",
    "column_profile",
    "gap_to_bound",
    "is_large",
    "is_wide",
    "not_finite",
    "pool_fraction",
    "quantize_tall",
    "quantize_weight",
    "quantize_wide",
    "rate_at_level",
    "relative_output_error",
    "to_smallest_dtype",
    "zsic_block",
]
