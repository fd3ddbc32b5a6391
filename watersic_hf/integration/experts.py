"""Mixtures of experts of a model: find them, their routers and the shapes of their matrices.

Shapes: A = out_features, N = in_features.
"""

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd as _Convolution

from watersic_hf.nn import FusedExperts, fused_experts


def find_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Return the layout of every module of a model that holds fused experts, by name."""
    found = {name: fused_experts(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def matrix_shapes(experts: Mapping[str, FusedExperts]) -> dict[str, tuple[int, int]]:
    """Return (A, N) of every matrix of every expert, by full name."""
    return {
        f"{name}.{within}": layout.shape(matrix)
        for name, layout in experts.items()
        for within, (_, matrix) in layout.names().items()
    }


def has_biases(module: nn.Module) -> bool:
    """Return whether experts have biases, which stay dense."""
    return any(name.endswith("_bias") for name, _ in module.named_parameters(recurse=False))


def expert_counts(model: nn.Module, fused: Mapping[str, FusedExperts]) -> dict[str, int]:
    """Return the number of experts of every module that holds several, whether or not fused.

    Besides `fused` these are modules with a matrix per expert in a parameter, and lists of modules
    of one class within a block.
    """
    counts = {name: layout.experts for name, layout in fused.items()}
    for name, module in model.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and re.search(r"\.\d+\.", name):
            children = list(module.children())
            if len({type(child) for child in children}) == 1 < len(children):
                counts[name] = len(children)
        elif stacked and name not in counts and not isinstance(module, _Convolution):
            counts[name] = len(stacked[0])
    return {name: count for name, count in counts.items() if count > 1 or name in fused}


def routing_layers(model: nn.Module, experts: Mapping[str, int]) -> dict[str, str]:
    """Find the linear layers that choose and weigh experts.

    They are layers beside experts with one output per expert, or with a single one, that is the
    input of no other layer of the same module.

    Args:
        model: the model.
        experts: number of experts of the modules that hold them, as of `expert_counts`.

    Returns:
        Patterns that select them, with the reason to leave them dense.
    """
    found: dict[str, str] = {}
    for name, count in experts.items():
        home = name.rpartition(".")[0]
        for inner, part in model.get_submodule(home).named_modules():
            layers = {n: m for n, m in part.named_children() if isinstance(m, nn.Linear)}
            for child, layer in layers.items():
                outputs = layer.out_features
                feeds = any(m.in_features == outputs for m in layers.values() if m is not layer)
                if outputs in (1, count) and not feeds:
                    full = ".".join(filter(None, (home, inner, child)))
                    reason = "gate of a shared expert" if outputs == 1 else "router of experts"
                    found[re.escape(full)] = reason
    return found
