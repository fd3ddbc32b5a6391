"""How a model calls its blocks: with which arguments, and what a block returns.

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
    """Raised by a hook once it has seen what it was there for."""


def block_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens_BT: Tensor,
    *,
    source: ResidentBlocks = RESIDENT,
) -> list[tuple[Tensor, tuple, dict]]:
    """Hidden states and other arguments that each of `blocks` is called with."""
    calls: list[tuple[Tensor, tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(split_call(args, kwargs))
        if len(calls) == len(blocks):
            raise StopForwardError

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        # no block is fetched that only its arguments are wanted of: these hooks come first
        with source.flow():
            getattr(model, "base_model", model)(**model_inputs(model, tokens_BT))
    except StopForwardError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


def split_call(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states of a block's call, and the rest of it."""
    if args:
        return args[0], args[1:], dict(kwargs)
    if "hidden_states" not in kwargs:
        raise CalibrationError(
            f"a block is called with {sorted(kwargs)}, but to be calibrated it needs its hidden "
            f"states first, or as `hidden_states`. Quantize the model without `dataset`."
        )
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def split_output(output: Any) -> tuple[Tensor, tuple | None]:
    """What a block put out: the hidden states, and the rest if it is a tuple."""
    is_tensor = isinstance(output, Tensor)
    return (output, None) if is_tensor else (output[0], tuple(output[1:]))


def moved(value: Any, device: torch.device) -> Any:
    """The same structure with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
