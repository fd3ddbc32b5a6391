"""From statistics to packed layers: budget, layer, the loop over blocks, journal."""

from watersic_hf.quantization.data_free import quantize_without_data
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer
from watersic_hf.quantization.pipeline import quantize_blocks
from watersic_hf.quantization.settings import CalibrationSettings
from watersic_hf.quantization.vocabulary import (
    VocabularyStatistics,
    quantize_vocabulary,
    vocabulary_statistics,
)

__all__ = [
    "CalibrationSettings",
    "Journal",
    "LayerQuantizer",
    "VocabularyStatistics",
    "quantize_blocks",
    "quantize_vocabulary",
    "quantize_without_data",
    "vocabulary_statistics",
]
