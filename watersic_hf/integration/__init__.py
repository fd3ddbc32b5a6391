"""The plugin: what `from_pretrained`, `save_pretrained` and `push_to_hub` see."""

from watersic_hf.integration.config import WaterSICConfig, WaterSICRuntime
from watersic_hf.integration.folder import quantize_to_folder, require_no_model, save_quantized
from watersic_hf.integration.quantizer import WaterSICHfQuantizer, register
from watersic_hf.integration.source import ModelSource

__all__ = [
    "ModelSource",
    "WaterSICConfig",
    "WaterSICHfQuantizer",
    "WaterSICRuntime",
    "quantize_to_folder",
    "register",
    "require_no_model",
    "save_quantized",
]
