"""Statistics of the experts of a mixture, each with those of its tokens.

Shapes: T = tokens, K = experts of a token, S = tokens of an expert, A = out_features,
        N = in_features.

A token belongs to the experts that the original model sends it to, also where the quantized model
would send it elsewhere: an expert's inputs in the two models are those of the same tokens, and it
is calibrated for what it was made for.

An expert that few tokens reach shrinks towards the pool: the tokens of the whole layer, as if all
of them went through this expert (`watersic_hf.core.pool_share`).  So every expert is calibrated,
one without any token on the pool alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.calibration.moments import moments_of
from watersic_hf.checkpoint import PACKED
from watersic_hf.core import Moments, pool_share
from watersic_hf.nn import SeparateExperts, separate_experts
from watersic_hf.streams.hooks import Side, module_arguments
from watersic_hf.streams.processes import gather

#: Tokens in a pool at most.
POOL_TOKENS = 16384
#: Share of the pool below which an expert's own tokens are enough.
LEAST_SHARE = 0.01
#: Share of the pool from which on an expert is named in the log.
LARGE_SHARE = 0.5


def experts_in(block: nn.Module, layers: Sequence[str]) -> dict[str, SeparateExperts]:
    """The modules of experts in a block that hold some of `layers`, by name within the block."""
    return {
        name: module
        for name, module in separate_experts(block)
        if any(layer.startswith(f"{name}.{PACKED}.") for layer in layers)
    }


def outside(layers: Iterable[str], experts: Iterable[str]) -> list[str]:
    """Those of `layers` that are no matrices of experts."""
    prefixes = tuple(f"{name}.{PACKED}." for name in experts)
    return [layer for layer in layers if not layer.startswith(prefixes)]


def share_of_pool(columns: int, tokens: int) -> float:
    """Share of the pool in the statistics of an expert's matrix; 0 where it can be left out."""
    share = pool_share(columns, tokens)
    return share if share >= LEAST_SHARE else 0.0


def spread(tokens: int) -> Tensor:
    """The tokens of a pool: at most `POOL_TOKENS` of so many, evenly spread."""
    return torch.linspace(0, tokens - 1, min(tokens, POOL_TOKENS)).round().long()


@dataclass
class _Stream:
    """A module of experts in one model, and what it gets there."""

    experts: SeparateExperts
    hidden_TN: Tensor

    def inputs(self, expert: int, matrix: str, token_S: Tensor) -> Tensor:
        """What some tokens put into an expert's matrix."""
        x_SN = self.hidden_TN[token_S].to(next(self.experts.parameters()).device)
        return x_SN if matrix == self.experts.layout.first else self.experts.inner(expert, x_SN)


class ExpertMoments:
    """The moments of all matrices of one module of experts.

    Args:
        working: the module in the model that is being quantized.
        original: that in the original model, if there is one beside it.
        index_TK: the experts of every token.
    """

    def __init__(self, working: _Stream, original: _Stream | None, index_TK: Tensor) -> None:
        self.working = working
        self.original = original
        self.index_TK = index_TK
        self.pool_S = spread(len(index_TK))
        self._first: Moments | None = None

    @classmethod
    def collect(
        cls, working: Side, original: Side | None, index: int, name: str
    ) -> "ExpertMoments":
        """Run a block, the model's number `index`, on all windows as far as its experts."""
        streams, routes = [], []
        for side in (working, original):
            if side is not None:
                arguments = module_arguments(side, index, name)
                hidden_TN, index_TK = (_of_all([call[i] for call in arguments]) for i in (0, 1))
                streams.append(_Stream(side.block.get_submodule(name), hidden_TN))
                routes.append(index_TK)
        return cls(streams[0], streams[1] if original is not None else None, routes[-1])

    def tokens_of(self, expert: int) -> Tensor:
        """The tokens of an expert."""
        return (self.index_TK == expert).any(1).nonzero()[:, 0]

    def of(self, expert: int, matrix: str) -> Moments:
        """The moments of an expert's matrix: those of its tokens, and of the pool if they are few.

        Those of its last matrix are for its first one as it then is in the working model.
        """
        token_S = self.tokens_of(expert)
        _, columns = self.working.experts.layout.shape(matrix)
        share = share_of_pool(columns, len(token_S))
        if share == 0:
            return self._measure(expert, matrix, token_S)
        pool = self._pool(expert, matrix)
        if not len(token_S):
            return pool.for_none()
        return self._measure(expert, matrix, token_S).pooled(pool, share)

    def _pool(self, expert: int, matrix: str) -> Moments:
        if matrix != self.working.experts.layout.first:
            return self._measure(expert, matrix, self.pool_S)
        if self._first is None:
            # the same for all experts
            self._first = self._measure(expert, matrix, self.pool_S)
        return self._first

    def _measure(self, expert: int, matrix: str, token_S: Tensor) -> Moments:
        seen_SN = self.working.inputs(expert, matrix, token_S)
        if self.original is None:
            return moments_of(seen_SN)
        return moments_of(self.original.inputs(expert, matrix, token_S), seen_SN)


def _of_all(batches: Sequence[Tensor]) -> Tensor:
    """Rows of all batches of all processes."""
    return torch.cat(gather(torch.cat(list(batches))))


def fewest(tokens: Mapping[int, int], *, at_most: int = 8) -> str:
    """The experts with the fewest tokens, in words."""
    ordered = sorted(tokens.items(), key=lambda item: item[::-1])
    named = ", ".join(f"expert {expert} sees {count}" for expert, count in ordered[:at_most])
    return named + (", ..." if len(tokens) > at_most else "")
