"""The hidden states of a model's calibration windows, pushed from block to block.

Shapes: B = windows in a batch, T = tokens, D = width of the hidden states.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.streams.batches import States, to_batches
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.calls import block_calls, equal, split_output, to_device
from watersic_hf.streams.processes import shard
from watersic_hf.streams.stacks import PassedStack, bypass_stacks

BlockArguments = list[tuple[tuple, dict]]
"""For every block, the positional and keyword arguments besides its hidden states.  They differ
between blocks: layers with sliding-window attention, for example, have their own mask."""


@dataclass
class BlockStream:
    """Hidden states of this process's calibration windows at the input of the next block.

    A stream belongs to one model: the partly quantized one, or the original one.
    """

    hidden: States

    arguments: list[BlockArguments] = field(repr=False)
    """One entry per batch, as arguments can depend on the tokens: the blocks of a decoder are
    called with the output of the encoder."""

    def copy(self) -> "BlockStream":
        """Return a stream that starts from the same hidden states and advances independently."""
        return BlockStream(copy.copy(self.hidden), self.arguments)

    def run(
        self, index: int, block: nn.Module, batch: int, *, hidden: Tensor | None = None
    ) -> Tensor:
        """Run a block on one batch, on the device of the block.

        Args:
            index: number of the block in its stack.
            block: the block.
            batch: number of the batch.
            hidden: B x T x D input; default: the hidden states of the batch.

        Returns:
            The hidden states that the block returns.
        """
        hidden = self.hidden[batch] if hidden is None else hidden
        inputs = (hidden, *self.arguments[batch][index])
        hidden, args, kwargs = to_device(inputs, next(block.parameters()).device)
        return split_output(block(hidden, *args, **kwargs))[0]

    def advance(
        self,
        index: int,
        block: nn.Module,
        *,
        into: States | None = None,
        run: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Replace the hidden states of all batches by the output of a block.

        Args:
            index: number of the block in its stack.
            block: the block.
            into: container that the outputs are appended to and that becomes `hidden`; default:
                they are written into the present one.
            run: runs the block on the batch of a given number; default: the method `run`.
        """
        run = functools.partial(self.run, index, block) if run is None else run
        for batch in range(len(self.hidden)):
            output = run(batch).to(self.hidden[batch].device)
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
    """Run a model up to its first block on the windows of this process.

    To learn the arguments of every block, the first two batches of each shape run through all
    blocks.  If their arguments are equal, later batches of that shape stop at the first block and
    reuse them, provided that the arguments of the first block are equal again.

    Args:
        model: the model.
        blocks: its blocks, in order.
        windows: 1-D token ids, those of all processes.
        batch_size: windows in a batch.
        source: where blocks come from; default: they are in memory.
        hidden: container that the hidden states are appended to; default: a new list.
        passed: stacks that precede `blocks` and need not run.
    """
    known_arguments: dict[tuple[int, ...], list[BlockArguments]] = {}
    stream = BlockStream([] if hidden is None else hidden, [])
    for batch, tokens_BT in enumerate(shard(to_batches(windows, batch_size))):
        known = known_arguments.setdefault(tuple(tokens_BT.shape), [])
        by_shape = len(known) > 1 and known[0] is known[1]
        with bypass_stacks(passed, batch):
            observed = blocks[:1] if by_shape else blocks
            calls = block_calls(model, observed, tokens_BT, source=source)
            arguments = _share_tensors(
                [c[1:] for c in calls], known[0][: len(calls)] if known else None
            )
            if by_shape and not _same(arguments[0], known[0][0]):
                calls = block_calls(model, blocks, tokens_BT, source=source)
                arguments = _share_tensors([call[1:] for call in calls], known[0])
        stream.hidden.append(calls[0][0])
        # equal arguments are kept once: masks of long windows are large
        if known and all(map(_same, arguments, known[0])):
            arguments = known[0]
        known.append(arguments)
        stream.arguments.append(arguments)
    return stream


def _share_tensors(value: Any, known: Any) -> Any:
    """Replace every tensor in `value` that equals its counterpart in `known` by that one."""
    if isinstance(value, Tensor):
        return known if isinstance(known, Tensor) and equal(value, known) else value
    if type(value) in (tuple, list) and type(known) is type(value) and len(known) == len(value):
        return type(value)(map(_share_tensors, value, known))
    if type(value) is dict and type(known) is dict:
        return {key: _share_tensors(item, known.get(key)) for key, item in value.items()}
    return value


def _same(value: Any, known: Any) -> bool:
    """Return whether two structures hold the same tensor objects and otherwise equal values."""
    if type(value) is not type(known):
        return False
    if type(value) in (tuple, list):
        return len(value) == len(known) and all(map(_same, value, known))
    if type(value) is dict:
        return value.keys() == known.keys() and all(_same(value[k], known[k]) for k in value)
    return value is known or (not isinstance(value, Tensor) and bool(value == known))
