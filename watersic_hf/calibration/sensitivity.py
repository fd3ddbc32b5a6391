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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.calibration.experts import experts_in, outside
from watersic_hf.calibration.gradient_sums import (
    ExpertMatrix,
    ExpertSums,
    LayerGradients,
    by_input,
)
from watersic_hf.core import CalibrationError, not_finite
from watersic_hf.streams.batches import States, model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.processes import gather, rank_and_size, shard
from watersic_hf.streams.progress import steps
from watersic_hf.streams.stacks import PassedStack, RunnableStack, behind, runnable_stacks
from watersic_hf.streams.stream import BlockStream, block_stream
from watersic_hf.streams.topology import inside

logger = logging.getLogger(__name__)


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
            dense = {n: LayerGradients(n, block.get_submodule(n)) for n in outside(within, experts)}
            routed: dict[str, ExpertMatrix] = {}
            for part, module in experts.items():
                sums = ExpertSums(module, sum(map(len, windows)))
                for matrix, place_in in module.layout.names().items():
                    inner = f"{part}.{matrix}"
                    routed[inner] = ExpertMatrix(inner, sums, *place_in)
            for batch in batches:
                grads[batch] = _block_backward(
                    stream, index, block, batch, grads[batch], dense | routed
                )
            units = [*by_input(list(dense.values())), *routed.values()]
            for unit in units:
                unit.combine()
            reached = [unit for unit in units if unit.tokens]
            own = [unit.results(damping, within) for unit in shard(reached)]
            for part in itertools.chain(*gather(own)):
                found |= {n: Sensitivity(row_power_A=p, variance_N=v) for n, (p, v) in part.items()}
    return found


def _first_windows(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first windows that hold so many tokens, at least one."""
    chosen: list[Tensor] = []
    for window in windows:
        if chosen and sum(map(len, chosen)) >= tokens:
            break
        chosen.append(window)
    return chosen


def _block_backward(
    stream: BlockStream,
    index: int,
    block: nn.Module,
    batch: int,
    grad: Tensor,
    layers: Mapping[str, LayerGradients | ExpertMatrix],
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
