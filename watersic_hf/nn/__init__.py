"""The quantized layer and the operators it runs on."""

from watersic_hf.nn.linear import RESIDENCIES, PackedMatrix, WaterSICLinear
from watersic_hf.nn.ops import BACKENDS
from watersic_hf.nn.replace import module_matches, packed_layers, replace_module, set_residency

__all__ = [
    "BACKENDS",
    "RESIDENCIES",
    "PackedMatrix",
    "WaterSICLinear",
    "module_matches",
    "packed_layers",
    "replace_module",
    "set_residency",
]
