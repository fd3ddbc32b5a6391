"""Stacks of blocks that can be run one by one, and how a model continues after them."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError
from watersic_hf.streams.batches import States, model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.calls import equal, split_call, split_output
from watersic_hf.streams.topology import Stack, block_stacks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunnableStack:
    """A stack of blocks that can be run one by one."""

    blocks: Stack

    other_outputs: tuple | None
    """What its last block returns after the hidden states; None if it returns a tensor."""

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks without their names."""
        return [block for _, block in self.blocks]

    @contextlib.contextmanager
    def bypassed(self, hidden: Tensor) -> Iterator[None]:
        """Make every block return `hidden`, so that the model continues after the stack with it."""

        def forward(*args: Any, **kwargs: Any) -> Tensor | tuple:
            return hidden if self.other_outputs is None else (hidden, *self.other_outputs)

        for block in self.modules:
            block.forward = forward
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward


@dataclass(frozen=True)
class PassedStack:
    """A stack that all calibration windows have passed: its output is known and it need not run."""

    stack: RunnableStack

    hidden: States
    """Output of the stack for the batches of this process."""


@contextlib.contextmanager
def bypass_stacks(
    passed: Sequence[PassedStack], batch: int, *, row: int | None = None
) -> Iterator[None]:
    """Make a model continue after `passed` stacks with their known outputs.

    Args:
        passed: the stacks.
        batch: number of the batch that the model is called with.
        row: number of the window within the batch, if the model is called with that one alone;
            default: all of them.
    """
    with contextlib.ExitStack() as bypassed:
        for part in passed:
            hidden = part.hidden[batch]
            if row is not None:
                hidden = hidden[row : row + 1]
            bypassed.enter_context(part.stack.bypassed(hidden))
        yield


@torch.no_grad()
def runnable_stacks(
    model: nn.Module,
    layers: Sequence[str],
    window: Tensor,
    *,
    source: ResidentBlocks = RESIDENT,
) -> list[RunnableStack]:
    """Return the stacks that can be run block by block, in the order in which the model runs them.

    The model is run once on `window`: in a runnable stack, each block is called exactly once, with
    the hidden states that the block before it returned.  The other stacks are logged.

    Args:
        model: the model.
        layers: full names of the layers to calibrate; stacks without any of them are ignored.
        window: 1-D token ids.
        source: where blocks come from; default: they are in memory.

    Raises:
        CalibrationError: no stack can be run block by block.
    """
    stacks = block_stacks(model, layers)
    calls = _record_calls(model, [block for stack in stacks for _, block in stack], window, source)
    obstacles = [_obstacle([block for _, block in stack], calls) for stack in stacks]
    named = [
        f"{stack[0][0].rpartition('.')[0]} ({obstacle})"
        for stack, obstacle in zip(stacks, obstacles, strict=True)
        if obstacle is not None
    ]
    if len(named) == len(stacks):
        raise CalibrationError(
            f"{type(model).__name__} cannot be calibrated block by block: {', '.join(named)}. "
            f"Quantize it without `dataset`."
        )
    if named:
        logger.warning(
            "Stays dense, as it cannot be calibrated block by block: %s.", ", ".join(named)
        )
    called = [call.block for call in calls]
    runnable = [
        RunnableStack(stack, calls[called.index(stack[-1][1])].other_outputs)
        for stack, obstacle in zip(stacks, obstacles, strict=True)
        if obstacle is None
    ]
    return sorted(runnable, key=lambda stack: called.index(stack.modules[0]))


@dataclass
class _BlockCall:
    """One call of a block during a forward pass of its model."""

    block: nn.Module

    chained: bool
    """Whether the block was called with the hidden states that the last block returned."""

    other_outputs: tuple | None = None
    """What it returned after the hidden states; None if it returned a tensor."""


def _record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], window: Tensor, source: ResidentBlocks
) -> list[_BlockCall]:
    """Return all calls of `blocks`, in order, while the model reads a window."""
    calls: list[_BlockCall] = []
    last: Tensor | None = None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, *_ = split_call(args, kwargs)
        # non-finite states still form a chain: the block loop reports the layer where they begin
        chained = last is not None and equal(hidden.nan_to_num(), last.nan_to_num())
        calls.append(_BlockCall(module, chained))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal last
        last, calls[-1].other_outputs = split_output(output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with source.flow():
            getattr(model, "base_model", model)(**model_inputs(model, window[None]))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _obstacle(blocks: Sequence[nn.Module], calls: Sequence[_BlockCall]) -> str | None:
    """Return why a stack cannot be run block by block, or None if it can."""
    called = [call for call in calls if call.block in blocks]
    if not called:
        return "text does not reach it"
    if [call.block for call in called] != list(blocks):
        return "its blocks are not called one after the other, once each"
    if not all(call.chained for call in called[1:]):
        return "its blocks are not called on the output of the block before"
    return None
