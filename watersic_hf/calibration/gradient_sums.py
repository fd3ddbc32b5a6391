"""Sums over tokens that the backward pass of `sensitivity` collects for every layer.

Shapes: A = out_features (rows), N = in_features (columns), T = tokens, S = tokens of an expert.

The *power* of a row is the mean square of the gradient at that output.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from watersic_hf.calibration.experts import effective_pool_fraction, pool_indices
from watersic_hf.calibration.moments import moments_of
from watersic_hf.core import Moments, Whitening, is_large
from watersic_hf.nn import SeparateExperts
from watersic_hf.streams.processes import gather

#: Prior tokens that the gradient statistics of an expert have besides its own; see `ExpertSums`.
PRIOR_TOKENS = 16

PowerAndVariance = tuple[Tensor, Tensor]
"""Of one layer, the fields of a `Sensitivity`: ``row_power_A`` and ``variance_N``."""


@dataclass
class LayerGradients:
    """Inputs of a layer and gradients at its output, one tensor per call."""

    name: str
    module: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the input of one call and the gradient at its output."""
        self.inputs.append(x.flatten(0, -2))
        self.grads.append(grad.flatten(0, -2))

    def power_A(self, weight_T: Tensor) -> Tensor:
        """Return the power of the rows, with a weight for every token."""
        tokens = sum(map(len, self.grads))
        weights = weight_T.float().split([len(grad) for grad in self.grads])
        sums = (w @ grad.float().square() for w, grad in zip(weights, self.grads, strict=True))
        return sum(sums_A.double() for sums_A in sums) / tokens

    def input_memory(self) -> tuple[tuple, ...]:
        """Identify the memory of the inputs: layers with the same value share their inputs."""
        return tuple((x.data_ptr(), x.shape, x.stride()) for x in self.inputs)


@dataclass
class SharedInputGradients:
    """Layers that are applied to the same tensors, as q, k and v are; whitened only once."""

    layers: list[LayerGradients]
    inputs: list[Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens; those of all processes once they are combined."""
        return sum(map(len, self.inputs))

    @property
    def cost(self) -> int:
        """Products that `results` takes, up to a factor."""
        return _whitening_products(self.tokens, self.layers[0].module.in_features)

    def combine(self) -> None:
        """Add the inputs and gradients of the other processes."""
        self.inputs = list(itertools.chain(*gather(self.inputs)))
        for layer in self.layers:
            layer.grads = list(itertools.chain(*gather(layer.grads)))

    def results(
        self, damping: float | None, names: Mapping[str, str]
    ) -> dict[str, PowerAndVariance]:
        """Return the sensitivities of the layers, by full name.

        Args:
            damping: damping of the moments; None is `damping_for` the tokens.
            names: full names, by name within the block.
        """
        x_TN = torch.cat(self.inputs)
        whitening = Whitening.of(
            moments_of(x_TN),
            damping,
            name=names[self.layers[0].name],
            in_place=is_large(x_TN.shape[1]),
        )
        leverage_T = whitening.leverages(x_TN)
        return {
            names[layer.name]: (
                layer.power_A(leverage_T).cpu(),
                whitening.variances(layer.module.weight).cpu(),
            )
            for layer in self.layers
        }


def _whitening_products(tokens: int, columns: int) -> int:
    """Return the products for moments, their factor and the leverages, up to a factor."""
    return (tokens + columns) * columns**2


def group_by_input(layers: Sequence[LayerGradients]) -> list[SharedInputGradients]:
    """Group layers that share their inputs in every process."""
    groups: dict[tuple, SharedInputGradients] = {}
    memory = gather([layer.input_memory() for layer in layers])
    for layer, *key in zip(layers, *memory, strict=True):
        group = groups.setdefault(tuple(key), SharedInputGradients([], layer.inputs))
        group.layers.append(layer)
    return list(groups.values())


class ExpertSums:
    """Sums of one module of experts.

    The power of a row is the mean over all tokens of the layer, not only those of the expert, so
    that an expert counts as often as it is used.  Like the moments, it shrinks: every expert has
    `PRIOR_TOKENS` more tokens, with the power of an average one.  The sum over all experts stays
    the same.

    Args:
        experts: the module.
        tokens: number of tokens of the layer, in all processes.
    """

    def __init__(self, experts: SeparateExperts, tokens: int) -> None:
        self.experts = experts
        self.tokens = tokens
        self.inputs: dict[int, list[Tensor]] = {e: [] for e in range(experts.layout.experts)}
        """Inputs of the experts, by expert."""
        self.power_A: dict[tuple[int, str], Tensor] = {}
        """Squared gradients of the rows, summed over tokens, by expert and matrix."""
        self.power_S: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        """Squared gradients of the tokens, summed over rows, by expert and matrix."""
        self.combined = False

    @property
    def slots(self) -> int:
        """Tokens of all experts; a token counts once for each of its experts."""
        return sum(len(x) for inputs in self.inputs.values() for x in inputs)

    def add(self, expert: int, matrix: str, x_SN: Tensor, grad_SA: Tensor) -> None:
        """Add the input of one call of an expert's matrix and the gradient at its output."""
        if matrix == self.experts.layout.first:
            self.inputs[expert].append(x_SN)
        power_SA = grad_SA.float().square()
        key = expert, matrix
        self.power_A[key] = self.power_A.get(key, 0) + power_SA.sum(0).double()
        self.power_S[key].append(power_SA.sum(1))

    def combine(self) -> None:
        """Add the sums of the other processes, at the first call."""
        if self.combined:
            return
        self.combined = True
        parts = gather((self.inputs, self.power_A, self.power_S))
        if len(parts) > 1:
            self.inputs = {e: [x for inputs, *_ in parts for x in inputs[e]] for e in self.inputs}
            self.power_A, self.power_S = {}, defaultdict(list)
            for _, rows, tokens in parts:
                for key, power_A in rows.items():
                    self.power_A[key] = self.power_A.get(key, 0) + power_A
                    self.power_S[key] += tokens[key]

    def result(
        self, expert: int, matrix: str, damping: float | None, name: str
    ) -> PowerAndVariance:
        """Return the sensitivity of an expert's matrix.

        Args:
            expert: number of the expert.
            matrix: name of the matrix within the expert.
            damping: damping of the moments; None is `damping_for` the tokens.
            name: full name of the matrix, for messages.
        """
        layer = self.experts.packed[expert][matrix]
        inputs = self.inputs[expert]
        own_SN = self._matrix_inputs(expert, matrix, torch.cat(inputs)) if inputs else None
        whitening = Whitening.of(self._moments(expert, matrix, own_SN), damping, name=name)
        power_A = self._power(expert, matrix, layer.out_features)
        if own_SN is not None and bool(self.power_A[expert, matrix].any()):
            # one mean leverage, weighted by the power of the tokens, for all rows: their gradients
            # are not kept token by token
            power_S = torch.cat(self.power_S[expert, matrix]).double()
            power_A *= whitening.leverages(own_SN) @ power_S / power_S.sum()
        return power_A.cpu(), whitening.variances(layer.weight).cpu()

    def _matrix_inputs(self, expert: int, matrix: str, x_SN: Tensor) -> Tensor:
        """Return the inputs of an expert's matrix, given the inputs of the expert."""
        return x_SN if matrix == self.experts.layout.first else self.experts.inner(expert, x_SN)

    def _moments(self, expert: int, matrix: str, own_SN: Tensor | None) -> Moments:
        """Return the moments of an expert's matrix, mixed with the pool as in `ExpertMoments`."""
        columns = self.experts.packed[expert][matrix].in_features
        fraction = effective_pool_fraction(columns, 0 if own_SN is None else len(own_SN))
        own = None if own_SN is None else moments_of(own_SN)
        if fraction == 0:
            return own
        pool = (
            moments_of(self._matrix_inputs(expert, matrix, self._pool))
            if matrix == self.experts.layout.last
            else self._pool_moments
        )
        return pool if own is None else own.pooled(pool, fraction)

    @functools.cached_property
    def _pool(self) -> Tensor:
        x_SN = torch.cat([x for inputs in self.inputs.values() for x in inputs])
        return x_SN[pool_indices(len(x_SN)).to(x_SN.device)]

    @functools.cached_property
    def _pool_moments(self) -> Moments:
        return moments_of(self._pool)

    def _power(self, expert: int, matrix: str, rows: int) -> Tensor:
        """Return the power of the rows of an expert's matrix, shrunk towards the average."""
        experts = self.experts.layout.experts
        sums = [p for (_, m), p in self.power_A.items() if m == matrix]
        mean_A = sum(sums) / self.slots
        if matrix == self.experts.layout.first:
            # rows of different experts do not correspond to each other
            mean_A = mean_A.mean().expand(rows)
        own_A = self.power_A.get((expert, matrix), 0)
        prior_A = PRIOR_TOKENS * mean_A
        return (own_A + prior_A) / (self.tokens * (1 + PRIOR_TOKENS * experts / self.slots))


@dataclass
class ExpertMatrix:
    """One matrix of an expert, whose gradients go into the sums of its module."""

    name: str
    sums: ExpertSums
    expert: int
    matrix: str

    @property
    def tokens(self) -> int:
        """Number of tokens of all experts; those of all processes once they are combined."""
        return self.sums.slots

    @property
    def cost(self) -> int:
        """Products that `results` takes, up to a factor; the pool is not counted."""
        own = sum(map(len, self.sums.inputs[self.expert]))
        columns = self.sums.experts.packed[self.expert][self.matrix].in_features
        return _whitening_products(own, columns)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the input of one call and the gradient at its output."""
        self.sums.add(self.expert, self.matrix, x, grad)

    def combine(self) -> None:
        """Add the sums of the other processes."""
        self.sums.combine()

    def results(
        self, damping: float | None, names: Mapping[str, str]
    ) -> dict[str, PowerAndVariance]:
        """Return the sensitivity of the matrix; see `SharedInputGradients.results`."""
        name = names[self.name]
        return {name: self.sums.result(self.expert, self.matrix, damping, name)}


def matrices_of(part: str, sums: ExpertSums) -> dict[str, ExpertMatrix]:
    """Return the matrices of a module of experts, by name within the block.

    Args:
        part: name of the module within the block.
        sums: where their gradients are added up.
    """
    return {
        f"{part}.{name}": ExpertMatrix(f"{part}.{name}", sums, expert, matrix)
        for name, (expert, matrix) in sums.experts.layout.names().items()
    }
