"""The layers of a model before quantization: which are linear maps, and why others stay dense.

Shapes: A = out_features, N = in_features.
"""

import copy
import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from watersic_hf.nn import WaterSICLinear, WaterSICTiedHead


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that compute ``x @ W.T + b``, by name.

    They are `nn.Linear`, classes derived from it that compute the same, and GPT-2's `Conv1D`, which
    holds its weight as N x A.
    """
    return {name: module for name, module in model.named_modules() if _is_linear(type(module))}


def _is_linear(kind: type[nn.Module]) -> bool:
    if kind is nn.Linear or kind is Conv1D:
        return True
    # torch's own derived classes are parts of larger modules that read their weights directly
    ours = issubclass(kind, WaterSICLinear | WaterSICTiedHead)
    if ours or kind.__module__.startswith("torch.") or not issubclass(kind, nn.Linear):
        return False
    probe = kind.__new__(kind)
    nn.Linear.__init__(probe, 3, 2, device="cpu", dtype=torch.float32)
    x_TN = torch.linspace(-1, 1, 12).view(4, 3)
    try:
        with torch.no_grad():
            return torch.allclose(probe(x_TN), F.linear(x_TN, probe.weight, probe.bias))
    except Exception:
        # it needs more than a weight and a bias, so it is something else
        return False


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as N x A."""
    return isinstance(module, Conv1D)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(A, N) of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def as_linear(module: nn.Module) -> nn.Linear:
    """The same map as an `nn.Linear` on the same memory."""
    rows, columns = shape_of(module)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = module.weight.data.T if is_transposed(module) else module.weight.data
    linear.weight = nn.Parameter(weight, module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def like(shell: nn.Module, linear: nn.Linear) -> nn.Module:
    """A layer of the class of `shell` that computes what `linear` does."""
    module = copy.deepcopy(shell)
    weight = linear.weight.data
    weight = weight.T.contiguous() if is_transposed(shell) else weight
    module.weight = nn.Parameter(weight, linear.weight.requires_grad)
    module.bias = linear.bias
    return module


def towers_without_text(model: nn.Module) -> list[str]:
    """The largest modules of a model of text and images (or sounds) that text does not run through.

    They are what is beside the language model: vision tower, projector.  A model of text alone has
    none.
    """
    others = {"vision_config", "audio_config"} & set(getattr(model.config, "sub_configs", ()))
    language_model = model.get_decoder() if others else model
    found: list[str] = []

    def search(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            inside = any(module is language_model for module in child.modules())
            if inside and child is not language_model:
                search(child, f"{prefix}{name}.")
            elif not inside and child is not model.get_output_embeddings():
                found.append(f"{prefix}{name}")

    if language_model is not model:
        search(model, "")
    return found


def left_dense(
    model: nn.Module, packed: Collection[str], reasons: Mapping[str, str]
) -> dict[str, str]:
    """What stays dense of a model, and why; biases, norms and other vectors are not listed.

    Args:
        model: the model, before or after quantization.
        packed: names of the layers that are quantized.
        reasons: for layers that are not; those of tables are known without.

    Returns:
        Reasons by name of module.  Modules of one name but for numbers are one entry, with ``*``
        for the numbers, if they share a reason and none of them is quantized.
    """
    head = model.get_output_embeddings()
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if name in packed or not matrices:
            continue
        if name in reasons:
            found[name] = reasons[name]
        elif module is head:
            found[name] = "output head"
        elif isinstance(module, nn.Embedding):
            found[name] = "embedding"
        else:
            found[name] = f"{type(module).__name__} is no linear layer"
    states: dict[str, set[str | None]] = {}
    for name in (*packed, *found):
        states.setdefault(_starred(name), set()).add(found.get(name))
    return {
        _starred(name) if len(states[_starred(name)]) == 1 else name: reason
        for name, reason in found.items()
    }


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
