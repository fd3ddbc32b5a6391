"""Moments of the experts of a mixture, each from the tokens that are routed to it.

Shapes: T = tokens, K = experts of a token, S = tokens of an expert, H = width of the hidden states,
        A = out_features, N = in_features.

The tokens of an expert are those that the original model routes to it, even if the partly quantized
model would route them elsewhere: the inputs of an expert in both models then belong to the same
tokens, and the expert is calibrated for the inputs that it was trained on.

The moments of an expert with few tokens shrink towards those of a pool: the tokens of the whole
layer, as if all of them were routed to this expert (`watersic_hf.core.pool_fraction`).  In this way
every expert is calibrated; one without any tokens uses the pool alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.calibration.moments import moments_of
from watersic_hf.checkpoint import PACKED
from watersic_hf.core import Moments, pool_fraction
from watersic_hf.nn import SeparateExperts, separate_experts
from watersic_hf.streams.hooks import BlockView, module_arguments
from watersic_hf.streams.processes import gather

#: Most tokens in a pool.
POOL_TOKENS = 16384
#: Fraction of the pool below which it is left out: the expert's own tokens are enough.
LEAST_POOL_FRACTION = 0.01
#: Fraction of the pool from which an expert is reported to have few tokens.
LARGE_POOL_FRACTION = 0.5


def experts_in(block: nn.Module, layers: Sequence[str]) -> dict[str, SeparateExperts]:
    """Return the modules of experts in a block that hold some of `layers`, by name within it."""
    return {
        name: module
        for name, module in separate_experts(block)
        if any(layer.startswith(f"{name}.{PACKED}.") for layer in layers)
    }


def layers_outside_experts(layers: Iterable[str], experts: Iterable[str]) -> list[str]:
    """Return those of `layers` that are not matrices of experts.

    Args:
        layers: names of layers.
        experts: names of modules of experts.
    """
    prefixes = tuple(f"{name}.{PACKED}." for name in experts)
    return [layer for layer in layers if not layer.startswith(prefixes)]


def effective_pool_fraction(columns: int, tokens: int) -> float:
    """Return the fraction of the pool in the moments of an expert's matrix.

    Args:
        columns: inputs of the matrix.
        tokens: number of tokens of the expert.

    Returns:
        `pool_fraction`, or 0 if that is so small that the pool need not be measured.
    """
    fraction = pool_fraction(columns, tokens)
    return fraction if fraction >= LEAST_POOL_FRACTION else 0.0


def pool_indices(tokens: int) -> Tensor:
    """Return the indices of the tokens in a pool: at most `POOL_TOKENS`, evenly spaced.

    Args:
        tokens: number of tokens to choose from.
    """
    return torch.linspace(0, tokens - 1, min(tokens, POOL_TOKENS)).round().long()


@dataclass
class _ExpertInputs:
    """A module of experts in one model, and the hidden states that it is called with."""

    experts: SeparateExperts
    hidden_TH: Tensor

    def of(self, expert: int, matrix: str, token_S: Tensor) -> Tensor:
        """Return the inputs of an expert's matrix for some tokens."""
        x_SH = self.hidden_TH[token_S].to(next(self.experts.parameters()).device)
        return x_SH if matrix == self.experts.layout.first else self.experts.inner(expert, x_SH)


class ExpertMoments:
    """Moments of all matrices of one module of experts.

    Args:
        working: the module in the partly quantized model, and its inputs.
        original: the same in the original model, if that runs as well.
        index_TK: numbers of the experts of every token.
    """

    def __init__(
        self, working: _ExpertInputs, original: _ExpertInputs | None, index_TK: Tensor
    ) -> None:
        self.working = working
        self.original = original
        self.index_TK = index_TK
        self.pool_S = pool_indices(len(index_TK))
        self._first_pool: Moments | None = None

    @classmethod
    def collect(cls, working: BlockView, original: BlockView | None, name: str) -> "ExpertMoments":
        """Run a block on all windows up to its experts.

        Args:
            working: the block in the partly quantized model.
            original: the block in the original model, if that runs as well.
            name: name of the module of experts within the block.
        """
        inputs, routes = [], []
        for view in (working, original):
            if view is not None:
                arguments = module_arguments(view, name)
                hidden_TH, index_TK = (
                    _concatenate([call[i] for call in arguments]) for i in (0, 1)
                )
                inputs.append(_ExpertInputs(view.block.get_submodule(name), hidden_TH))
                routes.append(index_TK)
        return cls(inputs[0], inputs[1] if original is not None else None, routes[-1])

    def tokens_of(self, expert: int) -> Tensor:
        """Return the indices of the tokens of an expert."""
        return (self.index_TK == expert).any(1).nonzero()[:, 0]

    def of(self, expert: int, matrix: str) -> Moments:
        """Return the moments of an expert's matrix, mixed with those of the pool if it needs them.

        The inputs of the last matrix depend on the first one as it is in the working model at the
        time of the call.
        """
        token_S = self.tokens_of(expert)
        _, columns = self.working.experts.layout.shape(matrix)
        fraction = effective_pool_fraction(columns, len(token_S))
        if fraction == 0:
            return self._measure(expert, matrix, token_S)
        pool = self._pool(expert, matrix)
        if not len(token_S):
            return pool.without_own_tokens()
        return self._measure(expert, matrix, token_S).pooled(pool, fraction)

    def _pool(self, expert: int, matrix: str) -> Moments:
        if matrix != self.working.experts.layout.first:
            return self._measure(expert, matrix, self.pool_S)
        if self._first_pool is None:
            # the same for all experts
            self._first_pool = self._measure(expert, matrix, self.pool_S)
        return self._first_pool

    def _measure(self, expert: int, matrix: str, token_S: Tensor) -> Moments:
        working_SN = self.working.of(expert, matrix, token_S)
        if self.original is None:
            return moments_of(working_SN)
        return moments_of(self.original.of(expert, matrix, token_S), working_SN)


def _concatenate(batches: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of all batches of all processes."""
    return torch.cat(gather(torch.cat(list(batches))))


def describe_least_used(tokens: Mapping[int, int], *, at_most: int = 8) -> str:
    """Return a text that names the experts with the fewest tokens, for messages.

    Args:
        tokens: number of tokens, by expert.
        at_most: number of experts to name.
    """
    ordered = sorted(tokens.items(), key=lambda item: item[::-1])
    named = ", ".join(f"expert {expert} sees {count}" for expert, count in ordered[:at_most])
    return named + (", ..." if len(tokens) > at_most else "")
