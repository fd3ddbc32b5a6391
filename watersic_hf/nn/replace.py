"""Find layers by name, and put one module in the place of another."""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from watersic_hf.nn.linear import RESIDENCIES, PackedMatrix


def module_matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that selects the module, or None.

    A pattern is a regular expression for whole dotted components, anywhere in the name: ``lm_head``
    selects ``lm_head`` and ``model.lm_head``; ``layers.1`` selects layer 1 and all that is in it,
    but not layer 10.
    """
    for pattern in patterns:
        if re.match(rf"(?:.*\.)?(?:{pattern})(?:\.|$)", name):
            return pattern
    return None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`, in the same training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedMatrix]]:
    """The quantized matrices of a model, layers of their own or not, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            yield name, module


def set_residency(model: nn.Module, residency: str, *, backend: str = "auto") -> None:
    """Choose the form in memory of all quantized layers; see `PackedMatrix.set_residency`.

    Layers whose payload is offloaded keep the form they have: ``entropy``.

    Raises:
        ValueError: `residency` is not one of `RESIDENCIES`.
        CheckpointError: a payload is damaged; the message names the layer.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"residency is {residency!r}, but must be one of {RESIDENCIES}")
    layers = [(n, m) for n, m in packed_layers(model) if m.weight.device != torch.device("meta")]
    for name, layer in tqdm(layers, desc="Decoding weights", delay=3, leave=False):
        try:
            layer.set_residency(residency, backend=backend)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
