"""The hidden states of a model's calibration windows, on their way from block to block.

Shapes: B = windows in a batch, T = tokens, D = width of the hidden states.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.streams.batches import States, to_batches
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.calls import block_calls, equal, moved, split_output
from watersic_hf.streams.processes import shard
from watersic_hf.streams.stacks import PassedStack, behind

BlockArguments = list[tuple[tuple, dict]]
"""For every block, what it is called with besides its hidden states.  Blocks differ: layers with a
sliding window have a mask of their own."""


@dataclass
class BlockStream:
    """The hidden states of this process's calibration windows at the input of the next block.

    One stream is one model's: the partly quantized one's, or the original's.
    """

    hidden: States

    arguments: list[BlockArguments] = field(repr=False)
    """One per batch, as they may depend on its tokens: a decoder's blocks are called with what the
    encoder put out."""

    def copy(self) -> "BlockStream":
        """A stream of its own from the same hidden states on."""
        return BlockStream(copy.copy(self.hidden), self.arguments)

    def run(
        self, index: int, block: nn.Module, batch: int, *, hidden: Tensor | None = None
    ) -> Tensor:
        """Output of `block`, the model's block number `index`, on one batch, where the block is.

        Args:
            index: of the block.
            block: the block.
            batch: number of the batch.
            hidden: what to put in; default: the hidden states of the batch.
        """
        hidden = self.hidden[batch] if hidden is None else hidden
        inputs = (hidden, *self.arguments[batch][index])
        hidden, args, kwargs = moved(inputs, next(block.parameters()).device)
        return split_output(block(hidden, *args, **kwargs))[0]

    def advance(self, index: int, block: nn.Module, *, into: States | None = None) -> None:
        """Push all batches through a block; what comes out takes their place, or goes `into`."""
        for batch in range(len(self.hidden)):
            hidden = self.hidden[batch]
            output = self.run(index, block, batch, hidden=hidden).to(hidden.device)
            if into is None:
                self.hidden[batch] = output
            else:
                into.append(output)
        self.hidden = self.hidden if into is None else into


@torch.no_grad()
def block_stream(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    windows: Sequence[Tensor],
    *,
    batch_size: int,
    source: ResidentBlocks = RESIDENT,
    hidden: States | None = None,
    passed: Sequence[PassedStack] = (),
) -> BlockStream:
    """Run the model up to its first block on the windows of this process.

    To learn each block's own arguments, the first two batches of every shape run through all
    blocks, and the others too unless the arguments of those two, and of the first block, are equal.

    Args:
        model: the model.
        blocks: its blocks.
        windows: 1-D token ids, of all processes.
        batch_size: windows in a batch.
        source: where blocks come from.
        hidden: what the hidden states are appended to; default: a new list.
        passed: the stacks before it that need not run.
    """
    seen: dict[tuple[int, ...], list[BlockArguments]] = {}
    stream = BlockStream([] if hidden is None else hidden, [])
    for batch, tokens_BT in enumerate(shard(to_batches(windows, batch_size))):
        known = seen.setdefault(tuple(tokens_BT.shape), [])
        by_shape = len(known) > 1 and known[0] is known[1]
        with behind(passed, batch):
            wanted = blocks[:1] if by_shape else blocks
            calls = block_calls(model, wanted, tokens_BT, source=source)
            arguments = _shared([c[1:] for c in calls], known[0][: len(calls)] if known else None)
            if by_shape and not _same(arguments[0], known[0][0]):
                calls = block_calls(model, blocks, tokens_BT, source=source)
                arguments = _shared([call[1:] for call in calls], known[0])
        stream.hidden.append(calls[0][0])
        # equal arguments are kept once: masks of long windows are large
        if known and all(map(_same, arguments, known[0])):
            arguments = known[0]
        known.append(arguments)
        stream.arguments.append(arguments)
    return stream


def _shared(value: Any, known: Any) -> Any:
    """`value`, in which every tensor that equals its counterpart in `known` is replaced by it."""
    if isinstance(value, Tensor):
        return known if isinstance(known, Tensor) and equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(known) == len(value):
        return type(value)(map(_shared, value, known))
    if type(value) is dict and type(known) is dict:
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    return value


def _same(value: Any, known: Any) -> bool:
    """Whether two structures hold the very same tensors, and equal values."""
    if type(value) is not type(known):
        return False
    if type(value) in (tuple, list):
        return len(value) == len(known) and all(map(_same, value, known))
    if type(value) is dict:
        return value.keys() == known.keys() and all(_same(value[k], known[k]) for k in value)
    return value is known or (not isinstance(value, Tensor) and bool(value == known))
