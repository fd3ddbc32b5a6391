"""Hooks: what flows into the blocks of a model, and into the layers of a block.

Shapes: B = windows in a batch, T = tokens, N = inputs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.calibration.topology import InputGroup
from watersic_hf.core import CalibrationError, MomentAccumulator, Moments


class _StopForwardError(Exception):
    """Raised by a hook once it has seen what it was there for."""


@dataclass
class BlockStream:
    """The hidden states of all calibration windows at the input of the next block.

    One stream is one model's: the partly quantized one's, or the original's.
    """

    hidden: list[Tensor]
    """One B x T x D tensor per batch."""

    arguments: dict[tuple[int, ...], list[tuple[tuple, dict]]] = field(repr=False)
    """By the shape (B, T) of a batch: what each block is called with besides its hidden states.
    Blocks differ: layers with a sliding window have a mask of their own."""

    returns_tuples: bool = False
    """Whether the blocks put out a tuple that begins with the hidden states; known once one ran."""

    def copy(self) -> "BlockStream":
        """A stream of its own from the same hidden states on."""
        return BlockStream(list(self.hidden), self.arguments)

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Output of `block`, the model's block number `index`, on one batch, where the block is."""
        hidden = self.hidden[batch]
        inputs = (hidden, *self.arguments[tuple(hidden.shape[:2])][index])
        hidden, args, kwargs = _moved(inputs, next(block.parameters()).device)
        output = block(hidden, *args, **kwargs)
        self.returns_tuples = isinstance(output, tuple)
        return output[0] if self.returns_tuples else output

    def advance(self, index: int, block: nn.Module) -> None:
        """Push all batches through a block."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, block, batch).to(self.hidden[batch].device)


def block_stream(
    model: nn.Module, blocks: Sequence[nn.Module], windows: Sequence[Tensor], *, batch_size: int
) -> BlockStream:
    """Run the model up to its first block on all windows.

    One batch of every shape runs through all blocks, to learn each block's own arguments.
    """
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)
    arguments: dict[tuple[int, ...], list[tuple[tuple, dict]]] = {}
    hidden: list[Tensor] = []
    for tokens_BT in to_batches(windows, batch_size):
        calls = block_calls(
            body,
            blocks[:1] if tuple(tokens_BT.shape) in arguments else blocks,
            tokens_BT.to(device),
        )
        hidden.append(calls[0][0])
        arguments.setdefault(tuple(tokens_BT.shape), [(args, kwargs) for _, args, kwargs in calls])
    return BlockStream(hidden, arguments)


@dataclass(frozen=True)
class Side:
    """A model at one block: the hidden states that reach the block, and the block itself."""

    stream: BlockStream
    block: nn.Module


def group_moments(
    working: Side,
    index: int,
    group: InputGroup,
    *,
    name: str,
    original: Side | None = None,
    residual: bool = False,
    importance: Sequence[Tensor] | None = None,
) -> tuple[Moments, Moments | None]:
    """Second moments of the input of a group of layers, over all windows, in one pass.

    Both blocks are run only as far as the group's input.

    Args:
        working: the partly quantized model.
        index: of the block in the model.
        group: the layers.
        name: of the block, for messages.
        original: the model before quantization; with it the moments are those of both streams.
        residual: also collect S_R, the error of the residual stream that the group writes to
            (`InputGroup.residual`) times its input; needs `original`.
        importance: weight of every token, by batch, B x T.

    Returns:
        The moments, and those weighted by `importance` if it is given.

    Raises:
        CalibrationError: the inputs are not finite; the message names the layer.
    """
    layer = working.block.get_submodule(group.layers[0])
    residual = residual and group.residual is not None

    def accumulator() -> MomentAccumulator:
        return MomentAccumulator(
            layer.in_features,
            drift=original is not None,
            rows_of_residual=layer.out_features if residual else None,
            device=next(working.block.parameters()).device,
        )

    plain, weighted = accumulator(), None if importance is None else accumulator()
    try:
        for batch in range(len(working.stream.hidden)):
            seen = _record(working, index, group, batch)
            first = None if original is None else _record(original, index, group, batch)
            x, drifted = (seen, None) if first is None else (first, seen)
            error = None
            if residual:
                error = first.residual.float() - seen.residual.float()
            for call, x_TN in enumerate(x.inputs):
                streams = (x_TN, None if drifted is None else drifted.inputs[call])
                plain.add(*streams, residual_TA=error)
                if weighted is not None:
                    weight_T = importance[batch].to(x_TN.device)
                    weighted.add(*streams, residual_TA=error, weight_T=weight_T)
    except CalibrationError as error:
        raise CalibrationError(f"{name}.{group.layers[0]}: {error}") from error
    return plain.result(), None if weighted is None else weighted.result()


def group_inputs(side: Side, index: int, group: InputGroup, batch: int) -> list[Tensor]:
    """The inputs of a group in one batch, a tensor for every call."""
    return _record(side, index, group, batch).inputs


@dataclass
class _Record:
    """What reaches a group in one batch: its inputs, a tensor a call, and the residual stream."""

    inputs: list[Tensor]
    residual: Tensor | None


def _record(side: Side, index: int, group: InputGroup, batch: int) -> _Record:
    """Run a block on one batch until all inputs of the group have been seen."""
    record = _Record([], side.stream.hidden[batch] if group.residual == "" else None)

    def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.inputs.append(args[0])
        if len(record.inputs) == group.calls:
            raise _StopForwardError

    def see_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        record.residual = args[0]

    handles = [side.block.get_submodule(group.layers[0]).register_forward_pre_hook(see_input)]
    if group.residual:
        base = side.block.get_submodule(group.residual)
        handles.append(base.register_forward_pre_hook(see_residual))
    try:
        side.stream.run(index, side.block, batch)
    except _StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return record


def _moved(value: Any, device: torch.device) -> Any:
    """The same structure with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def to_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Windows of equal length together, in order, at most `batch_size` of them."""
    batches: list[list[Tensor]] = []
    for window in windows:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]


def block_calls(
    body: nn.Module, blocks: Sequence[nn.Module], tokens_BT: Tensor
) -> list[tuple[Tensor, tuple, dict]]:
    """Hidden states and other arguments that each of `blocks` is called with."""
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, args[1:], kwargs))
        if len(calls) == len(blocks):
            raise _StopForwardError

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        body(input_ids=tokens_BT, use_cache=False)
    except _StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls
