"""The loop over the blocks of a model: capture, quantize, replace, propagate.

Every block is calibrated on the outputs of the quantized blocks before it, so that later layers can
compensate for the errors of earlier ones.
"""

import functools
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.core import CalibrationError
from watersic_hf.quantization.block import BlockQuantizer, reuse_finished_block
from watersic_hf.quantization.journal import Journal
from watersic_hf.quantization.layer import LayerQuantizer
from watersic_hf.quantization.settings import CalibrationSettings
from watersic_hf.streams.batches import batch_numbers
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks, copy_sharing_weights
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.outputs import FileStore, MemoryStore, OutputStore
from watersic_hf.streams.processes import rank_and_size, shard
from watersic_hf.streams.progress import Progress
from watersic_hf.streams.replay import Replay
from watersic_hf.streams.stacks import PassedStack, RunnableStack, runnable_stacks
from watersic_hf.streams.stream import BlockStream, block_stream
from watersic_hf.streams.topology import layers_of_blocks

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = CalibrationSettings()


@dataclass(frozen=True, kw_only=True)
class StackOutputs:
    """Outputs of the stacks of a model, which grow by one stack at a time."""

    batches: list[list[int]]
    """Numbers of the windows in every batch of this process."""
    working: list[PassedStack]
    """Outputs in the quantized model."""
    original: list[PassedStack] | None
    """Outputs in the original model; None if only the quantized model runs."""


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    layers: Iterable[str],
    quantizer: LayerQuantizer,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    batch_size: int = 8,
    source: ResidentBlocks = RESIDENT,
    journal: Journal | None = None,
) -> StackOutputs:
    """Quantize the layers of a model in place, block by block, on calibration windows.

    Layers outside the blocks, and layers that no calibration window reaches, stay dense; a warning
    names them.

    With torch.distributed initialised, every process calls this with the same arguments: each runs
    its shard of the windows, quantizes its shard of the layers that share an input, and ends with
    the same model.

    Args:
        model: a model in evaluation mode whose blocks map hidden states to hidden states.
        windows: 1-D token ids.
        layers: full names of the `nn.Linear` modules to quantize.
        quantizer: quantizes the layers, and holds their budget and reports.
        settings: which statistics are collected, and how they are used.
        sensitivities: sensitivities by layer, if they are known, as from a run at another rate
            (default: measured if `settings` need them).
        batch_size: number of windows in a batch.
        source: where the blocks come from (default: they are in memory, and stay where they are).
        journal: stores what is finished.  What it has is not computed again, and blocks that an
            earlier run finished are not put into the model (default: nothing is stored).

    Returns:
        The outputs of the blocks, for the layers behind them.

    Raises:
        CalibrationError: a layer cannot be quantized; the message names it.
    """
    run = ModelRun(
        model=model,
        windows=windows,
        layers=list(layers),
        quantizer=quantizer,
        settings=settings,
        batch_size=_batch_size(len(windows), batch_size),
        source=source,
        journal=journal,
    )
    stacks = runnable_stacks(model, run.layers, windows[0], source=source)
    if settings.sensitivity:
        _use_sensitivities(run, sensitivities)
    # the last stack ends at its last layer; the others run to their end, which later ones read
    last = max(
        i for i, block in enumerate(stacks[-1].blocks) if layers_of_blocks([block], run.layers)
    )
    stacks[-1] = replace(stacks[-1], blocks=stacks[-1].blocks[: last + 1])
    outputs = StackOutputs(
        batches=shard(batch_numbers([len(window) for window in windows], run.batch_size)),
        working=[],
        original=[] if settings.two_streams else None,
    )
    with Progress(
        layers=len(run.layers),
        weights=quantizer.count_weights(run.layers),
        blocks=sum(len(stack.blocks) for stack in stacks),
    ) as progress:
        first = 0
        for stack in stacks:
            StackRun(run, stack, first=first, outputs=outputs).quantize(progress)
            first += len(stack.blocks)
    _warn_of_dense_layers(run)
    return outputs


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """What all stacks of a model have in common; see `quantize_blocks`."""

    model: nn.Module
    windows: Sequence[Tensor]
    layers: Sequence[str]
    quantizer: LayerQuantizer
    settings: CalibrationSettings
    batch_size: int
    source: ResidentBlocks
    journal: Journal | None


class StackRun:
    """Quantizes one stack of blocks, block by block.

    Args:
        run: the run of the model.
        stack: the stack.
        first: number of its first block, counted through all stacks.
        outputs: outputs of the stacks before it; `quantize` adds those of this one.
    """

    def __init__(
        self, run: ModelRun, stack: RunnableStack, *, first: int, outputs: StackOutputs
    ) -> None:
        self.run = run
        self.stack = stack
        self.first = first
        self.outputs = outputs
        finished = 0 if run.journal is None else run.journal.blocks
        self._next = min(max(finished, first), first + len(stack.blocks))
        self.working = self._open_stream("working", outputs.working)
        self.original: BlockStream | None = None
        if outputs.original is not None and self._next == 0:
            # nothing is quantized yet, so both models have the same input
            self.original = self.working.copy()
        elif outputs.original is not None:
            self.original = self._open_stream("original", outputs.original)

    def quantize(self, progress: Progress) -> None:
        """Quantize the blocks of the stack, and add its outputs to those of the stacks before."""
        for index in range(len(self.stack.blocks)):
            self._quantize_block(index, progress)
        self.outputs.working.append(PassedStack(stack=self.stack, hidden=self.working.hidden))
        if self.original is not None:
            self.outputs.original.append(PassedStack(stack=self.stack, hidden=self.original.hidden))

    def _open_stream(self, role: str, passed: Sequence[PassedStack]) -> BlockStream:
        """Return the stream of one model at the next block that is not finished.

        Args:
            role: ``working`` or ``original``; part of the names of the files in the journal.
            passed: the stacks before this one, with their outputs.
        """
        run = self.run
        open_stream = functools.partial(
            block_stream,
            run.model,
            self.stack.modules,
            run.windows,
            batch_size=run.batch_size,
            source=run.source,
            passed=passed,
        )
        if run.journal is None:
            return open_stream()
        if self._next == self.first:
            states = run.journal.states(f"{role}_input", self.first, run.batch_size)
            return open_stream(hidden=states)
        if self._next < self.first + len(self.stack.blocks):
            # only the arguments of the blocks are needed: their hidden states are in the journal
            stream = open_stream(hidden=deque(maxlen=0))
        else:
            stream = BlockStream(hidden=[], arguments=[])
        stream.hidden = run.journal.states(role, self._next, run.batch_size)
        return stream

    def _quantize_block(self, index: int, progress: Progress) -> None:
        """Quantize the layers of a block, and push both streams through it."""
        run, quantizer, number = self.run, self.run.quantizer, self.first + index
        name, block = self.stack.blocks[index]
        progress.block(name)
        if reuse_finished_block(number, run.journal, quantizer=quantizer, progress=progress):
            return
        with run.source.hold(name, block):
            layers = [
                n.removeprefix(f"{name}.") for n in layers_of_blocks([(name, block)], run.layers)
            ]
            replay = Replay(layers, pending=layers, store=self._output_store(block))
            working = BlockView(stream=self.working, index=index, block=block, replay=replay)
            original = None
            if self.original is not None:
                original = BlockView(
                    stream=self.original,
                    index=index,
                    block=copy_sharing_weights(block),
                    replay=Replay(layers, pending=(), store=self._output_store(block)),
                )
            block_quantizer = BlockQuantizer(
                name=name,
                quantizer=quantizer,
                settings=run.settings,
                working=working,
                original=original,
            )
            if index == 0:
                _warn_of_few_tokens(block, layers, tokens=sum(map(len, run.windows)))
            before = len(quantizer.reports)
            for layer in block_quantizer.quantize(layers):
                progress.layer(quantizer.reports[-1], earlier=quantizer.is_finished(layer))
            self._advance("working", working)
            if original is not None:
                self._advance("original", original)
            if run.journal is not None:
                run.journal.finish_block(
                    number,
                    name=name,
                    tensors=run.source.stored(name, block),
                    reports=quantizer.reports[before:],
                    ends_stack=index + 1 == len(self.stack.blocks),
                )

    def _output_store(self, block: nn.Module) -> OutputStore:
        """Return where one stream keeps the outputs of the modules of a block."""
        streams = 1 if self.original is None else 2
        memory = self.run.source.spare_memory(block)
        if memory or self.run.journal is None:
            return MemoryStore(memory // streams)
        return FileStore(self.run.journal.folder, streams=streams)

    def _advance(self, role: str, view: BlockView) -> None:
        """Push a stream through a block; with a journal, its hidden states go to files there."""
        into = None
        if self.run.journal is not None:
            following = self.first + view.index + 1
            into = self.run.journal.states(role, following, self.run.batch_size)
        view.advance(into=into)


def _batch_size(windows: int, batch_size: int) -> int:
    """Return the largest batch size up to `batch_size` at which every process has a batch."""
    _, size = rank_and_size()
    if windows < size:
        raise CalibrationError(
            f"{windows} calibration windows cannot be split among {size} processes. Start at most "
            f"{windows} processes, or use more windows."
        )
    return min(batch_size, windows // size)


def _use_sensitivities(run: ModelRun, known: Mapping[str, Sensitivity] | None) -> None:
    """Have bits spent by the sensitivities of the layers, which are measured unless `known`."""
    settings, quantizer = run.settings, run.quantizer
    if known is None:
        measure = functools.partial(
            layer_sensitivities,
            run.model,
            run.windows,
            run.layers,
            tokens=settings.sensitivity_tokens,
            damping=quantizer.settings.damping,
            seed=quantizer.seed,
            source=run.source,
        )
        known = measure() if run.journal is None else run.journal.sensitivities(measure)
    allocate = settings.allocation == "sensitivity"
    quantizer.use_sensitivities(known, allocate=allocate, rows=settings.row_importance)


def _warn_of_few_tokens(block: nn.Module, layers: Sequence[str], *, tokens: int) -> None:
    """Warn if there are fewer than two tokens for every input of a block's widest layer."""
    columns = max((block.get_submodule(layer).in_features for layer in layers), default=0)
    if tokens < 2 * columns:
        logger.warning(
            "%d calibration tokens do not determine the moments of %d inputs, and the result can "
            "be worse than without data. Use at least %d tokens; a hundred times as many are "
            "better.",
            tokens,
            columns,
            2 * columns,
        )


def _warn_of_dense_layers(run: ModelRun) -> None:
    """Warn about layers that were to be quantized, but were never called."""
    done = {report.name for report in run.quantizer.reports}
    left = [layer for layer in run.layers if layer not in done]
    if left:
        logger.warning(
            "Left dense, since no calibration data reaches them: %s. To make this explicit, name "
            "them in `modules_to_not_convert`.",
            ", ".join(left),
        )
