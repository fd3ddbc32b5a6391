"""Compare the next-token distributions of two models, a few tokens at a time.

Shapes: T = tokens of a window, V = vocabulary.

The float32 log-probabilities of a whole window take 2 GiB per model for 2048 tokens and a
vocabulary of 262,144, so they are never formed at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def window_logits(model: torch.nn.Module, window_T: Tensor) -> Tensor:
    """Return the logits of a causal language model for one window.

    Args:
        model: the model.
        window_T: token ids; the model sees no other context.

    Returns:
        T x V logits in the dtype of the model; row t predicts token t + 1.
    """
    return model(input_ids=window_T[None].to(model.device), use_cache=False).logits[0]


def log_probabilities(
    *logits_TV: Tensor, scratch_bytes: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Turn the logits of one or more models into log-probabilities, a few tokens at a time.

    Args:
        logits_TV: logits of each model for the same tokens, over the same vocabulary.  No gradient
            flows back into them.
        scratch_bytes: bound on the bytes of one model's log-probabilities; a chunk has at least one
            token.

    Yields:
        The slice of tokens, and the float32 log-probabilities of each model for these tokens, on
        the device of the first model's logits.
    """
    first, vocabulary = logits_TV[0], logits_TV[0].shape[-1]
    rows = max(1, scratch_bytes // (4 * vocabulary))
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        chunks = (logits[part].detach().to(first.device) for logits in logits_TV)
        yield part, [F.log_softmax(chunk.float(), dim=-1) for chunk in chunks]


def kl_nats(log_p_TV: Tensor, log_q_TV: Tensor) -> float:
    """Return KL(p || q) in nats, summed over tokens.

    Args:
        log_p_TV: log-probabilities of the reference distribution, that of the original model.
        log_q_TV: log-probabilities of the model that is compared with it.
    """
    return float(F.kl_div(log_q_TV, log_p_TV, reduction="sum", log_target=True))
