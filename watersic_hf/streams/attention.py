r"""How much attention every token receives: weights for the statistics of q, k and v.

Shapes: B = windows in a batch, T = tokens of a window, H = heads.

The probabilities are read from whatever attention a block runs, so that norms of queries and keys,
head dimension, scale and masks are the model's own: from the operands of
`scaled_dot_product_attention`, or from the softmax of an eager attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from watersic_hf.streams.processes import mean_of_all

#: Scores below this are masked out: half of the most negative bfloat16.
_MASKED = torch.finfo(torch.bfloat16).min / 2


def attention_importance(run: Callable[[int], object], batches: int) -> list[Tensor] | None:
    r"""Mean attention that every token receives in one block.

    .. math:: p_j \propto \frac{1}{H |Q_j|} \sum_h \sum_{i \in Q_j} P_{hij}

    with P the attention probabilities and Q_j the queries that may see token j: the paper's T - j
    of them, fewer where attention is local.  Scaled to a mean of 1 over all tokens, so that
    weighted and plain statistics are of one size and can be mixed.

    Args:
        run: runs the block of the original model on one batch.
        batches: their number.

    Returns:
        One B x T float32 tensor per batch; None if the block runs no attention that can be read.
    """
    received: list[Tensor] = []
    for batch in range(batches):
        with AttentionWatch() as watch:
            run(batch)
        if not watch.received:
            return None
        received.append(torch.stack(watch.received).mean(0))
    mean = mean_of_all(torch.cat([p.flatten() for p in received]))
    return [p / mean for p in received]


class AttentionWatch(TorchFunctionMode):
    """Sees every self-attention that runs under it, one window's probabilities at a time.

    Args:
        see: called before every attention instead of computing anything.
    """

    def __init__(self, see: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.see = see
        self.received: list[Tensor] = []
        """B x T: for every attention, what each token received."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._add(_operand_scores, *args, **kwargs)
        elif func is F.softmax and args[0].ndim == 4 and args[0].shape[-1] == args[0].shape[-2]:
            self._add(_eager_scores, args[0])
        return func(*args, **kwargs)

    def _add(self, scores: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.see is not None:
            self.see()
            return
        windows = [_received(scores_HTT) for scores_HTT in scores(*args, **kwargs)]
        if windows:
            self.received.append(torch.stack(windows))


def _received(scores_HTT: Tensor) -> Tensor:
    queries_T = (scores_HTT[0] > _MASKED).sum(0).clamp(min=1)
    return scores_HTT.softmax(-1).mean(0).sum(0) / queries_T


def _eager_scores(scores_BHTT: Tensor) -> Any:
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
    """The masked scores of each window, H x T x T; none if keys are not those of the queries."""
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
