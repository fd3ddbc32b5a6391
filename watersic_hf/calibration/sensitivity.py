r"""Effect of an error in the output of a layer on the predictions of the model.

Shapes: A = out_features (rows), N = in_features (columns), B = windows in a batch, T = tokens,
        V = vocabulary.

To second order, an error :math:`\delta` in the output of a layer changes the predictions by

.. math:: \operatorname{KL} = \tfrac12 E[(g^T \delta)^2] \text{ nats}

with g the gradient of the log-likelihood of a token drawn from the model's own predictions: the
Fisher information (Martens 2014, arXiv 1412.1193).  The error that quantization causes differs
between tokens.  It is shaped for the moment S of all tokens, so its size at one token is given by
the leverage of that token, :math:`h = x^T S^{-1} x / N`.  The sensitivity of row r is therefore
E[h g_r^2]: a few tokens with large gradients and massive inputs, such as the first one of a text,
count in proportion to the error that they receive.

One backward pass over the blocks is needed.  It holds the graph of one block at a time; for an
encoder, also that of the decoder that follows it.
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

from watersic_hf.calibration.experts import experts_in, layers_outside_experts
from watersic_hf.calibration.gradient_sums import (
    ExpertMatrix,
    ExpertSums,
    LayerGradients,
    group_by_input,
    matrices_of,
)
from watersic_hf.core import CalibrationError, not_finite
from watersic_hf.streams.batches import States, model_inputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.processes import gather, rank_and_size, shard_by_cost
from watersic_hf.streams.progress import progress_bar
from watersic_hf.streams.stacks import PassedStack, RunnableStack, bypass_stacks, runnable_stacks
from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import layers_of_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What errors of one layer cost, known before anything is quantized."""

    row_power_A: Tensor
    """E[h g_r^2] of every row: twice the nats per squared error in whitened units."""

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
    """Measure the sensitivity of layers.

    With torch.distributed initialized, every process calls this with the same arguments and gets
    the same result.

    Args:
        model: the model before quantization.
        windows: 1-D token ids.
        layers: full names of linear layers inside the blocks.
        tokens: number of tokens to measure on: the first windows with at least so many are used.  A
            few thousand are enough.
        damping: damping of the inputs' second moments; None is `damping_for` the tokens.
        seed: seed for the tokens that are drawn from the model's predictions.
        source: where blocks come from; default: they are in memory.
        states: makes the container for the hidden states at the input of a block, given the number
            of the block and of the windows; default: a list.

    Returns:
        The sensitivities, by layer, without layers that the windows do not reach.  It is empty if
        hidden states are not finite or the model makes no predictions.

    Raises:
        CalibrationError: the hidden states are finite, but the predictions are not.
    """
    windows = _first_windows(windows, tokens)
    found: dict[str, Sensitivity] = {}
    passed: list[PassedStack] = []
    first = 0
    with _without_weight_gradients(model):
        for stack in runnable_stacks(model, layers, windows[0], source=source):
            measurement = _StackMeasurement(
                model=model,
                stack=stack,
                windows=windows,
                layers=layers,
                damping=damping,
                seed=seed,
                source=source,
                states=functools.partial(_states_of_block, states, first),
            )
            found |= measurement.run(passed)
            first += len(stack.blocks) + 1
    return found


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Let no weight require a gradient.

    Otherwise attention with a learned bias would run a different kernel.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _states_of_block(
    states: Callable[[int, int], States], first: int, index: int, windows: int
) -> States:
    """Make the container for a block of a stack whose first block has the number `first`."""
    return states(first + index, windows)


def _first_windows(windows: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return the first windows that hold at least `tokens` tokens, or all of them."""
    chosen: list[Tensor] = []
    for window in windows:
        if chosen and sum(map(len, chosen)) >= tokens:
            break
        chosen.append(window)
    return chosen


@dataclass(frozen=True, kw_only=True)
class _StackMeasurement:
    """Measurement of the sensitivities of one stack; see `layer_sensitivities`."""

    model: nn.Module
    stack: RunnableStack
    windows: Sequence[Tensor]
    layers: Sequence[str]
    damping: float | None
    seed: int
    source: ResidentBlocks
    states: Callable[[int, int], States]

    def run(self, passed: list[PassedStack]) -> dict[str, Sensitivity]:
        """Return the sensitivities of the layers of the stack.

        Args:
            passed: the stacks before this one, which is appended to them.
        """
        count = len(self.windows)
        stream = block_stream(
            self.model,
            self.stack.modules,
            self.windows,
            batch_size=1,
            source=self.source,
            hidden=self.states(0, count),
            passed=passed,
        )
        blocks = list(enumerate(self.stack.blocks))
        inputs: list[States] = []
        for index, (name, block) in progress_bar(blocks, "Sensitivity, forward", len(blocks)):
            inputs.append(stream.hidden)
            with self.source.hold(name, block):
                stream.advance(index, block, into=self.states(index + 1, count))
        if any(gather(any(not_finite(stream.hidden[b]) for b in range(len(stream.hidden))))):
            # the block loop will stop at the layer where this begins, and name it
            return {}
        passed.append(PassedStack(self.stack, stream.hidden))
        grads = self._gradients_at_output(passed)
        if any(gather(grads is None)):
            logger.info(
                "%s returns no logits; sensitivities cannot be measured.",
                type(self.model).__name__,
            )
            return {}

        found: dict[str, Sensitivity] = {}
        for index, (name, block) in progress_bar(
            blocks[::-1], "Sensitivity, backward", len(blocks)
        ):
            stream.hidden = inputs.pop()
            with self.source.hold(name, block):
                found |= self._block_sensitivities(BlockView(stream, index, block), name, grads)
        return found

    def _block_sensitivities(
        self, view: BlockView, name: str, grads: list[Tensor]
    ) -> dict[str, Sensitivity]:
        """Return the sensitivities of the layers of one block.

        Args:
            view: the block, at its input.
            name: full name of the block.
            grads: gradients at the output of the block, by batch; replaced by those at its input.
        """
        full_names = {
            layer.removeprefix(f"{name}."): layer
            for layer in layers_of_blocks([(name, view.block)], self.layers)
        }
        experts = experts_in(view.block, list(full_names))
        dense = {
            layer: LayerGradients(layer, view.block.get_submodule(layer))
            for layer in layers_outside_experts(full_names, experts)
        }
        tokens = sum(map(len, self.windows))
        routed: dict[str, ExpertMatrix] = {}
        for part, module in experts.items():
            routed |= matrices_of(part, ExpertSums(module, tokens))
        for batch in range(view.batches):
            grads[batch] = _backward_through_block(view, batch, grads[batch], dense | routed)
        units = [*group_by_input(list(dense.values())), *routed.values()]
        for unit in units:
            unit.combine()
        reached = [unit for unit in units if unit.tokens]
        # the results of some of them are computed here, and exchanged
        own = [
            unit.results(self.damping, full_names)
            for unit in shard_by_cost(reached, lambda unit: unit.cost)
        ]
        return {
            layer: Sensitivity(row_power_A=power_A, variance_N=variance_N)
            for results in itertools.chain(*gather(own))
            for layer, (power_A, variance_N) in results.items()
        }

    def _gradients_at_output(self, passed: Sequence[PassedStack]) -> list[Tensor] | None:
        """Return gradients at the output of this stack, the last one of `passed`.

        They are those of the log-likelihood of drawn tokens, one tensor per window of this process.
        The modules that follow, the head or a complete decoder, run as part of the model.

        Returns:
            The gradients; None if the model has no logits.
        """
        *earlier, last = passed
        generator = torch.Generator().manual_seed(self.seed)
        grads = []
        rank, size = rank_and_size()
        skipped_lengths: list[int] = []
        for number, window in enumerate(self.windows):
            if number % size != rank:
                skipped_lengths.append(len(window))
                continue
            leaf = last.hidden[number // size].detach().requires_grad_()
            with (
                torch.enable_grad(),
                bypass_stacks(earlier, number // size),
                last.stack.bypassed(leaf),
                self.source.flow(),
            ):
                logits = getattr(
                    self.model(**model_inputs(self.model, window[None])), "logits", None
                )
                if logits is None:
                    return None
                # one row per prediction: of every token, or of the class of the window
                log_p_TV = F.log_softmax(logits.flatten(0, -2).float(), dim=-1)
                p_TV = log_p_TV.detach().exp().cpu()
                if not_finite(p_TV):
                    raise CalibrationError(
                        f"{type(self.model).__name__}: its predictions on the calibration windows "
                        f"are not finite, though its hidden states are. Repair the output head, or "
                        f"run the model in a wider dtype (bfloat16 or float32)."
                    )
                for length in skipped_lengths:
                    # consume the random numbers that other processes use for their windows, so that
                    # the draws do not depend on the number of processes
                    rows = length if len(p_TV) == len(window) else len(p_TV)
                    torch.rand(rows, 1, generator=generator)
                skipped_lengths.clear()
                drawn_T1 = _draw(p_TV, generator)
                likelihood = log_p_TV.gather(1, drawn_T1.to(log_p_TV.device)).sum()
            grads += torch.autograd.grad(likelihood, leaf)
        return grads


def _backward_through_block(
    view: BlockView,
    batch: int,
    grad: Tensor,
    layers: Mapping[str, LayerGradients | ExpertMatrix],
) -> Tensor:
    """Add the inputs and gradients of one batch to the sums of a block's layers.

    Args:
        view: the block.
        batch: number of the batch.
        grad: gradient at the output of the block.
        layers: sums of its layers, by name within the block.

    Returns:
        The gradient at the input of the block.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            # an output computed from the states of an encoder alone does not depend on the hidden
            # states, and requires a gradient only from here on
            calls.append((name, args[0].detach(), output.requires_grad_()))

        return hook

    handles = [view.block.get_submodule(n).register_forward_hook(record(n)) for n in layers]
    hidden = view.stream.hidden[batch].detach().requires_grad_()
    try:
        with torch.enable_grad():
            result = view.run(batch, hidden=hidden)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, _, output in calls]
    grad, *grads = torch.autograd.grad(result, [hidden, *outputs], grad.to(result.device))
    for (name, x, _), grad_y in zip(calls, grads, strict=True):
        layers[name].add(x, grad_y)
    return grad


def _draw(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one column of every row with the probabilities of the row; returns (T, 1).

    The distribution function is inverted, which takes one random number per row, where
    `torch.multinomial` takes one per entry.
    """
    sums_TV = p_TV.cumsum(-1)
    level_T1 = torch.rand(len(p_TV), 1, generator=generator) * sums_TV[:, -1:]
    return torch.searchsorted(sums_TV, level_T1, right=True).clamp_(max=p_TV.shape[-1] - 1)
