"""The block loop: capture, quantize, replace, propagate.

Every block is calibrated on what the quantized blocks before it put out, and within a block every
group of layers on what the quantized groups before it put out, so that later layers can make up for
the errors of earlier ones.
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from watersic_hf.calibration.attention import attention_importance
from watersic_hf.calibration.blocks import RESIDENT, ResidentBlocks, twin
from watersic_hf.calibration.capture import (
    BlockStream,
    Side,
    block_stream,
    group_moments,
    runnable_stacks,
)
from watersic_hf.calibration.layer import LayerQuantizer
from watersic_hf.calibration.mixing import search_mixture
from watersic_hf.calibration.progress import Progress
from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.calibration.settings import CalibrationSettings
from watersic_hf.calibration.topology import InputGroup, Stack, input_groups, inside
from watersic_hf.core import Moments
from watersic_hf.nn import WaterSICLinear, replace_module

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = CalibrationSettings()


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    windows: Sequence[Tensor],
    layers: Iterable[str],
    quantizer: LayerQuantizer,
    *,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    batch_size: int = 8,
    source: ResidentBlocks = RESIDENT,
) -> None:
    """Quantize the layers of a model in place, block by block, on calibration windows.

    Args:
        model: a model in evaluation mode whose blocks map hidden states to hidden states.
        windows: 1-D token ids.
        layers: names of the `nn.Linear` modules to quantize.
        quantizer: does the layers, and holds their budget and reports.
        settings: which statistics are taken, and how they are used.
        sensitivities: by layer, where they are known, as from a run at another rate; default: they
            are measured if `settings` ask for them.
        batch_size: windows in a batch.
        source: where blocks come from; default: they are in memory, and stay where they are.

    Layers outside the blocks, or that no calibration window reaches, stay as they are, with a
    warning that names them.

    Raises:
        CalibrationError: a layer cannot be quantized; the message names it.
    """
    layers = list(layers)
    _warn_of_few_tokens(model, windows, layers)
    stacks = runnable_stacks(model, layers, windows[0], source=source)
    if settings.sensitivity:
        if sensitivities is None:
            sensitivities = layer_sensitivities(
                model, windows, layers, tokens=settings.sensitivity_tokens,
                damping=quantizer.settings.damping, seed=quantizer.seed, source=source,
            )  # fmt: skip
        quantizer.weigh(
            sensitivities,
            allocate=settings.allocation == "sensitivity",
            rows=settings.row_importance,
        )

    def stream_into(stack: Stack) -> BlockStream:
        modules = [block for _, block in stack]
        return block_stream(model, modules, windows, batch_size=batch_size, source=source)

    # what reaches a decoder in the original model, while there is one
    originals = [stream_into(stack) for stack in stacks[1:]] if settings.two_streams else []
    done: set[str] = set()
    ends = [max(i for i, b in enumerate(s) if inside([b], layers)) + 1 for s in stacks]
    weights = sum(model.get_submodule(layer).weight.numel() for layer in layers)
    with Progress(layers=len(layers), weights=weights, blocks=sum(ends)) as progress:
        for number, stack in enumerate(stacks):
            stream = stream_into(stack)
            original = None
            if settings.two_streams:
                original = originals[number - 1] if number else stream.copy()
            for index, (name, block) in enumerate(stack[: ends[number]]):
                progress.block(name)
                with source.hold(name, block):
                    turn = _Turn(
                        index, name, quantizer, settings,
                        working=Side(stream, block),
                        original=None if original is None else Side(original, twin(block)),
                    )  # fmt: skip
                    within = [n.removeprefix(f"{name}.") for n in inside([(name, block)], layers)]
                    for layer in turn.quantize(within):
                        done.add(layer)
                        progress.layer(quantizer.reports[-1])
                    stream.advance(index, block)
                    if original is not None:
                        original.advance(index, turn.original.block)
    left = [layer for layer in layers if layer not in done]
    if left:
        logger.warning(
            "Left dense, since no calibration data reaches them: %s. Name them in "
            "`modules_to_not_convert` to say so on purpose.",
            ", ".join(left),
        )


def _warn_of_few_tokens(model: nn.Module, windows: Sequence[Tensor], layers: Sequence[str]) -> None:
    """Say so when there are fewer than two tokens for every input of the widest layer."""
    tokens = sum(len(window) for window in windows)
    columns = max(model.get_submodule(layer).in_features for layer in layers)
    if tokens < 2 * columns:
        logger.warning(
            "%d calibration tokens do not determine the moments of %d inputs, and the result can "
            "be worse than without data. Use at least %d tokens, better a hundred times as many.",
            tokens,
            columns,
            2 * columns,
        )


@dataclass
class _Turn:
    """One block, while it is its turn."""

    index: int
    name: str
    quantizer: LayerQuantizer
    settings: CalibrationSettings
    working: Side
    original: Side | None

    def quantize(self, layers: Sequence[str]) -> Iterable[str]:
        """Quantize the layers of the block, group by group; yields their full names when done."""
        block = self.working.block
        run = functools.partial(self.working.stream.run, self.index, block)
        groups = input_groups(block, layers, lambda: run(0), self.working.stream.hidden[0])
        if self.index == 0:
            self._say_what_is_not_read(groups)
        importance = self._importance() if any(g.feeds_attention for g in groups) else None
        for number, group in enumerate(groups):
            moments = self._moments(
                group,
                next((g for g in groups[number:] if not g.feeds_attention), None),
                importance if group.feeds_attention else None,
            )
            for layer in group.layers:
                linear = block.get_submodule(layer)
                weight_AN = linear.weight
                packed, codes_AN = self.quantizer.quantize(
                    f"{self.name}.{layer}", weight_AN, moments
                )
                quantized = WaterSICLinear.from_packed(
                    packed, bias=linear.bias, codes_AN=codes_AN, dtype=weight_AN.dtype,
                    device=weight_AN.device,
                )  # fmt: skip
                replace_module(block, layer, quantized)
                yield f"{self.name}.{layer}"

    def _say_what_is_not_read(self, groups: Sequence[InputGroup]) -> None:
        """A line in the log for each part of the method that the architecture gives no way to."""
        if self.original is None:
            return
        settings = self.settings
        if settings.residual and settings.drift and not any(g.residual is not None for g in groups):
            logger.info(
                "%s: no layer's output is simply added to the residual stream, so its error is not "
                "made up for; the drift of the inputs is.",
                self.name,
            )
        wanted = settings.attention or settings.mixing
        if wanted and not any(g.feeds_attention for g in groups):
            logger.info(
                "%s: there is no one self-attention that can be read, so `attention` and `mixing` "
                "do nothing here.",
                self.name,
            )

    def _importance(self) -> list[Tensor] | None:
        """Attention weights of all tokens, if they are wanted."""
        if self.original is None or not (self.settings.attention or self.settings.mixing):
            return None
        run = functools.partial(self.original.stream.run, self.index, self.original.block)
        return attention_importance(run, len(self.original.stream.hidden))

    def _moments(
        self, group: InputGroup, after: InputGroup | None, importance: list[Tensor] | None
    ) -> Moments:
        """The statistics that a group is quantized with."""
        settings = self.settings
        plain, weighted = group_moments(
            self.working, self.index, group, name=self.name, original=self.original,
            residual=settings.residual and self.original is not None, importance=importance,
        )  # fmt: skip

        def mixture(drift: float, attention: float) -> Moments:
            mixed = plain if weighted is None else plain.mix(weighted, attention)
            return mixed.with_drift(drift)

        if not (settings.mixing and group.feeds_attention and after is not None):
            return mixture(settings.drift, settings.attention)
        shares = search_mixture(
            mixture, group, after, self.index, self.working, self.original,
            bits=self.quantizer.budget.ask(f"{self.name}.{group.layers[0]}"),
            settings=self.quantizer.settings, weighted=weighted is not None,
        )  # fmt: skip
        logger.info("%s: drift share %.3f, attention share %.3f", self.name, *shares)
        return mixture(*shares)
