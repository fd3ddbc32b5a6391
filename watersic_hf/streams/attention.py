r"""Mean attention that every token receives: token weights for the statistics of q, k and v.

Shapes: B = windows in a batch, T = tokens of a window, H = heads.

The probabilities are computed from what a block passes to its attention, so that norms of queries
and keys, head dimension, scale and masks are those of the model: from the operands of
`scaled_dot_product_attention`, or from the argument of the softmax of an eager attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from watersic_hf.streams.processes import all_reduce_mean

#: Scores below this are masked: half of the most negative bfloat16.
_MASKED = torch.finfo(torch.bfloat16).min / 2


def attention_importance(run: Callable[[int], object], batches: int) -> list[Tensor] | None:
    r"""Return the mean attention that every token receives in one block.

    .. math:: p_j \propto \frac{1}{H |Q_j|} \sum_h \sum_{i \in Q_j} P_{hij}

    with P the attention probabilities and Q_j the queries that can attend to token j: the T - j of
    the paper, or fewer if attention is local.  The weights are scaled to a mean of 1 over all
    tokens, so that weighted and plain statistics have the same scale and can be mixed.

    Args:
        run: runs the block of the original model on the batch of a given number.
        batches: number of batches of this process.

    Returns:
        One B x T float32 tensor per batch; None if the block calls no attention that can be read.
    """
    received: list[Tensor] = []
    for batch in range(batches):
        with AttentionObserver() as observer:
            run(batch)
        if not observer.received:
            return None
        received.append(torch.stack(observer.received).mean(0))
    mean = all_reduce_mean(torch.cat([p.flatten() for p in received]))
    return [p / mean for p in received]


class AttentionObserver(TorchFunctionMode):
    """Observes every self-attention that runs while it is active.

    Args:
        callback: called before every attention, in place of computing what tokens receive.
    """

    def __init__(self, callback: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.callback = callback
        self.received: list[Tensor] = []
        """For every attention, the mean probability that each token receives, B x T."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._observe(_operand_scores, *args, **kwargs)
        elif func is F.softmax and args[0].ndim == 4 and args[0].shape[-1] == args[0].shape[-2]:
            self._observe(_eager_scores, args[0])
        return func(*args, **kwargs)

    def _observe(self, scores: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.callback is not None:
            self.callback()
            return
        # one window at a time: the scores of a whole batch can be too large
        windows = [_received(scores_HTT) for scores_HTT in scores(*args, **kwargs)]
        if windows:
            self.received.append(torch.stack(windows))


def _received(scores_HTT: Tensor) -> Tensor:
    """Return the mean probability that each token receives from the queries that can see it."""
    queries_T = (scores_HTT[0] > _MASKED).sum(0).clamp(min=1)
    return scores_HTT.softmax(-1).mean(0).sum(0) / queries_T


def _eager_scores(scores_BHTT: Tensor) -> Any:
    """Yield the scores of each window, H x T x T, from the argument of a softmax."""
    return (window.float() for window in scores_BHTT)


def _operand_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Yield the masked scores of each window, H x T x T, from the operands of an attention.

    There are none if queries and keys belong to different tokens, as in cross-attention.
    """
    T = query.shape[-2]
    if key.shape[-2] != T:
        return
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    for window in range(len(query)):
        scores_HTT = scale * (query[window].float() @ key[window].float().mT)
        if is_causal:
            future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
            scores_HTT = scores_HTT.masked_fill(future, -math.inf)
        if attn_mask is not None:
            mask = attn_mask.expand(len(query), *attn_mask.shape[1:])[window]
            if mask.dtype is torch.bool:
                scores_HTT = scores_HTT.masked_fill(~mask, -math.inf)
            else:
                scores_HTT = scores_HTT + mask
        yield scores_HTT
