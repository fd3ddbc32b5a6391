"""Perplexity and divergence from the original on windows of text, and speed of generation."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from watersic_hf.calibration import pydoc_texts, read_text, text_windows
from watersic_hf.evaluation.divergence import kl_nats, log_probabilities, window_logits

#: Bytes of float32 log-probabilities of one model at a time, few enough for the cache of a CPU.
SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Averages over all predicted tokens of the evaluation windows."""

    windows: int
    tokens: int
    """Number of predicted tokens: all but the first of every window."""
    perplexity: float
    original_perplexity: float | None = None
    """Perplexity of the original model; None if there is none to compare with."""
    kl_bits: float | None = None
    """KL(original || model) in bits per token; None without an original model."""
    top1_agreement: float | None = None
    """Fraction of tokens for which both models predict the same most likely token."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, windows: Sequence[Tensor], original: torch.nn.Module | None = None
) -> Evaluation:
    """Evaluate a causal language model on windows of tokens.

    Logits are compared in float32.  Windows are independent: tokens of one are no context for the
    next.

    Args:
        model: the model to evaluate.
        windows: 1-D token ids of text that was not used for calibration.  Windows of fewer than two
            tokens are ignored.
        original: the model to compare with, over the same vocabulary (default: none).

    Raises:
        ValueError: no window has two tokens.
    """
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("evaluation needs at least one window of two tokens or more")
    loss = original_loss = divergence = 0.0
    agreed = tokens = 0
    for window in tqdm(windows, desc="Evaluating", delay=3, leave=False):
        tokens += len(window) - 1
        target_T = window[1:].to(model.device)
        logits = [
            window_logits(m, window)[:-1].to(model.device)
            for m in (model, original)
            if m is not None
        ]
        for part, (log_q, *others) in log_probabilities(*logits, scratch_bytes=SCRATCH_BYTES):
            loss += float(F.nll_loss(log_q, target_T[part], reduction="sum"))
            for log_p in others:
                original_loss += float(F.nll_loss(log_p, target_T[part], reduction="sum"))
                divergence += kl_nats(log_p, log_q)
                agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    compared = original is not None
    return Evaluation(
        windows=len(windows),
        tokens=tokens,
        perplexity=math.exp(loss / tokens),
        original_perplexity=math.exp(original_loss / tokens) if compared else None,
        kl_bits=divergence / tokens / math.log(2) if compared else None,
        top1_agreement=agreed / tokens if compared else None,
    )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model generates, and what it takes in memory."""

    first_token_seconds: float
    """Time to process the prompt and give the first token."""

    tokens_per_second: float
    """Speed of the tokens after the first."""

    memory_bytes: int
    """Bytes of all weights; of quantized layers, of the form in use and of the stored one, even if
    that is mapped from a file."""


@torch.no_grad()
def generation_speed(model: torch.nn.Module, prompt_T: Tensor, *, new_tokens: int = 64) -> Speed:
    """Measure greedy generation, after a warm-up of two tokens.

    Args:
        model: the model.
        prompt_T: token ids of one prompt.
        new_tokens: number of tokens to generate, at least 2 (default: 64).
    """
    prompt = prompt_T[None].to(model.device)
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **settings)
        return time.perf_counter() - start

    seconds(2)
    first = seconds(1)
    # the rest must be positive, however noisy the times are
    rest = max(seconds(new_tokens) - first, 1e-9)
    return Speed(
        first_token_seconds=first,
        tokens_per_second=(new_tokens - 1) / rest,
        memory_bytes=model.get_memory_footprint(),
    )


def evaluation_text(file: str | os.PathLike | None = None) -> str:
    """Return the text to evaluate on.

    Args:
        file: a text file, in UTF-8 or with a byte order mark (default: topics of Python's
            documentation that the calibration set "pydoc" leaves out).

    Raises:
        ValueError: the file does not exist or is not text.
    """
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"the text file {file} does not exist")
        return read_text(Path(file))
    return "\n\n".join(pydoc_texts(held_out=True))


def evaluation_windows(
    text: str, tokenizer: object, *, sequence_length: int, limit: int | None = None
) -> list[Tensor]:
    """Cut a text into windows of tokens; see `watersic_hf.calibration.data.text_windows`.

    Args:
        text: the text.
        tokenizer: tokenizer of the model to evaluate.
        sequence_length: number of tokens per window.
        limit: maximum number of windows, from the beginning of the text (default: all).

    Raises:
        ValueError: the text is shorter than one window.
    """
    windows = text_windows(text, tokenizer, sequence_length)
    if len(windows[0]) < sequence_length:
        raise ValueError(
            f"the evaluation text has {len(windows[0])} tokens, but one window needs "
            f"{sequence_length}; use a longer text or shorter windows"
        )
    return windows[:limit]
