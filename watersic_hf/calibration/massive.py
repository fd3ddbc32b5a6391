"""Channels with massive activations: detection, and removal by zeroing rows of weights.

For a few tokens, a few rows of a gated MLP can output values thousands of times larger than all
others (Sun et al. 2024, arXiv 2402.17762).  The paper zeroes four such rows of one model: the
column that they feed is then dead, costs no bits and distorts no statistic.  As this changes the
model, rows are zeroed only on request.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.hooks import BlockView, group_inputs
from watersic_hf.streams.processes import gather
from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import InputGroup, input_groups

logger = logging.getLogger(__name__)

#: A channel is massive if its peak magnitude is more than this multiple of the median over the
#: channels that are not zero throughout.
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
    """Find rows of layers that feed a massive channel of the layers that follow.

    Only layers whose outputs are combined elementwise are examined, such as gate and up of an MLP:
    row j of each of them belongs to column j of the next layer.  They are recognized by their
    output width, which equals the input width of that layer and not that of the residual stream.

    Args:
        model: the model.
        blocks: its blocks with their full names.
        windows: 1-D token ids.
        layers: full names of the layers to examine.
        batch_size: windows in a batch.
        source: where blocks come from; default: they are in memory.

    Returns:
        The rows, by full name of the layer; layers without such rows are left out.
    """
    layers = list(layers)
    modules = [block for _, block in blocks]
    stream = block_stream(model, modules, windows, batch_size=batch_size, source=source)
    width = stream.hidden[0].shape[-1]
    found: dict[str, list[int]] = {}
    for index, (name, block) in enumerate(blocks):
        with source.hold(name, block):
            within = [n.removeprefix(f"{name}.") for n in layers if n.startswith(f"{name}.")]
            found |= _massive_in_block(BlockView(stream, index, block), name, within, width)
            stream.advance(index, block)
    return found


def _massive_in_block(
    view: BlockView, name: str, layers: Sequence[str], width: int
) -> dict[str, list[int]]:
    """Find the rows of one block, given the width of the residual stream; see `massive_rows`."""
    found: dict[str, list[int]] = {}
    run = functools.partial(view.run, 0)
    groups = input_groups(view.block, layers, run, view.stream.hidden[0])
    for before, after in itertools.pairwise(groups):
        columns = view.block.get_submodule(after.layers[0]).in_features
        rows = {view.block.get_submodule(layer).out_features for layer in before.layers}
        if before.feeds_attention or rows != {columns} or columns == width:
            continue
        peak_N = _peaks(view, after)
        # most channels may be pruned, or never active behind a ReLU
        usual = peak_N[peak_N > 0].median() if bool(peak_N.any()) else 0.0
        massive = (peak_N > MASSIVE * usual).nonzero()[:, 0].tolist()
        if massive:
            found |= {f"{name}.{layer}": massive for layer in before.layers}
    return found


@torch.no_grad()
def zero_rows(model: nn.Module, rows: Mapping[str, Sequence[int]]) -> None:
    """Set rows of linear layers, and the entries of their biases, to zero.

    Args:
        model: the model, which is changed in place.
        rows: numbers of the rows, by full name of the layer.

    Raises:
        ValueError: a layer does not have one of its rows; the message names it.
    """
    for name, numbers in rows.items():
        layer = model.get_submodule(name)
        check_rows(name, numbers, layer.out_features)
        logger.info("%s: zeroing rows %s", name, list(numbers))
        layer.weight[list(numbers)] = 0
        if layer.bias is not None:
            layer.bias[list(numbers)] = 0


def check_rows(name: str, numbers: Sequence[int], out_features: int) -> None:
    """Check that a layer has the rows that are to be zeroed.

    Args:
        name: full name of the layer.
        numbers: the rows.
        out_features: number of rows of the layer.

    Raises:
        ValueError: it does not have all of them; the message names the layer and the rows.
    """
    bad = [row for row in numbers if not 0 <= row < out_features]
    if bad:
        raise ValueError(
            f"{name} has rows 0 to {out_features - 1}, and {bad} are to be zeroed; correct "
            f"`zero_rows`."
        )


def _peaks(view: BlockView, group: InputGroup) -> Tensor:
    """Return the largest magnitude of every input column of a group, over all processes."""
    peaks = [
        x.abs().flatten(0, -2).amax(0).float()
        for batch in range(view.batches)
        for x in group_inputs(view, group, batch)
    ]
    return torch.stack(gather(torch.stack(peaks).amax(0).cpu())).amax(0)
