"""Linear layers of any class: find them, and turn them into `nn.Linear` and back.

Shapes: A = out_features, N = in_features.
"""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from watersic_hf.checkpoint import layer_charge
from watersic_hf.nn import WaterSICLinear, WaterSICTiedHead

#: Bits per weight of header, tables and scales above which a layer is not worth its quantization:
#: a quarter of a dense weight in 16 bits.
MOST_FIXED_BITS = 4.0
#: Rows and columns from which no layer is that small.
_LARGE = 64


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that compute ``x @ W.T + b``, by name.

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
    """Return whether a linear layer holds its weight as N x A."""
    return isinstance(module, Conv1D)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (A, N) of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def is_too_small(rows: int, columns: int) -> bool:
    """Return whether a layer would cost about as much packed as dense.

    Args:
        rows: number of rows A.
        columns: number of columns N.
    """
    return min(rows, columns) < _LARGE and fixed_bits(rows, columns) > MOST_FIXED_BITS


@functools.cache
def fixed_bits(rows: int, columns: int) -> float:
    """Return the bits per weight of a stored layer whose codes are all zero."""
    codes_AN = torch.zeros(rows, columns, dtype=torch.int8, device="cpu")
    return layer_charge(codes_AN, rows)


def as_linear(module: nn.Module) -> nn.Linear:
    """Return an `nn.Linear` that computes the same as a linear layer, on the same memory."""
    rows, columns = shape_of(module)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = module.weight.data.T if is_transposed(module) else module.weight.data
    linear.weight = nn.Parameter(weight, module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def like(original: nn.Module, linear: nn.Linear) -> nn.Module:
    """Return a layer of the class of `original` that computes what `linear` does."""
    module = copy.deepcopy(original)
    weight = linear.weight.data
    weight = weight.T.contiguous() if is_transposed(original) else weight
    module.weight = nn.Parameter(weight, linear.weight.requires_grad)
    module.bias = linear.bias
    return module
