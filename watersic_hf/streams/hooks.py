"""Hooks that observe a running block, or the output head: inputs of layers and modules.

Shapes: B = windows in a batch, T = tokens, N = inputs of a layer.
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError
from watersic_hf.streams.batches import States, model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.calls import StopForwardError, to_device
from watersic_hf.streams.replay import Replay
from watersic_hf.streams.stream import BlockStream
from watersic_hf.streams.topology import InputGroup


@dataclass(frozen=True)
class BlockView:
    """One model at one block: the block, and the stream of hidden states that reaches it.

    During calibration there can be two views of a block: one of the partly quantized model, and
    one of the original model.
    """

    stream: BlockStream

    index: int
    """Number of the block in its stack."""

    block: nn.Module

    replay: Replay | None = None
    """What answers modules of the block that have run before; None runs all of them."""

    @property
    def batches(self) -> int:
        """Number of batches of this process."""
        return len(self.stream.hidden)

    def run(self, batch: int, *, hidden: Tensor | None = None) -> Tensor:
        """Run the whole block on one batch; see `BlockStream.run`."""
        return self.stream.run(self.index, self.block, batch, hidden=hidden)

    def run_on(self, batch: int, *, watched: Collection[str] = ()) -> Tensor:
        """Run what has not run yet of the block on one batch.

        Args:
            batch: number of the batch.
            watched: names of modules in the block whose calls are observed.
        """
        if self.replay is None:
            return self.run(batch)
        with self.replay.answering(self.block, batch, watched):
            return self.run(batch)

    def advance(self, *, into: States | None = None) -> None:
        """Push the stream through the block; see `BlockStream.advance`."""
        self.stream.advance(self.index, self.block, into=into, run=self._run_last)

    def _run_last(self, batch: int) -> Tensor:
        """Run the block on one batch for the last time."""
        output = self.run_on(batch)
        if self.replay is not None:
            self.replay.forget(batch)
        return output


@dataclass
class GroupRecord:
    """What reaches a group of layers in one batch."""

    inputs: list[Tensor]
    """Input of the group, one tensor per call."""

    residual: Tensor | None
    """State of the residual stream that the group's output is added to, if there is one."""

    outputs: list[Tensor] = field(default_factory=list)
    """Output of the group's first layer, one tensor per call, if it was asked for."""


def group_inputs(view: BlockView, group: InputGroup, batch: int) -> list[Tensor]:
    """Return the inputs of a group in one batch, one tensor per call."""
    return group_record(view, group, batch).inputs


def group_record(
    view: BlockView, group: InputGroup, batch: int, *, outputs: bool = False
) -> GroupRecord:
    """Run a block on one batch until all inputs of a group have been seen.

    Args:
        view: the block.
        group: the group.
        batch: number of the batch.
        outputs: whether to record the outputs of its first layer as well.
    """
    record = GroupRecord([], view.stream.hidden[batch] if group.residual == "" else None)
    parallel_outputs: list[Tensor] = []

    def record_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.inputs.append(args[0])
        if not outputs:
            _stop_after(group.calls, record.inputs)

    def record_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        record.outputs.append(output)
        _stop_after(group.calls, record.outputs)

    def record_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.residual = args[0]

    def record_parallel(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        parallel_outputs.append(output)

    first = view.block.get_submodule(group.layers[0])
    watched = [group.layers[0], group.residual or "", group.parallel_layer or ""]
    with contextlib.ExitStack() as hooks, contextlib.suppress(StopForwardError):
        # registered first, as the input of the layer itself can be the residual stream
        if group.residual:
            base = view.block.get_submodule(group.residual)
            hooks.enter_context(base.register_forward_pre_hook(record_residual))
        if group.parallel_layer is not None:
            other = view.block.get_submodule(group.parallel_layer)
            hooks.enter_context(other.register_forward_hook(record_parallel))
        hooks.enter_context(first.register_forward_pre_hook(record_input))
        if outputs:
            hooks.enter_context(first.register_forward_hook(record_output))
        view.run_on(batch, watched=watched)
    if parallel_outputs:
        output = parallel_outputs[0].view(record.residual.shape)
        record.residual = record.residual.to(output.device) + output
    return record


def _stop_after(calls: int, recorded: list[Tensor]) -> None:
    """Stop the run of the block once a tensor was recorded in every call."""
    if len(recorded) == calls:
        raise StopForwardError


def module_arguments(view: BlockView, name: str) -> list[tuple]:
    """Record the positional arguments of the first call of a module in every batch, on the CPU.

    Args:
        view: the block that holds the module.
        name: name of the module within the block.

    Returns:
        One tuple per batch of this process.
    """
    arguments: list[tuple] = []

    def record(module: nn.Module, args: tuple) -> None:
        arguments.append(to_device(args, torch.device("cpu")))
        raise StopForwardError

    handle = view.block.get_submodule(name).register_forward_pre_hook(record)
    try:
        for batch in range(view.batches):
            with contextlib.suppress(StopForwardError):
                view.run_on(batch, watched=[name])
    finally:
        handle.remove()
    return arguments


@torch.no_grad()
def head_pass(
    model: nn.Module,
    head: str,
    tokens_BT: Tensor,
    *,
    whole: bool,
    source: ResidentBlocks = RESIDENT,
) -> tuple[Tensor, Tensor | None]:
    """Run a model on some windows and record the input of its output head.

    Args:
        model: the model.
        head: full name of its head.
        tokens_BT: the windows.
        whole: whether to run the head and everything after it as well.
        source: where blocks come from; default: they are in memory.

    Returns:
        The input of the head, and the logits of the model, None unless `whole`.

    Raises:
        CalibrationError: the windows do not reach the head.
    """
    inputs: list[Tensor] = []
    logits = None

    def record(module: nn.Module, args: tuple) -> None:
        inputs.append(args[0])
        if not whole:
            raise StopForwardError

    handle = model.get_submodule(head).register_forward_pre_hook(record)
    try:
        with source.flow():
            logits = getattr(model(**model_inputs(model, tokens_BT)), "logits", None)
    except StopForwardError:
        pass
    finally:
        handle.remove()
    if not inputs:
        raise CalibrationError(
            f"{head}: calibration text does not reach it. Leave it dense, or quantize the model "
            f"without `dataset`."
        )
    return inputs[0], logits
