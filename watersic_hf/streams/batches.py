"""Batches of calibration windows, and what a model is called with to read them.

Shapes: B = windows in a batch, T = tokens, D = width of the hidden states.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError


class States(Protocol):
    """Hidden states, one B x T x D tensor per batch: a list, or what is kept on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int) -> Tensor: ...

    def append(self, hidden: Tensor) -> object:
        """Add the hidden states of the next batch."""
        ...


def batch_numbers(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Windows of equal length together, in order, at most `batch_size` of them, by number."""
    batches: list[list[int]] = []
    for number, length in enumerate(lengths):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and lengths[last[0]] == length:
            last.append(number)
        else:
            batches.append([number])
    return batches


def to_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """The windows of every batch, B x T."""
    numbers = batch_numbers([len(window) for window in windows], batch_size)
    return [torch.stack([windows[number] for number in batch]) for batch in numbers]


def model_inputs(model: nn.Module, tokens_BT: Tensor) -> dict[str, Any]:
    """What a model is called with to read some windows.

    An encoder-decoder reads a window with its encoder, and predicts the same window with its
    decoder.

    Raises:
        CalibrationError: the model does not read tokens.
    """
    wanted = getattr(model, "main_input_name", "input_ids")
    if wanted != "input_ids":
        raise CalibrationError(
            f"{type(model).__name__} reads `{wanted}`, and calibration text has only tokens to "
            f"give. Quantize it without `dataset`."
        )
    config = getattr(model, "config", None)
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    inputs = {"input_ids": tokens_BT, "use_cache": False}
    if getattr(config, "is_encoder_decoder", False):
        starts = (getattr(config, f"{kind}_token_id", None) for kind in ("decoder_start", "bos"))
        start = next((token for token in starts if token is not None), 0)
        first_B1 = torch.full_like(tokens_BT[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat([first_B1, tokens_BT[:, :-1]], dim=1)
    return inputs
