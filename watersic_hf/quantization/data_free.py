"""Quantization without data, block by block: no block runs, and all columns count the same."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from watersic_hf.checkpoint.report import location_of
from watersic_hf.nn import install_packed
from watersic_hf.quantization.block import reuse_finished_block
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer, identity_moments
from watersic_hf.streams.blocks import ResidentBlocks
from watersic_hf.streams.progress import Progress


@torch.no_grad()
def quantize_without_data(
    model: nn.Module,
    layers: Sequence[str],
    *,
    quantizer: LayerQuantizer,
    blocks: Mapping[str, nn.Module],
    source: ResidentBlocks,
    journal: Journal,
) -> None:
    """Quantize the layers of a model without data, one block after another.

    With torch.distributed initialised, every process calls this with the same arguments, and
    quantizes its shard of the layers of a block.

    Args:
        model: the model.  Layers outside its blocks are replaced in it, those of a block only while
            the block is held.
        layers: full names of the linear layers, in the order in which they are quantized; the
            layers of a block are consecutive.
        quantizer: quantizes the layers, and holds their budget and reports.
        blocks: blocks of the model, by name.
        source: where the blocks come from.
        journal: stores the finished blocks; those that it has are not quantized again.

    Raises:
        CalibrationError: a weight cannot be used; the message names the layer.
    """
    parts = [
        (name if name in blocks else "", list(part))
        for name, part in itertools.groupby(layers, _block_of)
    ]
    index = 0
    with Progress(
        layers=len(layers),
        weights=quantizer.count_weights(layers),
        blocks=sum(name != "" for name, _ in parts),
    ) as progress:
        for name, part in parts:
            if not name:
                _quantize_layers(model, "", layers=part, quantizer=quantizer, progress=progress)
                continue
            progress.block(name)
            if not reuse_finished_block(index, journal, quantizer=quantizer, progress=progress):
                block = blocks[name]
                with source.hold(name, block):
                    before = len(quantizer.reports)
                    _quantize_layers(
                        block, f"{name}.", layers=part, quantizer=quantizer, progress=progress
                    )
                    journal.finish_block(
                        index,
                        name=name,
                        tensors=source.stored(name, block),
                        reports=quantizer.reports[before:],
                    )
            index += 1


def _block_of(layer: str) -> str:
    """Return the block that a layer is in by its name, whether or not there is such a block."""
    location = location_of(layer)
    return f"{location.stack}.{location.block}"


def _quantize_layers(
    module: nn.Module,
    prefix: str,
    *,
    layers: Sequence[str],
    quantizer: LayerQuantizer,
    progress: Progress,
) -> None:
    """Quantize layers of a model or of a block, and replace them in it.

    Args:
        module: the model or the block.
        prefix: prefix of the names of its layers in the model.
        layers: full names of the layers.
        quantizer: quantizes the layers.
        progress: shows them.
    """
    linears = {layer: module.get_submodule(layer.removeprefix(prefix)) for layer in layers}
    weights = {layer: linear.weight for layer, linear in linears.items()}
    for layer, packed, _ in quantizer.quantize_group(
        weights, lambda layer: identity_moments(weights[layer])
    ):
        install_packed(
            module,
            layer.removeprefix(prefix),
            packed,
            like=weights[layer],
            bias=linears[layer].bias,
        )
        progress.layer(quantizer.reports[-1], earlier=quantizer.is_finished(layer))
