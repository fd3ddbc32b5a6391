"""The block loop: capture, quantize, replace, propagate.

Every block is calibrated on what the quantized blocks before it put out, and within a block every
group of layers on what the quantized groups before it put out, so that later layers can make up for
the errors of earlier ones.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from watersic_hf.calibration.experts import (
    LARGE_POOL_FRACTION,
    ExpertMoments,
    describe_least_used,
    experts_in,
    layers_outside_experts,
)
from watersic_hf.calibration.mixing import search_mixture
from watersic_hf.calibration.moments import group_moments
from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.checkpoint import PACKED
from watersic_hf.checkpoint.report import LayerReport
from watersic_hf.core import CalibrationError, Moments
from watersic_hf.nn import PackedMatrix, SeparateExperts, WaterSICLinear, replace_module
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer
from watersic_hf.quantization.settings import CalibrationSettings
from watersic_hf.streams.attention import attention_importance
from watersic_hf.streams.batches import batch_numbers
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks, copy_sharing_weights
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.processes import barrier, rank_and_size, shard
from watersic_hf.streams.progress import Progress
from watersic_hf.streams.stacks import PassedStack, runnable_stacks
from watersic_hf.streams.stream import BlockStream, block_stream
from watersic_hf.streams.topology import InputGroup, input_groups, layers_of_blocks

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = CalibrationSettings()


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What the blocks of a model put out once they are quantized, stack by stack."""

    batches: list[list[int]]
    """The windows in every batch of this process, by number."""
    working: list[PassedStack]
    """In the quantized model."""
    original: list[PassedStack] | None
    """In the original one, if that ran beside it."""


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
    journal: Journal | None = None,
) -> Ends:
    """Quantize the layers of a model in place, block by block, on calibration windows.

    With torch.distributed initialised, every process calls this with the same arguments: each runs
    its share of the windows, quantizes its share of the layers that have one input, and ends with
    the same model.

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
        journal: where what is finished is kept, and what is there already is not done again; the
            finished blocks of an earlier run are then not put into the model.

    Returns:
        What the blocks put out, for what follows them.

    Layers outside the blocks, or that no calibration window reaches, stay as they are, with a
    warning that names them.

    Raises:
        CalibrationError: a layer cannot be quantized; the message names it.
    """
    layers = list(layers)
    batch_size = _batch_size(len(windows), batch_size)
    stacks = runnable_stacks(model, layers, windows[0], source=source)
    if settings.sensitivity:
        measure = functools.partial(
            layer_sensitivities, model, windows, layers, tokens=settings.sensitivity_tokens,
            damping=quantizer.settings.damping, seed=quantizer.seed, source=source,
        )  # fmt: skip
        if sensitivities is None:
            sensitivities = measure() if journal is None else journal.sensitivities(measure)
        quantizer.weigh(
            sensitivities,
            allocate=settings.allocation == "sensitivity",
            rows=settings.row_importance,
        )
    last = max(i for i, b in enumerate(stacks[-1].blocks) if layers_of_blocks([b], layers))
    # an encoder has to end, for its decoder
    stacks[-1] = replace(stacks[-1], blocks=stacks[-1].blocks[: last + 1])
    tokens = sum(len(window) for window in windows)
    blocks = sum(len(stack.blocks) for stack in stacks)
    weights = quantizer.weights(layers)
    ends = Ends(
        batches=shard(batch_numbers([len(window) for window in windows], batch_size)),
        working=[],
        original=[] if settings.two_streams else None,
    )
    first = 0
    with Progress(layers=len(layers), weights=weights, blocks=blocks) as progress:
        for stack in stacks:
            stream_into = functools.partial(
                block_stream, model, stack.modules, windows, batch_size=batch_size, source=source
            )
            if journal is None:
                stream, original = _new_streams(stream_into, ends)
            else:
                stream, original = _kept_streams(
                    stream_into, ends, journal, first, len(stack.blocks), batch_size
                )
            way = _Way(
                stream, original, quantizer, settings, batch_size, source, journal, progress, first
            )
            for index, block in enumerate(stack.blocks):
                end = index + 1 == len(stack.blocks)
                way.take(index, *block, layers_of_blocks([block], layers), tokens=tokens, end=end)
            ends.working.append(PassedStack(stack, way.stream.hidden))
            if original is not None:
                ends.original.append(PassedStack(stack, way.original.hidden))
            first += len(stack.blocks)
    done = {report.name for report in quantizer.reports}
    left = [layer for layer in layers if layer not in done]
    if left:
        logger.warning(
            "Left dense, since no calibration data reaches them: %s. Name them in "
            "`modules_to_not_convert` to say so on purpose.",
            ", ".join(left),
        )
    return ends


@dataclass
class _Way:
    """The way through one stack of blocks."""

    stream: BlockStream
    original: BlockStream | None
    quantizer: LayerQuantizer
    settings: CalibrationSettings
    batch_size: int
    source: ResidentBlocks
    journal: Journal | None
    progress: Progress
    first: int
    """The number of its first block, counted through all stacks."""

    def take(
        self,
        index: int,
        name: str,
        block: nn.Module,
        layers: Sequence[str],
        *,
        tokens: int,
        end: bool,
    ) -> None:
        """Quantize the layers of the next block, and go on to the one behind it."""
        self.progress.block(name)
        if self.journal is not None and self.first + index < self.journal.blocks:
            for report in self.journal.block(self.first + index).reports:
                self.quantizer.count(report)
                self.progress.layer(report, earlier=True)
            return
        with self.source.hold(name, block):
            turn = _Turn(
                index, name, self.quantizer, self.settings,
                working=BlockView(self.stream, index, block),
                original=None
                if self.original is None
                else BlockView(self.original, index, copy_sharing_weights(block)),
            )  # fmt: skip
            within = [layer.removeprefix(f"{name}.") for layer in layers]
            if index == 0:
                _warn_of_few_tokens(block, tokens, within)
            before = len(self.quantizer.reports)
            for layer in turn.quantize(within):
                earlier = self.quantizer.finished(layer)
                self.progress.layer(self.quantizer.reports[-1], earlier=earlier)
            self._advance(turn)
            if self.journal is not None:
                self._keep(turn, self.quantizer.reports[before:], end=end)

    def _advance(self, turn: "_Turn") -> None:
        """Push both streams through a block; with a journal, into files of it."""
        for role, side in (("working", turn.working), ("original", turn.original)):
            if side is not None:
                into = None
                if self.journal is not None:
                    following = self.first + turn.index + 1
                    into = self.journal.states(role, following, self.batch_size)
                side.stream.advance(turn.index, side.block, into=into)

    def _keep(self, turn: "_Turn", reports: Sequence[LayerReport], *, end: bool) -> None:
        """Keep a finished block, when all processes are done with it."""
        index = self.first + turn.index
        stored = self.source.stored(turn.name, turn.working.block)
        barrier()
        if rank_and_size()[0] == 0:
            self.journal.put_block(index, turn.name, stored, reports)
        self.journal.finish_block(index, end=end)


def _batch_size(windows: int, batch_size: int) -> int:
    """The batch size with which every process has a batch."""
    _, size = rank_and_size()
    if windows < size:
        raise CalibrationError(
            f"{windows} calibration windows cannot be shared by {size} processes. Start at most "
            f"{windows} processes, or use more windows."
        )
    return min(batch_size, windows // size)


StreamInto = Callable[..., BlockStream]
"""`block_stream` for a stack, but for its hidden states and the stacks before it."""


def _new_streams(stream_into: StreamInto, ends: Ends) -> tuple[BlockStream, BlockStream | None]:
    """Both streams at the first block of a stack."""
    stream = stream_into(passed=ends.working)
    if ends.original is None:
        return stream, None
    # the two models differ behind what is quantized
    return stream, stream_into(passed=ends.original) if ends.original else stream.copy()


def _kept_streams(
    stream_into: StreamInto,
    ends: Ends,
    journal: Journal,
    first: int,
    blocks: int,
    batch_size: int,
) -> tuple[BlockStream, BlockStream | None]:
    """Both streams at the block at hand of a stack, their hidden states on the disk.

    Args:
        stream_into: makes streams.
        ends: of the stacks before.
        journal: where the hidden states are.
        first: the number of the stack's first block, counted through all stacks.
        blocks: of the stack.
        batch_size: windows in a batch.
    """
    here = min(journal.blocks, first + blocks)

    def stream(role: str, passed: list[PassedStack]) -> BlockStream:
        if here <= first:
            return stream_into(
                hidden=journal.states(f"{role}_input", first, batch_size), passed=passed
            )
        made = BlockStream([], [])
        if here < first + blocks:
            # only the arguments of the blocks are wanted
            made = stream_into(hidden=deque(maxlen=0), passed=passed)
        made.hidden = journal.states(role, here, batch_size)
        return made

    working = stream("working", ends.working)
    if ends.original is None:
        return working, None
    if here == first == 0:
        return working, working.copy()
    return working, stream("original", ends.original)


def _warn_of_few_tokens(block: nn.Module, tokens: int, layers: Sequence[str]) -> None:
    """Say so when there are fewer than two tokens for every input of a block's widest layer."""
    columns = max((block.get_submodule(layer).in_features for layer in layers), default=0)
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
    working: BlockView
    original: BlockView | None

    def quantize(self, layers: Sequence[str]) -> Iterable[str]:
        """Quantize the layers of the block, group by group; yields their full names when done."""
        block = self.working.block
        full = {layer: f"{self.name}.{layer}" for layer in layers}
        run = functools.partial(self.working.stream.run, self.index, block)
        experts = experts_in(block, layers)
        linear = layers_outside_experts(layers, experts)
        groups = input_groups(block, linear, lambda: run(0), self.working.stream.hidden[0])
        if self.index == 0:
            self._say_what_is_not_read(groups)
        importance = self._importance() if any(g.feeds_attention for g in groups) else None
        for number, group in enumerate(groups):
            moments = None
            if not all(self.quantizer.finished(full[layer]) for layer in group.layers):
                moments = self._moments(
                    group,
                    next((g for g in groups[number:] if not g.feeds_attention), None),
                    importance if group.feeds_attention else None,
                )
            linears = {full[layer]: block.get_submodule(layer) for layer in group.layers}
            weights = {name: linear.weight for name, linear in linears.items()}
            for name, packed, codes_AN in self.quantizer.quantize_group(weights, moments):
                weight_AN = weights[name]
                quantized = WaterSICLinear.from_packed(
                    packed, bias=linears[name].bias, codes_AN=codes_AN, dtype=weight_AN.dtype,
                    device=weight_AN.device,
                )  # fmt: skip
                replace_module(block, name.removeprefix(f"{self.name}."), quantized)
                yield name
        for name, module in experts.items():
            yield from self._quantize_experts(name, module)

    def _quantize_experts(self, name: str, experts: SeparateExperts) -> Iterable[str]:
        """Quantize a module of experts, first matrices first; yields their full names when done."""
        within = {f"{self.name}.{name}.{n}": n for n in experts.layout.names()}
        known = None
        if not all(self.quantizer.finished(layer) for layer in within):
            self._say_what_experts_do(name)
            known = ExpertMoments.collect(self.working, self.original, name)

        def moments(layer: str) -> Moments:
            try:
                found = known.of(*experts.layout.names()[within[layer]])
            except CalibrationError as error:
                raise CalibrationError(f"{layer}: {error}") from error
            return found.with_drift(self.settings.drift)

        first = len(self.quantizer.reports)
        for kind in experts.layout.matrices:
            names = [layer for layer in within if layer.endswith(f".{kind}")]
            weights = {layer: experts.get_submodule(within[layer]).weight for layer in names}
            for layer, packed, codes_AN in self.quantizer.quantize_group(weights, moments):
                quantized = PackedMatrix.from_packed(
                    packed, codes_AN=codes_AN, dtype=weights[layer].dtype,
                    device=weights[layer].device,
                )  # fmt: skip
                replace_module(experts, within[layer], quantized)
                yield layer
        reports = self.quantizer.reports[first:]
        few = {
            experts.layout.names()[within[report.name]][0]: report.tokens
            for report in reports
            if report.pooled >= LARGE_POOL_FRACTION
        }
        if few:
            logger.warning(
                "%s.%s: %d of %d experts see so few calibration tokens that their statistics are, "
                "by half or more, those of all tokens: %s.",
                self.name, name, len(few), experts.layout.experts, describe_least_used(few),
            )  # fmt: skip

    def _say_what_experts_do(self, name: str) -> None:
        """A line in the log, at the first experts, for what is not made up for by them."""
        first = not any(f".{PACKED}." in report.name for report in self.quantizer.reports)
        settings = self.settings
        if first and self.original is not None and settings.residual and settings.drift:
            logger.info(
                "%s.%s: what experts put out is weighted before it is added to the residual "
                "stream, so its error is not made up for there; the drift of their inputs is.",
                self.name,
                name,
            )

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
            self.working, group, name=self.name, original=self.original,
            residual=settings.residual and self.original is not None, importance=importance,
        )  # fmt: skip

        def mixture(drift: float, attention: float) -> Moments:
            mixed = plain if weighted is None else plain.mix(weighted, attention)
            return mixed.with_drift(drift)

        if not (settings.mixing and group.feeds_attention and after is not None):
            return mixture(settings.drift, settings.attention)
        shares = search_mixture(
            mixture, group, after, self.working, self.original,
            bits=self.quantizer.budget.ask(f"{self.name}.{group.layers[0]}"),
            settings=self.quantizer.settings, weighted=weighted is not None,
        )  # fmt: skip
        logger.info("%s: drift share %.3f, attention share %.3f", self.name, *shares)
        return mixture(*shares)
