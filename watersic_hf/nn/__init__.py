"""Quantized layers, embeddings and experts, and the operators that they run on."""

from watersic_hf.nn.backends import BACKEND_VARIABLE, BACKENDS, block_step, path_search
from watersic_hf.nn.embedding import WaterSICEmbedding, WaterSICTiedHead, pack_vocabulary_matrix
from watersic_hf.nn.experts import (
    FusedExperts,
    SeparateExperts,
    fuse,
    fused_experts,
    separate,
    separate_dense,
    separate_experts,
)
from watersic_hf.nn.linear import PackedMatrix, WaterSICLinear
from watersic_hf.nn.replace import (
    component_expression,
    install_packed,
    module_matches,
    packed_layers,
    replace_module,
    set_residency,
)
from watersic_hf.nn.residency import RESIDENCIES

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "RESIDENCIES",
    "FusedExperts",
    "PackedMatrix",
    "SeparateExperts",
    "WaterSICEmbedding",
    "WaterSICLinear",
    "WaterSICTiedHead",
    "block_step",
    "component_expression",
    "fuse",
    "fused_experts",
    "install_packed",
    "module_matches",
    "pack_vocabulary_matrix",
    "packed_layers",
    "path_search",
    "replace_module",
    "separate",
    "separate_dense",
    "separate_experts",
    "set_residency",
]
