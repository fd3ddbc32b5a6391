"""Stacks of blocks that can be run one by one, and how a model goes on behind them."""

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

    rest: tuple | None
    """What its last block puts out behind the hidden states; None if that is no tuple."""

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks without their names."""
        return [block for _, block in self.blocks]

    @contextlib.contextmanager
    def bypassed(self, hidden: Tensor) -> Iterator[None]:
        """Have a model go on behind these blocks with given hidden states."""

        def put_out(*args: Any, **kwargs: Any) -> Tensor | tuple:
            return hidden if self.rest is None else (hidden, *self.rest)

        for block in self.modules:
            block.forward = put_out
        try:
            yield
        finally:
            for block in self.modules:
                del block.forward


@dataclass(frozen=True)
class PassedStack:
    """A stack that need not run again, since what it puts out is known."""

    stack: RunnableStack

    hidden: States
    """What it puts out, for the batches of this process."""


@contextlib.contextmanager
def behind(passed: Sequence[PassedStack], batch: int, *, row: int | None = None) -> Iterator[None]:
    """Have a model go on behind the stacks that it has passed.

    Args:
        passed: the stacks.
        batch: the number of the batch that the model is called with.
        row: which of its windows, if it is one alone.
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
    """The stacks that can be run block by block, in the order in which the model runs them.

    Tried out on one window: each block of a stack is called once, and gets the hidden states that
    the one before it put out.  The other stacks are named in the log.

    Raises:
        CalibrationError: there is no such stack.
    """
    stacks = block_stacks(model, layers)
    calls = _chain(model, [block for stack in stacks for _, block in stack], window, source)
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
        logger.warning("Cannot be calibrated, and stays dense: %s.", ", ".join(named))
    called = [call.block for call in calls]
    runnable = [
        RunnableStack(stack, calls[called.index(stack[-1][1])].rest)
        for stack, obstacle in zip(stacks, obstacles, strict=True)
        if obstacle is None
    ]
    return sorted(runnable, key=lambda stack: called.index(stack.modules[0]))


@dataclass
class _BlockCall:
    """A call of a block in a model that is run once."""

    block: nn.Module

    chained: bool
    """Whether it got the hidden states that the block before put out."""

    rest: tuple | None = None
    """What it put out behind its hidden states; None if that was no tuple."""


def _chain(
    model: nn.Module, blocks: Sequence[nn.Module], window: Tensor, source: ResidentBlocks
) -> list[_BlockCall]:
    """All calls of blocks when the model reads a window."""
    calls: list[_BlockCall] = []
    last: Tensor | None = None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, *_ = split_call(args, kwargs)
        # states that are not finite are for the block loop to find
        chained = last is not None and equal(hidden.nan_to_num(), last.nan_to_num())
        calls.append(_BlockCall(module, chained))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal last
        last, calls[-1].rest = split_output(output)

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
    """Why a stack cannot be run block by block, or None if it can."""
    called = [call for call in calls if call.block in blocks]
    if not called:
        return "text does not reach it"
    if [call.block for call in called] != list(blocks):
        return "its blocks are not called one after the other, once each"
    if not all(call.chained for call in called[1:]):
        return "its blocks are not called on what the one before put out"
    return None
