"""How a model calls its blocks: the arguments of a block, and what it returns.

Shapes: B = windows in a batch, T = tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError
from watersic_hf.streams.batches import model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks


class StopForwardError(Exception):
    """Raised by a hook to end a forward pass whose remainder is not needed."""


def block_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens_BT: Tensor,
    *,
    source: ResidentBlocks = RESIDENT,
) -> list[tuple[Tensor, tuple, dict]]:
    """Record the arguments with which a model calls each of `blocks` on some windows.

    The forward pass ends at the call of the last of them.

    Returns:
        For every call, the hidden states, the other positional arguments and the keyword arguments.
    """
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(split_call(args, kwargs))
        if len(calls) == len(blocks):
            raise StopForwardError

    # these hooks run before those of `source`, so that the block at which the forward pass ends is
    # not fetched
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with source.flow():
            getattr(model, "base_model", model)(**model_inputs(model, tokens_BT))
    except StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def split_call(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """Separate the hidden states that a block is called with from its other arguments.

    Raises:
        CalibrationError: the block is called without hidden states.
    """
    if args:
        return args[0], args[1:], dict(kwargs)
    if "hidden_states" not in kwargs:
        raise CalibrationError(
            f"a block is called with {sorted(kwargs)}, but to be calibrated it needs its hidden "
            f"states as the first argument or as `hidden_states`. Quantize the model without "
            f"`dataset`."
        )
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def split_output(output: Any) -> tuple[Tensor, tuple | None]:
    """Separate the hidden states that a block returns from the other entries of its tuple.

    The second result is None if the block returns a tensor.
    """
    is_tensor = isinstance(output, Tensor)
    return (output, None) if is_tensor else (output[0], tuple(output[1:]))


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors in nested tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
