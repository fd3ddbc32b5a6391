r"""What an error in a layer's output does to the model's predictions.

Shapes: A = out_features (rows), N = in_features (columns), B = windows in a batch, T = tokens,
        V = vocabulary.

To second order, an error :math:`\delta` in the output of a layer moves the predictions by

.. math:: \operatorname{KL} = \tfrac12 E[(g^T \delta)^2] \text{ nats}

with g the gradient of the log-likelihood of a token that the model itself draws: the Fisher
information (Martens 2014, arXiv 1412.1193).  The errors that quantization makes are not alike for
all tokens: each feels them by its leverage, :math:`h = x^T S^{-1} x / N`, as they were shaped for
the moment S of all of them.  So kept of every layer is E[h g_r^2] for each row r: a few tokens with
steep gradients and massive inputs, as the first one of a text, count for what they feel.

It takes one backward pass that holds one block's graph at a time; for an encoder, that of the
decoder behind it as well.
"""

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.calibration.experts import (
    experts_in,
    moments_of,
    outside,
    share_of_pool,
    spread,
)
from watersic_hf.core import CalibrationError, Moments, Whitening, not_finite
from watersic_hf.nn import SeparateExperts
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.capture import (
    BlockStream,
    PassedStack,
    RunnableStack,
    States,
    behind,
    block_stream,
    model_inputs,
    runnable_stacks,
)
from watersic_hf.streams.processes import gather, rank_and_size, shard
from watersic_hf.streams.progress import steps
from watersic_hf.streams.topology import inside

logger = logging.getLogger(__name__)

#: Tokens that an expert's gradients are taken to have besides its own; see `_ExpertSums`.
PRIOR_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one layer's errors cost, known before anything is quantized."""

    row_power_A: Tensor
    """E[h g_r^2] of every row: nats per unit of squared error in whitened units, times two."""

    variance_N: Tensor
    """Variance of every column of the weight in the whitened domain; see `Whitening`."""


def layer_sensitivities(
    model: nn.Module,
    windows: Sequence[Tensor],
    layers: Sequence[str],
    *,
    tokens: int,
    damping: float | None,
    seed: int,
    source: ResidentBlocks = RESIDENT,
    states: Callable[[int, int], States] = lambda index, count: [],
) -> dict[str, Sensitivity]:
    """Sensitivity of layers, by name.

    Args:
        model: the model before quantization.
        windows: 1-D token ids.
        layers: full names of linear layers inside the blocks; those that the windows do not reach
            are left out of the result.
        tokens: how many to measure on: the first windows that hold them; a few thousand do.
        damping: of the inputs' second moments; None is `damping_for` the tokens.
        seed: of the tokens that the model draws.
        source: where blocks come from; default: they are in memory, and stay where they are.
        states: what the hidden states at the input of a block are kept in, by its number and the
            number of windows.

    Returns:
        The sensitivities; none at all if hidden states are not finite, or if the model makes no
        predictions.

    Raises:
        CalibrationError: the hidden states are finite, but the predictions are not.
    """
    windows = _first_windows(windows, tokens)
    found: dict[str, Sensitivity] = {}
    passed: list[PassedStack] = []
    first = 0
    with _frozen(model):
        for stack in runnable_stacks(model, layers, windows[0], source=source):
            found |= _stack_sensitivities(
                model, stack, windows, layers, damping, seed, source,
                functools.partial(_from_block, states, first), passed,
            )  # fmt: skip
            first += len(stack.blocks) + 1
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have no gradients of weights; with them, attention with a learned bias is another kernel."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _from_block(
    states: Callable[[int, int], States], first: int, index: int, windows: int
) -> States:
    """The states of a stack's block, where its first one has the number `first`."""
    return states(first + index, windows)


def _stack_sensitivities(
    model: nn.Module,
    stack: RunnableStack,
    windows: Sequence[Tensor],
    layers: Sequence[str],
    damping: float | None,
    seed: int,
    source: ResidentBlocks,
    states: Callable[[int, int], States],
    passed: list[PassedStack],
) -> dict[str, Sensitivity]:
    """The sensitivities of one stack, which is then among those that are `passed`."""
    blocks = stack.blocks
    stream = block_stream(
        model, stack.modules, windows, batch_size=1, source=source, hidden=states(0, len(windows)),
        passed=passed,
    )  # fmt: skip
    inputs: list[States] = []
    for index, (name, block) in steps(enumerate(blocks), "Sensitivity, forward", len(blocks)):
        inputs.append(stream.hidden)
        with source.hold(name, block):
            stream.advance(index, block, into=states(index + 1, len(windows)))
    batches = range(len(stream.hidden))
    if any(gather(any(not_finite(stream.hidden[b]) for b in batches))):
        # the block loop stops at the layer where it begins, and names it
        return {}
    passed.append(PassedStack(stack, stream.hidden))
    grads = _gradients_of_last_block(model, passed, windows, seed, source)
    if any(gather(grads is None)):
        logger.info("%s puts out no logits to measure sensitivities by.", type(model).__name__)
        return {}

    found: dict[str, Sensitivity] = {}
    backward = list(enumerate(blocks))[::-1]
    for index, (name, block) in steps(backward, "Sensitivity, backward", len(blocks)):
        stream.hidden = inputs.pop()
        within = {n.removeprefix(f"{name}."): n for n in inside([(name, block)], layers)}
        with source.hold(name, block):
            experts = experts_in(block, list(within))
            dense = {n: _Layer(n, block.get_submodule(n)) for n in outside(within, experts)}
            routed: dict[str, _Matrix] = {}
            for part, module in experts.items():
                sums = _ExpertSums(module, sum(map(len, windows)))
                for matrix, place_in in module.layout.names().items():
                    inner = f"{part}.{matrix}"
                    routed[inner] = _Matrix(inner, sums, *place_in)
            for batch in batches:
                grads[batch] = _block_backward(
                    stream, index, block, batch, grads[batch], dense | routed
                )
            units = [*_by_input(list(dense.values())), *routed.values()]
            for unit in units:
                unit.combine()
            reached = [unit for unit in units if unit.tokens]
            own = [unit.results(damping, within) for unit in shard(reached)]
            for part in itertools.chain(*gather(own)):
                found |= part
    return found


def _first_windows(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first windows that hold so many tokens, at least one."""
    chosen: list[Tensor] = []
    for window in windows:
        if chosen and sum(map(len, chosen)) >= tokens:
            break
        chosen.append(window)
    return chosen


@dataclass
class _Layer:
    """What goes into a layer, and the gradients of what comes out, a tensor for each call."""

    name: str
    module: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, grad: Tensor) -> None:
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
class _SameInput:
    """Layers that are applied to the same tensors, as q, k and v are."""

    layers: list[_Layer]
    inputs: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.inputs))

    def combine(self) -> None:
        """Take in what the other processes have."""
        self.inputs = list(itertools.chain(*gather(self.inputs)))
        for layer in self.layers:
            layer.grads = list(itertools.chain(*gather(layer.grads)))

    def results(self, damping: float | None, names: Mapping[str, str]) -> dict[str, Sensitivity]:
        """The sensitivities of the layers, by what `names` has for their names."""
        x_TN = torch.cat(self.inputs)
        whitening = Whitening.of(moments_of(x_TN), damping, name=names[self.layers[0].name])
        leverage_T = whitening.leverages(x_TN)
        return {
            names[layer.name]: Sensitivity(
                row_power_A=layer.power_A(leverage_T).cpu(),
                variance_N=whitening.variances(layer.module.weight).cpu(),
            )
            for layer in self.layers
        }


def _by_input(layers: Sequence[_Layer]) -> list[_SameInput]:
    """The layers, together where they share their inputs in every process."""
    groups: dict[tuple, _SameInput] = {}
    places = gather([layer.where() for layer in layers])
    for layer, *where in zip(layers, *places, strict=True):
        groups.setdefault(tuple(where), _SameInput([], layer.inputs)).layers.append(layer)
    return list(groups.values())


class _ExpertSums:
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

    def result(self, expert: int, matrix: str, damping: float | None, name: str) -> Sensitivity:
        layer = self.experts.packed[expert][matrix]
        inputs = self.inputs[expert]
        own_SN = self._entering(expert, matrix, torch.cat(inputs)) if inputs else None
        whitening = Whitening.of(self._moments(expert, matrix, own_SN), damping, name=name)
        power_A = self._power(expert, matrix, layer.out_features)
        if own_SN is not None and bool(self.power_A[expert, matrix].any()):
            power_S = torch.cat(self.power_S[expert, matrix]).double()
            power_A *= whitening.leverages(own_SN) @ power_S / power_S.sum()
        return Sensitivity(
            row_power_A=power_A.cpu(), variance_N=whitening.variances(layer.weight).cpu()
        )

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
class _Matrix:
    """One matrix of an expert."""

    name: str
    sums: _ExpertSums
    expert: int
    matrix: str

    @property
    def tokens(self) -> int:
        return self.sums.slots

    def add(self, x: Tensor, grad: Tensor) -> None:
        self.sums.add(self.expert, self.matrix, x, grad)

    def combine(self) -> None:
        self.sums.combine()

    def results(self, damping: float | None, names: Mapping[str, str]) -> dict[str, Sensitivity]:
        """As those of `_SameInput`."""
        name = names[self.name]
        return {name: self.sums.result(self.expert, self.matrix, damping, name)}


def _block_backward(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    batch: int,
    grad: Tensor,
    layers: Mapping[str, _Layer | _Matrix],
) -> Tensor:
    """Add one batch to what is known of a block's layers; returns the gradient at its input."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            # what was put out for an encoder's states alone is no function of the hidden states
            seen.append((name, args[0].detach(), output.requires_grad_()))

        return keep

    handles = [block.get_submodule(n).register_forward_hook(record(n)) for n in layers]
    hidden = stream.hidden[batch].detach().requires_grad_()
    try:
        with torch.enable_grad():
            result = stream.run(index, block, batch, hidden=hidden)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, _, output in seen]
    grad, *grads = torch.autograd.grad(result, [hidden, *outputs], grad.to(result.device))
    for (name, x, _), grad_y in zip(seen, grads, strict=True):
        layers[name].add(x, grad_y)
    return grad


def _gradients_of_last_block(
    model: nn.Module,
    passed: Sequence[PassedStack],
    windows: Sequence[Tensor],
    seed: int,
    source: ResidentBlocks,
) -> list[Tensor] | None:
    """Gradients, at the output of the last stack passed, of the log-likelihood of drawn tokens, for
    the windows of this process.

    None if the model has no logits.

    What follows, the head or a whole decoder, runs as it is.
    """
    *earlier, last = passed
    generator = torch.Generator().manual_seed(seed)
    grads = []
    rank, size = rank_and_size()
    others: list[int] = []
    for number, window in enumerate(windows):
        if number % size != rank:
            others.append(len(window))
            continue
        leaf = last.hidden[number // size].detach().requires_grad_()
        with (
            torch.enable_grad(),
            behind(earlier, number // size),
            last.stack.bypassed(leaf),
            source.flow(),
        ):
            logits = getattr(model(**model_inputs(model, window[None])), "logits", None)
            if logits is None:
                return None
            # a row per prediction: of every token, or of a class of the whole window
            log_p_TV = F.log_softmax(logits.flatten(0, -2).float(), dim=-1)
            p_TV = log_p_TV.detach().exp().cpu()
            if not_finite(p_TV):
                raise CalibrationError(
                    f"{type(model).__name__}: its predictions on the calibration windows are "
                    f"not finite, though its hidden states are. Repair the output head, or "
                    f"run the model in a wider dtype (bfloat16 or float32)."
                )
            for length in others:
                # what another process draws for its window
                rows = length if len(p_TV) == len(window) else len(p_TV)
                torch.rand(rows, 1, generator=generator)
            others.clear()
            drawn_T1 = _draw(p_TV, generator)
            likelihood = log_p_TV.gather(1, drawn_T1.to(log_p_TV.device)).sum()
        grads += torch.autograd.grad(likelihood, leaf)
    return grads


def _draw(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """One column of every row with the row's probabilities, (T, 1).

    By the inverse of the distribution function: a number per row, where `torch.multinomial` draws
    one per entry.
    """
    sums_TV = p_TV.cumsum(-1)
    level_T1 = torch.rand(len(p_TV), 1, generator=generator) * sums_TV[:, -1:]
    return torch.searchsorted(sums_TV, level_T1, right=True).clamp_(max=p_TV.shape[-1] - 1)
