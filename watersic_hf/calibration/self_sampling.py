"""Calibration text that a model writes itself: the set ``"self"``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Sequences that a model samples at a time.
_BATCH = 16


def self_sampled(model: Any, samples: int, sequence_length: int, seed: int) -> list[Tensor]:
    """Sample sequences from the model's own distribution, at temperature 1 without truncation.

    What generation_config.json says about sampling, penalties, beams or limits has no effect; only
    the special tokens are taken from it.  A sequence does not end before it is full.

    Args:
        model: the model.
        samples: number of sequences.
        sequence_length: tokens of a sequence.
        seed: seed of the sampling; the global random state is left unchanged.

    Raises:
        ValueError: there is no model, or it cannot generate.
    """
    if model is None or not model.can_generate():
        raise ValueError('the calibration set "self" needs a model that can generate')
    config = model.generation_config
    start = next(i for i in (config.bos_token_id, config.eos_token_id, 0) if i is not None)
    start = start[0] if isinstance(start, list) else start
    plain = type(config)(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=sequence_length - 1,
        max_new_tokens=sequence_length - 1,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=start,
    )
    windows: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _sampling(model, plain):
        torch.manual_seed(seed)
        while len(windows) < samples:
            batch = min(_BATCH, samples - len(windows))
            prompt = torch.full((batch, 1), start, device=model.device)
            mask = torch.ones_like(prompt)
            windows.extend(
                model.generate(prompt, attention_mask=mask, generation_config=plain).cpu()
            )
    return windows


@contextmanager
def _sampling(model: Any, generation_config: Any) -> Iterator[None]:
    """Have a model generate with nothing but a configuration, and without dropout."""
    # `generate` fills what is not set in its argument from the model's own configuration
    own, model.generation_config = model.generation_config, generation_config
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)
