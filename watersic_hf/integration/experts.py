"""Mixtures of experts in a model: found, and prepared for what a file holds.

Shapes: A = out_features, N = in_features.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from watersic_hf.checkpoint import PACKED, validate_layer
from watersic_hf.nn import FusedExperts, PackedMatrix, fused_experts, separate


def find_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """How the modules of a model that hold fused experts do so, by name."""
    found = {name: fused_experts(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def matrix_shapes(experts: Mapping[str, FusedExperts]) -> dict[str, tuple[int, int]]:
    """(A, N) of every matrix of every expert, by full name."""
    return {
        f"{name}.{within}": layout.shape(matrix)
        for name, layout in experts.items()
        for within, (_, matrix) in layout.names().items()
    }


def has_biases(module: nn.Module) -> bool:
    """Whether experts have biases, which stay as they are."""
    return any(name.endswith("_bias") for name, _ in module.named_parameters(recurse=False))


def routing_layers(model: nn.Module, experts: Mapping[str, FusedExperts]) -> dict[str, str]:
    """Patterns for the linear layers that choose and weigh experts, with the reason to leave them.

    They are layers beside experts with one output for every expert, or with a single one, that no
    other layer of the same module takes in.
    """
    found: dict[str, str] = {}
    for name, layout in experts.items():
        home = name.rpartition(".")[0]
        for inner, part in model.get_submodule(home).named_modules():
            layers = {n: m for n, m in part.named_children() if isinstance(m, nn.Linear)}
            for child, layer in layers.items():
                outputs = layer.out_features
                taken_in = any(m.in_features == outputs for m in layers.values() if m is not layer)
                if outputs in (1, layout.experts) and not taken_in:
                    full = ".".join(filter(None, (home, inner, child)))
                    reason = "gate of a shared expert" if outputs == 1 else "router of experts"
                    found[re.escape(full)] = reason
    return found


def prepare_experts(
    model: nn.Module,
    experts: Mapping[str, FusedExperts],
    stored: Mapping[str, Mapping[str, tuple[int, ...]]],
    *,
    sized: bool,
    dtype: torch.dtype | None,
) -> None:
    """Give experts empty packed matrices.

    Args:
        model: on meta.
        experts: the modules to prepare.
        stored: the packed tensors of the files, as of `stored_layers`.
        sized: whether there are files, that must hold every matrix.
        dtype: of the decoded weights.

    Raises:
        CheckpointError: a matrix is missing, or has another shape than the model's.
    """
    for name, layout in experts.items():

        def empty(expert: int, matrix: str, name: str = name, layout: Any = layout) -> PackedMatrix:
            full = f"{name}.{PACKED}.{expert}.{matrix}"
            found = stored.get(full, {})
            rows, columns = layout.shape(matrix)
            if sized:
                validate_layer(full, found, rows, columns)
            return PackedMatrix(
                columns, rows, payload_bytes=found.get("weight", (0,))[0], dtype=dtype,
                device="meta",
            )  # fmt: skip

        separate(model.get_submodule(name), layout, empty)
