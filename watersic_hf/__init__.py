"""WaterSIC weight quantization for Hugging Face Transformers.

``import watersic_hf`` registers the format: from then on `from_pretrained` quantizes with
`WaterSICConfig`, and loads what was saved.
"""

from watersic_hf.checkpoint import CheckpointError, LayerReport
from watersic_hf.codec import CodecError
from watersic_hf.core import CalibrationError
from watersic_hf.integration import WaterSICConfig, WaterSICHfQuantizer, WaterSICRuntime, register
from watersic_hf.nn import WaterSICLinear, set_residency

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CodecError",
    "LayerReport",
    "WaterSICConfig",
    "WaterSICHfQuantizer",
    "WaterSICLinear",
    "WaterSICRuntime",
    "__version__",
    "register",
    "set_residency",
]

__version__ = "0.1.0"

register()
