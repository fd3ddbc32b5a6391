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

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Output of `block`, the model's block number `index`, on one batch, where the block is."""
        hidden = self.hidden[batch]
        inputs = (hidden, *self.arguments[tuple(hidden.shape[:2])][index])
        hidden, args, kwargs = _moved(inputs, next(block.parameters()).device)
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

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
    for tokens_BT in _batches(windows, batch_size):
        calls = _block_calls(
            body,
            blocks[:1] if tuple(tokens_BT.shape) in arguments else blocks,
            tokens_BT.to(device),
        )
        hidden.append(calls[0][0])
        arguments.setdefault(tuple(tokens_BT.shape), [(args, kwargs) for _, args, kwargs in calls])
    return BlockStream(hidden, arguments)


def group_moments(
    stream: BlockStream, index: int, block: nn.Module, group: InputGroup, *, name: str
) -> Moments:
    """Second moments of the input of a group of layers, over all windows.

    The block is run only as far as the group's input.

    Raises:
        CalibrationError: the inputs are not finite; the message names the layer.
    """
    layer = block.get_submodule(group.layers[0])
    moments = MomentAccumulator(layer.in_features, device=next(block.parameters()).device)
    calls = 0

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        moments.add(args[0])
        calls += 1
        if calls == group.calls:
            raise _StopForwardError

    handle = layer.register_forward_pre_hook(add)
    try:
        for batch in range(len(stream.hidden)):
            calls = 0
            try:
                stream.run(index, block, batch)
            except _StopForwardError:
                continue
    except CalibrationError as error:
        raise CalibrationError(f"{name}.{group.layers[0]}: {error}") from error
    finally:
        handle.remove()
    return moments.result()


def _moved(value: Any, device: torch.device) -> Any:
    """The same structure with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Windows of equal length together, in order, at most `batch_size` of them."""
    batches: list[list[Tensor]] = []
    for window in windows:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]


def _block_calls(
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
