"""Find layers by name, and put one module in the place of another."""

import logging
import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from watersic_hf.nn.linear import PackedMatrix
from watersic_hf.nn.residency import RESIDENCIES, choose_residency

logger = logging.getLogger(__name__)


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

    ``auto`` is one choice for all layers on a device, which the log tells, with its reason.  Layers
    go one after the other, so that besides what remains only one of them is held twice.  Those
    whose payload is offloaded keep the form they have: ``stored``.

    Raises:
        ValueError: `residency` is not one of `RESIDENCIES`.
        CheckpointError: a payload is damaged; the message names the layer.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"residency is {residency!r}, but must be one of {RESIDENCIES}")
    layers = [(n, m) for n, m in packed_layers(model) if m.weight.device != torch.device("meta")]
    chosen: dict[torch.device, str] = {}
    if residency == "auto":
        for device in dict.fromkeys(layer.row_scale.device for _, layer in layers):
            here = [m.residency_inputs for _, m in layers if m.row_scale.device == device]
            chosen[device], reason = choose_residency(here)
            logger.info(
                "Residency of %d quantized layers on %s: %s, since %s.",
                len(here), device, chosen[device], reason,
            )  # fmt: skip
    for name, layer in tqdm(layers, desc="Decoding weights", delay=3, leave=False):
        try:
            wanted = chosen.get(layer.row_scale.device, residency)
            layer.set_residency(wanted, backend=backend)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
