"""Batches of calibration windows, and the arguments with which a model reads them.

Shapes: B = windows in a batch, T = tokens, D = width of the hidden states.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from watersic_hf.core import CalibrationError


class States(Protocol):
    """Hidden states, one B x T x D tensor per batch: a list, or a container on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int) -> Tensor: ...

    def append(self, hidden: Tensor) -> object:
        """Add the hidden states of the next batch."""
        ...


def batch_numbers(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divide windows into batches of consecutive windows that have the same length.

    Args:
        lengths: tokens in every window.
        batch_size: most windows in a batch.

    Returns:
        For every batch, the numbers of its windows.
    """
    batches: list[list[int]] = []
    for number, length in enumerate(lengths):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and lengths[last[0]] == length:
            last.append(number)
        else:
            batches.append([number])
    return batches


def to_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Stack the windows of every batch into a B x T tensor; see `batch_numbers`."""
    numbers = batch_numbers([len(window) for window in windows], batch_size)
    return [torch.stack([windows[number] for number in batch]) for batch in numbers]


def model_inputs(model: nn.Module, tokens_BT: Tensor) -> dict[str, Any]:
    """Return the keyword arguments with which a model reads some windows.

    An encoder-decoder model reads a window with its encoder and predicts the same window with its
    decoder.

    Raises:
        CalibrationError: the main input of the model is not token ids.
    """
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise CalibrationError(
            f"{type(model).__name__} reads `{main_input}`, but calibration text provides only "
            f"token ids. Quantize it without `dataset`."
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
