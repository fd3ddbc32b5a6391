"""Hooks: what is seen of a block while it runs, and of the output head.

Shapes: B = windows in a batch, T = tokens, N = inputs of a layer.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError
from watersic_hf.streams.batches import model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.calls import StopForwardError, moved
from watersic_hf.streams.stream import BlockStream
from watersic_hf.streams.topology import InputGroup


@dataclass(frozen=True)
class Side:
    """A model at one block: the hidden states that reach the block, and the block itself."""

    stream: BlockStream
    block: nn.Module


def group_inputs(side: Side, index: int, group: InputGroup, batch: int) -> list[Tensor]:
    """The inputs of a group in one batch, a tensor for every call."""
    return group_record(side, index, group, batch).inputs


def module_arguments(side: Side, index: int, name: str) -> list[tuple]:
    """What a module of a block is called with, once in every batch of this process, on the CPU."""
    arguments: list[tuple] = []

    def record(module: nn.Module, args: tuple) -> None:
        arguments.append(moved(args, torch.device("cpu")))
        raise StopForwardError

    handle = side.block.get_submodule(name).register_forward_pre_hook(record)
    try:
        for batch in range(len(side.stream.hidden)):
            with contextlib.suppress(StopForwardError):
                side.stream.run(index, side.block, batch)
    finally:
        handle.remove()
    return arguments


@dataclass
class GroupRecord:
    """What reaches a group in one batch: its inputs, a tensor a call, and the residual stream."""

    inputs: list[Tensor]
    residual: Tensor | None


def group_record(side: Side, index: int, group: InputGroup, batch: int) -> GroupRecord:
    """Run a block on one batch until all inputs of the group have been seen."""
    record = GroupRecord([], side.stream.hidden[batch] if group.residual == "" else None)
    beside: list[Tensor] = []

    def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.inputs.append(args[0])
        if len(record.inputs) == group.calls:
            raise StopForwardError

    def see_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.residual = args[0]

    def see_beside(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        beside.append(output)

    handles = []
    # first, as the layer itself may have the residual stream as its input
    if group.residual:
        base = side.block.get_submodule(group.residual)
        handles.append(base.register_forward_pre_hook(see_residual))
    if group.beside is not None:
        other = side.block.get_submodule(group.beside)
        handles.append(other.register_forward_hook(see_beside))
    layer = side.block.get_submodule(group.layers[0])
    handles.append(layer.register_forward_pre_hook(see_input))
    try:
        side.stream.run(index, side.block, batch)
    except StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if beside:
        output = beside[0].view(record.residual.shape)
        record.residual = record.residual.to(output.device) + output
    return record


@torch.no_grad()
def head_pass(
    model: nn.Module,
    head: str,
    tokens_BT: Tensor,
    *,
    whole: bool,
    source: ResidentBlocks = RESIDENT,
) -> tuple[Tensor, Tensor | None]:
    """What the output head of a model is called with on some windows.

    Args:
        model: the model.
        head: name of its head.
        tokens_BT: the windows.
        whole: whether to run the head and what follows it, too.
        source: where blocks come from.

    Returns:
        The head's input, and the model's logits if the whole model was run.

    Raises:
        CalibrationError: the windows do not reach the head.
    """
    seen: list[Tensor] = []
    logits = None

    def record(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
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
    if not seen:
        raise CalibrationError(
            f"{head}: calibration text does not reach it. Leave it dense, or quantize the model "
            f"without `dataset`."
        )
    return seen[0], logits
