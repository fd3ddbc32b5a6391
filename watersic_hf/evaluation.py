"""How good a quantized model is: perplexity, divergence from the original, agreement, speed."""

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

from watersic_hf.calibration import pydoc_texts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Averages over all predicted tokens of the evaluation windows."""

    windows: int
    tokens: int
    """Predicted tokens: all but the first of every window."""
    perplexity: float
    original_perplexity: float | None = None
    """Of the original; None without one."""
    kl_bits: float | None = None
    """KL(original || model) in bits per token; None without an original."""
    top1_agreement: float | None = None
    """Share of tokens at which both models' most likely token is the same."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, windows: Sequence[Tensor], original: torch.nn.Module | None = None
) -> Evaluation:
    """Evaluate a causal language model on windows of tokens.

    Logits are compared in float32; windows do not overlap, and see no context but their own.

    Args:
        model: the model to judge.
        windows: 1-D token ids, at least two each; text that no calibration has seen.
        original: the model to compare with, over the same vocabulary.

    Raises:
        ValueError: no window has two tokens.
    """
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("evaluation needs at least one window of two tokens or more")
    loss = original_loss = divergence = 0.0
    agreed = tokens = 0
    for window in tqdm(windows, desc="Evaluating", delay=3, leave=False):
        target_T = window[1:].to(model.device)
        log_p = _log_probabilities(model, window)
        loss += float(F.nll_loss(log_p, target_T, reduction="sum"))
        tokens += len(target_T)
        if original is not None:
            log_q = _log_probabilities(original, window).to(log_p.device)
            original_loss += float(F.nll_loss(log_q, target_T, reduction="sum"))
            divergence += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
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


@torch.no_grad()
def generation_speed(model: torch.nn.Module, prompt_T: Tensor, *, new_tokens: int = 64) -> float:
    """Tokens per second of greedy generation for one sequence, after one token of warm-up."""
    prompt = prompt_T[None].to(model.device)
    settings = {
        "attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    model.generate(prompt, max_new_tokens=1, **settings)
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)
    seconds = time.perf_counter() - start
    return (out.shape[1] - prompt.shape[1]) / seconds


def evaluation_text(file: str | os.PathLike | None = None) -> str:
    """The text of a file, or the topics of Python's documentation that no calibration uses."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    return "\n\n".join(pydoc_texts(held_out=True))


def evaluation_windows(
    text: str, tokenizer: object, *, sequence_length: int, limit: int | None = None
) -> list[Tensor]:
    """Consecutive windows of a text, from its beginning; a rest shorter than a window is dropped.

    Raises:
        ValueError: the text is shorter than one window.
    """
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(tokens) // sequence_length
    if count == 0:
        raise ValueError(
            f"the evaluation text has {len(tokens)} tokens, but one window needs {sequence_length}"
        )
    return list(tokens[: count * sequence_length].view(count, sequence_length)[:limit])


def _log_probabilities(model: torch.nn.Module, window_T: Tensor) -> Tensor:
    """Log-probabilities of tokens 1.. given those before, float32."""
    logits = model(input_ids=window_T[None].to(model.device), use_cache=False).logits
    return F.log_softmax(logits[0, :-1].float(), dim=-1)
