"""Find layers by name, replace them, and choose the form that their weights have in memory."""

import logging
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from watersic_hf.checkpoint import PackedLayer
from watersic_hf.nn.linear import PackedMatrix, WaterSICLinear
from watersic_hf.nn.residency import RESIDENCIES, choose_residency

logger = logging.getLogger(__name__)


def module_matches(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that selects the module, or None.

    A pattern is a regular expression that has to match whole dotted components, anywhere in the
    name: ``lm_head`` selects ``lm_head`` and ``model.lm_head``; ``layers.1`` selects layer 1 and
    everything inside it, but not layer 10.

    Args:
        name: full name of the module.
        patterns: regular expressions, in order of precedence.
    """
    for pattern in patterns:
        if re.match(component_expression(pattern), name):
            return pattern
    return None


def component_expression(pattern: str) -> str:
    """Return the regular expression that `module_matches` compares names with."""
    return rf"(?:.*\.)?(?:{pattern})(?:\.|$)"


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name` by `module`, which takes over its training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def install_packed(
    model: nn.Module,
    name: str,
    packed: PackedLayer,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    codes_AN: Tensor | None = None,
    module_class: type[PackedMatrix] = WaterSICLinear,
) -> PackedMatrix:
    """Replace a dense layer by its quantized form.

    Args:
        model: module that holds the layer, at any depth.
        name: name of the layer within `model`.
        packed: stored tensors of the quantized layer.
        like: dense weight; its dtype and device become those of the quantized layer.
        bias: bias to copy into the quantized layer (default: none).
        codes_AN: codes that the payload decodes to.  With them the layer holds its dense weight
            from the start, without decoding (default: only the payload).
        module_class: `WaterSICLinear`, or `PackedMatrix` for the matrix of an expert, which is not
            to be taken for a linear layer.

    Returns:
        The quantized layer.
    """
    layer = module_class.from_packed(
        packed, bias=bias, codes_AN=codes_AN, dtype=like.dtype, device=like.device
    )
    replace_module(model, name, layer)
    return layer


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield the name and the module of every quantized matrix of a model.

    Besides linear layers these are embeddings and the matrices of experts.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            yield name, module


def set_residency(model: nn.Module, residency: str, *, backend: str = "auto") -> None:
    """Set the form in memory of all quantized layers; see `PackedMatrix.set_residency`.

    ``auto`` makes one choice for all layers on a device, and logs it with the reason.  Layers are
    converted one at a time, so that only one of them is in memory twice.  Layers whose payload is
    offloaded keep the residency ``stored``.

    Args:
        model: the model.
        residency: one of `RESIDENCIES`.
        backend: implementation that multiplies with compressed weights, one of `BACKENDS`.

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
                len(here),
                device,
                chosen[device],
                reason,
            )
    for name, layer in tqdm(layers, desc="Decoding weights", delay=3, leave=False):
        try:
            wanted = chosen.get(layer.row_scale.device, residency)
            layer.set_residency(wanted, backend=backend)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
