"""From statistics to packed layers: bit budget, layers, blocks, vocabulary matrices, journal."""

from watersic_hf.quantization.data_free import quantize_without_data
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer, QuantizedLayer, identity_moments
from watersic_hf.quantization.pipeline import StackOutputs, quantize_blocks
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
    "QuantizedLayer",
    "StackOutputs",
    "VocabularyStatistics",
    "identity_moments",
    "quantize_blocks",
    "quantize_vocabulary",
    "quantize_without_data",
    "vocabulary_statistics",
]
