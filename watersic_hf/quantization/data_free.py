"""Quantization without data, block by block: nothing runs, and all columns count the same."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from watersic_hf.checkpoint.report import location_of
from watersic_hf.core import Moments
from watersic_hf.nn import WaterSICLinear, replace_module
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer
from watersic_hf.streams.blocks import ResidentBlocks
from watersic_hf.streams.processes import barrier, rank_and_size
from watersic_hf.streams.progress import Progress


@torch.no_grad()
def quantize_without_data(
    model: nn.Module,
    layers: Sequence[str],
    quantizer: LayerQuantizer,
    *,
    blocks: Mapping[str, nn.Module],
    source: ResidentBlocks,
    journal: Journal,
) -> None:
    """Quantize the layers of a model, one block after another.

    With torch.distributed initialised, every process calls this with the same arguments, and
    quantizes its share of the layers of a block.

    Args:
        model: the model.  Layers outside its blocks are replaced in it, those of blocks only while
            the block is held.
        layers: names of the linear layers to quantize, in the order of the work; those of a block
            follow one another.
        quantizer: does the layers, and holds their budget and reports.
        blocks: the blocks of the model, by name.
        source: where blocks come from.
        journal: where what is finished is kept, and what is there already is not done again.

    Raises:
        CalibrationError: a weight cannot be used; the message names the layer.
    """
    parts = [
        (name if name in blocks else "", list(part))
        for name, part in itertools.groupby(layers, lambda layer: _home(layer))
    ]
    index, weights = 0, quantizer.weights(layers)
    with Progress(
        layers=len(layers), weights=weights, blocks=sum(name != "" for name, _ in parts)
    ) as progress:
        for name, part in parts:
            if not name:
                _quantize_part(model, "", part, quantizer, progress)
                continue
            progress.block(name)
            if index < journal.blocks:
                for report in journal.block(index).reports:
                    quantizer.count(report)
                    progress.layer(report, earlier=True)
            else:
                with source.hold(name, blocks[name]):
                    before = len(quantizer.reports)
                    _quantize_part(blocks[name], f"{name}.", part, quantizer, progress)
                    stored = source.stored(name, blocks[name])
                    barrier()
                    if rank_and_size()[0] == 0:
                        journal.put_block(index, name, stored, quantizer.reports[before:])
                    journal.finish_block(index)
            index += 1


def _home(layer: str) -> str:
    """The block that a layer would be in, by its name."""
    location = location_of(layer)
    return f"{location.stack}.{location.block}"


def _quantize_part(
    part: nn.Module, prefix: str, layers: Sequence[str], quantizer: LayerQuantizer,
    progress: Progress,
) -> None:  # fmt: skip
    """Quantize layers of a model or of a block, and replace them there."""
    linears = {layer: part.get_submodule(layer.removeprefix(prefix)) for layer in layers}
    weights = {layer: linear.weight for layer, linear in linears.items()}

    def white(layer: str) -> Moments:
        return Moments.identity(weights[layer].shape[1], device=weights[layer].device)

    for layer, packed, _ in quantizer.quantize_group(weights, white):
        quantized = WaterSICLinear.from_packed(
            packed, bias=linears[layer].bias, dtype=weights[layer].dtype,
            device=weights[layer].device,
        )  # fmt: skip
        replace_module(part, layer.removeprefix(prefix), quantized)
        progress.layer(quantizer.reports[-1], earlier=quantizer.finished(layer))
