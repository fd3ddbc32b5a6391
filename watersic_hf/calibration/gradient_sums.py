"""What the backward pass sums for every layer: powers of gradients, and the inputs they go with.

Shapes: A = out_features (rows), N = in_features (columns), T = tokens, S = tokens of an expert.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from watersic_hf.calibration.experts import share_of_pool, spread
from watersic_hf.calibration.moments import moments_of
from watersic_hf.core import Moments, Whitening
from watersic_hf.nn import SeparateExperts
from watersic_hf.streams.processes import gather

#: Tokens that an expert's gradients are taken to have besides its own; see `ExpertSums`.
PRIOR_TOKENS = 16


@dataclass
class LayerGradients:
    """What goes into a layer, and the gradients of what comes out, a tensor for each call."""

    name: str
    module: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the input and the output gradient of one call."""
        self.inputs.append(x.flatten(0, -2))
        self.grads.append(grad.flatten(0, -2))

    def power_A(self, weight_T: Tensor) -> Tensor:
        """Mean squared gradients of the rows, with weights for the tokens."""
        power_TA = torch.cat(self.grads).double().square_()
        return weight_T @ power_TA / len(power_TA)

    def where(self) -> tuple[tuple, ...]:
        """Where its inputs are in memory."""
        return tuple((x.data_ptr(), x.shape, x.stride()) for x in self.inputs)


@dataclass
class SharedInput:
    """Layers that are applied to the same tensors, as q, k and v are."""

    layers: list[LayerGradients]
    inputs: list[Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens seen, by all processes once combined."""
        return sum(map(len, self.inputs))

    def combine(self) -> None:
        """Take in what the other processes have."""
        self.inputs = list(itertools.chain(*gather(self.inputs)))
        for layer in self.layers:
            layer.grads = list(itertools.chain(*gather(layer.grads)))

    def results(
        self, damping: float | None, names: Mapping[str, str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Power of the rows and variances of the columns, by what `names` has for the names."""
        x_TN = torch.cat(self.inputs)
        whitening = Whitening.of(moments_of(x_TN), damping, name=names[self.layers[0].name])
        leverage_T = whitening.leverages(x_TN)
        return {
            names[layer.name]: (
                layer.power_A(leverage_T).cpu(),
                whitening.variances(layer.module.weight).cpu(),
            )
            for layer in self.layers
        }


def by_input(layers: Sequence[LayerGradients]) -> list[SharedInput]:
    """The layers, together where they share their inputs in every process."""
    groups: dict[tuple, SharedInput] = {}
    places = gather([layer.where() for layer in layers])
    for layer, *where in zip(layers, *places, strict=True):
        groups.setdefault(tuple(where), SharedInput([], layer.inputs)).layers.append(layer)
    return list(groups.values())


class ExpertSums:
    """What is summed of one module of experts.

    Powers are per token of the layer, so that an expert counts as often as it is used.  As its
    moments, they shrink: every expert has `PRIOR_TOKENS` more tokens, with the power of an average
    one.  That leaves the sum over all experts as it is.
    """

    def __init__(self, experts: SeparateExperts, tokens: int) -> None:
        self.experts = experts
        self.tokens = tokens
        self.inputs: dict[int, list[Tensor]] = {e: [] for e in range(experts.layout.experts)}
        self.power_A: dict[tuple[int, str], Tensor] = {}
        self.power_S: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self.combined = False

    @property
    def slots(self) -> int:
        """Tokens of all experts, each counted for every expert that it has."""
        return sum(len(x) for inputs in self.inputs.values() for x in inputs)

    def add(self, expert: int, matrix: str, x_SN: Tensor, grad_SA: Tensor) -> None:
        """Add the input and the output gradient of one call of an expert's matrix."""
        if matrix == self.experts.layout.first:
            self.inputs[expert].append(x_SN)
        power_SA = grad_SA.float().square()
        key = expert, matrix
        self.power_A[key] = self.power_A.get(key, 0) + power_SA.sum(0).double()
        self.power_S[key].append(power_SA.sum(1))

    def combine(self) -> None:
        """Take in what the other processes have; once, however often it is called."""
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
    ) -> tuple[Tensor, Tensor]:
        """Return the power of the rows and the variances of the columns of a matrix."""
        layer = self.experts.packed[expert][matrix]
        inputs = self.inputs[expert]
        own_SN = self._entering(expert, matrix, torch.cat(inputs)) if inputs else None
        whitening = Whitening.of(self._moments(expert, matrix, own_SN), damping, name=name)
        power_A = self._power(expert, matrix, layer.out_features)
        if own_SN is not None and bool(self.power_A[expert, matrix].any()):
            power_S = torch.cat(self.power_S[expert, matrix]).double()
            power_A *= whitening.leverages(own_SN) @ power_S / power_S.sum()
        return power_A.cpu(), whitening.variances(layer.weight).cpu()

    def _entering(self, expert: int, matrix: str, x_SN: Tensor) -> Tensor:
        """What enters a matrix of the expert, from what enters the expert."""
        return x_SN if matrix == self.experts.layout.first else self.experts.inner(expert, x_SN)

    def _moments(self, expert: int, matrix: str, own_SN: Tensor | None) -> Moments:
        columns = self.experts.packed[expert][matrix].in_features
        share = share_of_pool(columns, 0 if own_SN is None else len(own_SN))
        own = None if own_SN is None else moments_of(own_SN)
        if share == 0:
            return own
        pool = (
            moments_of(self._entering(expert, matrix, self._pool))
            if matrix == self.experts.layout.last
            else self._pool_moments
        )
        return pool if own is None else own.pooled(pool, share)

    @functools.cached_property
    def _pool(self) -> Tensor:
        every = torch.cat([x for inputs in self.inputs.values() for x in inputs])
        return every[spread(len(every)).to(every.device)]

    @functools.cached_property
    def _pool_moments(self) -> Moments:
        return moments_of(self._pool)

    def _power(self, expert: int, matrix: str, rows: int) -> Tensor:
        experts = self.experts.layout.experts
        known = [p for (_, m), p in self.power_A.items() if m == matrix]
        mean_A = sum(known) / self.slots
        if matrix == self.experts.layout.first:
            # rows of one expert have nothing to do with those of another
            mean_A = mean_A.mean().expand(rows)
        own_A = self.power_A.get((expert, matrix), 0)
        prior_A = PRIOR_TOKENS * mean_A
        return (own_A + prior_A) / (self.tokens * (1 + PRIOR_TOKENS * experts / self.slots))


@dataclass
class ExpertMatrix:
    """One matrix of an expert."""

    name: str
    sums: ExpertSums
    expert: int
    matrix: str

    @property
    def tokens(self) -> int:
        """Number of tokens seen, by all processes once combined."""
        return self.sums.slots

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add the input and the output gradient of one call."""
        self.sums.add(self.expert, self.matrix, x, grad)

    def combine(self) -> None:
        """Add what the other processes have."""
        self.sums.combine()

    def results(
        self, damping: float | None, names: Mapping[str, str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """As those of `SharedInput`."""
        name = names[self.name]
        return {name: self.sums.result(self.expert, self.matrix, damping, name)}
