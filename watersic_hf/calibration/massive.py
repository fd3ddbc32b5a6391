"""Channels with massive activations: found, or named by hand, and taken out of the model.

A few rows of a gated MLP can put out values thousands of times larger than all others, for a few
tokens (Sun et al. 2024, arXiv 2402.17762).  The paper zeroes four such rows of one model: what they
feed is then a dead column, which costs nothing and spoils no statistic.  It changes the model, so
nothing is zeroed unless it is asked for.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.hooks import Side, group_inputs
from watersic_hf.streams.processes import gather
from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import InputGroup, input_groups

logger = logging.getLogger(__name__)

#: A channel is massive when its largest magnitude is so many times that of the median channel.
MASSIVE = 1000.0


@torch.no_grad()
def massive_rows(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    windows: Sequence[Tensor],
    layers: Iterable[str],
    *,
    batch_size: int,
    source: ResidentBlocks = RESIDENT,
) -> dict[str, list[int]]:
    """Rows of layers that alone make a massive channel of the input of the layers behind them.

    Only layers whose outputs are combined entry by entry are looked at, as gate and up of an MLP
    are: row j of each of them belongs to column j of the layer behind.  They are told by their
    width, which is that layer's and not that of the residual stream.
    """
    layers = list(layers)
    modules = [block for _, block in blocks]
    stream = block_stream(model, modules, windows, batch_size=batch_size, source=source)
    width = stream.hidden[0].shape[-1]
    found: dict[str, list[int]] = {}
    for index, (name, block) in enumerate(blocks):
        with source.hold(name, block):
            within = [n.removeprefix(f"{name}.") for n in layers if n.startswith(f"{name}.")]
            found |= _massive_in_block(Side(stream, block), index, name, within, width)
            stream.advance(index, block)
    return found


def _massive_in_block(
    side: Side, index: int, name: str, layers: Sequence[str], width: int
) -> dict[str, list[int]]:
    """What `massive_rows` finds in one block; `width` is that of the residual stream."""
    found: dict[str, list[int]] = {}
    run = functools.partial(side.stream.run, index, side.block)
    groups = input_groups(side.block, layers, functools.partial(run, 0), side.stream.hidden[0])
    for before, after in itertools.pairwise(groups):
        columns = side.block.get_submodule(after.layers[0]).in_features
        rows = {side.block.get_submodule(layer).out_features for layer in before.layers}
        if before.feeds_attention or rows != {columns} or columns == width:
            continue
        peak_N = _peaks(side, index, after)
        massive = (peak_N > MASSIVE * peak_N.median()).nonzero()[:, 0].tolist()
        if massive:
            found |= {f"{name}.{layer}": massive for layer in before.layers}
    return found


@torch.no_grad()
def zero_rows(model: nn.Module, rows: Mapping[str, Sequence[int]]) -> None:
    """Set rows of linear layers, and their biases, to zero.

    Raises:
        ValueError: a layer has no such row; the message names it.
    """
    for name, numbers in rows.items():
        layer = model.get_submodule(name)
        check_rows(name, numbers, layer.out_features)
        logger.info("%s: rows %s are zeroed", name, list(numbers))
        layer.weight[list(numbers)] = 0
        if layer.bias is not None:
            layer.bias[list(numbers)] = 0


def check_rows(name: str, numbers: Sequence[int], out_features: int) -> None:
    """Refuse to zero rows that a layer does not have.

    Raises:
        ValueError: the message names the layer and the rows.
    """
    bad = [row for row in numbers if not 0 <= row < out_features]
    if bad:
        raise ValueError(
            f"{name} has rows 0 to {out_features - 1}, and {bad} are to be zeroed; check "
            f"`zero_rows`."
        )


def _peaks(side: Side, index: int, group: InputGroup) -> Tensor:
    """Largest magnitude of every input column of a group."""
    peaks = [
        x.abs().flatten(0, -2).amax(0).float()
        for batch in range(len(side.stream.hidden))
        for x in group_inputs(side, index, group, batch)
    ]
    return torch.stack(gather(torch.stack(peaks).amax(0).cpu())).amax(0)
