"""The journal of a run: its finished parts on the disk, from which it resumes after a crash.

The folder holds these files, each of which is written atomically::

    run.json              identity of the run: model, settings, calibration windows, versions
    progress.json         number of finished blocks, and the blocks after which a stack ends
    sensitivities...      sensitivities of all layers, once they are measured
    block-00003...        a finished block: its name, its tensors, and the reports of its layers
    layer-NAME...         a finished layer of the current block, or of no block
    states-STREAM-00004-* hidden states at the input of a block, a tensor per calibration window
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from watersic_hf.calibration.sensitivity import Sensitivity
from watersic_hf.checkpoint import (
    CheckpointError,
    PackedLayer,
    TensorWriter,
    checksum_of,
    read_json,
    read_state,
    read_tensors,
    replacing,
    require_identity,
    write_json,
    write_state,
)
from watersic_hf.checkpoint.report import LayerReport, layer_report
from watersic_hf.core import CalibrationError
from watersic_hf.streams.batches import batch_numbers
from watersic_hf.streams.processes import barrier, gather, rank_and_size, shard

logger = logging.getLogger(__name__)

_RUN = "run.json"
_PROGRESS = "progress.json"
#: Streams of the two models, whose hidden states at the end of a stack are kept.
_MODEL_STREAMS = ("working", "original")


class SavedStates:
    """Hidden states of the batches of this process in files, read one batch at a time.

    The batches are appended once, in order, to a file of this process, and can be read after the
    last one.  The file has a tensor for every window, so that a run with another batch size or
    another number of processes can read it.

    Args:
        folder: folder of the files.
        name: first part of their names.
        batches: numbers of the windows in every batch.
        lengths: number of tokens of every window.
    """

    def __init__(
        self, folder: Path, name: str, batches: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> None:
        self._folder = folder
        self._name = name
        self._batches = batches
        self._lengths = lengths
        self._rows: list[Tensor] = []
        self._writing: Iterator[None] | None = None
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> Tensor:
        rows = []
        for number in self._batches[batch]:
            file, checksum = self._index[str(number)]
            (row,) = read_tensors(file, [str(number)]).values()
            if number not in self._checked and checksum_of(row) != checksum:
                raise CheckpointError(
                    f"{file}: the hidden states of window {number} do not match their checksum. "
                    f"{_advice(self._folder)}"
                )
            self._checked.add(number)
            rows.append(row)
        # stacking copies, so the file is mapped only meanwhile
        return torch.stack(rows)

    def append(self, hidden: Tensor) -> None:
        """Append the hidden states of the next batch, B x T x D."""
        if hidden.ndim != 3:
            raise CalibrationError(
                f"hidden states have the shape {tuple(hidden.shape)}, but only windows x tokens x "
                f"channels can be stored on the disk. Quantize the model while it is in memory, or "
                f"without `dataset`."
            )
        self._rows = list(hidden)
        self._writing = self._writing or self._write(hidden)
        next(self._writing, None)
        self._rows = []

    def _write(self, first: Tensor) -> Iterator[None]:
        """Write the rows that `append` sets, one batch per step.

        A generator, as the file stays open until the last batch is written.
        """
        file = self._folder / f"{self._name}-{rank_and_size()[0]:04d}.safetensors"
        width, numbers = first.shape[-1], [n for batch in self._batches for n in batch]
        specs = {str(n): ((self._lengths[n], width), first.dtype) for n in numbers}
        checksums: dict[str, int] = {}
        with replacing(file) as handle:
            writer = TensorWriter(handle, specs, {})
            for batch in self._batches:
                for number, row in zip(batch, self._rows, strict=True):
                    checksums[str(number)] = writer.add(row)
                if batch is not self._batches[-1]:
                    yield
        write_json(file.with_suffix(".json"), checksums)

    @functools.cached_property
    def _index(self) -> dict[str, tuple[Path, int]]:
        """File and checksum of every window, by its number."""
        return {
            number: (listing.with_suffix(".safetensors"), checksum)
            for listing in sorted(self._folder.glob(f"{self._name}-*.json"))
            for number, checksum in read_json(listing).items()
        }


class FinishedBlock(NamedTuple):
    """A quantized block on the disk."""

    name: str
    """Name of the block in the model."""
    file: Path
    """File of its tensors, by name within the block."""
    reports: list[LayerReport]
    """Reports of its layers, in the order in which they were quantized."""


class Journal:
    """The finished parts of one run, in a folder.

    With several processes, each of them has a journal of the same folder.  Unless a method says
    otherwise, all processes call it together.

    Args:
        folder: folder of the journal, which is created if necessary.
        identity: identity of the run, as JSON.
        lengths: number of tokens of every calibration window.

    Raises:
        CheckpointError: the folder belongs to another run; the message says what differs.
    """

    def __init__(
        self, folder: str | os.PathLike, identity: Mapping[str, Any], lengths: Sequence[int]
    ) -> None:
        self.folder = Path(folder)
        self.lengths = lengths
        self._identity = {"run": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}
        run = self.folder / _RUN
        if run.is_file():
            require_identity(run, read_json(run), identity)
        barrier()
        if rank_and_size()[0] == 0 and not run.is_file():
            write_json(run, identity)
        barrier()
        self._progress: dict[str, Any] = {"blocks": 0, "ends": []}
        if (self.folder / _PROGRESS).is_file():
            self._progress = read_json(self.folder / _PROGRESS)
            logger.info("%s: resuming after %d finished blocks.", self.folder, self.blocks)
        self._clear()
        # listed once: layers that other processes finish later are sent by them
        self._layers = {file.name for file in self.folder.glob("layer-*.safetensors")}
        barrier()

    @property
    def blocks(self) -> int:
        """Number of finished blocks."""
        return self._progress["blocks"]

    # -- hidden states ------------------------------------------------------------------------

    def states(
        self, stream: str, block: int, batch_size: int, *, windows: int | None = None
    ) -> SavedStates:
        """Return the hidden states at the input of a block, to append or to read them.

        Args:
            stream: name of the stream, without a hyphen.
            block: number of the block, counted through all stacks.
            batch_size: number of windows in a batch.
            windows: number of calibration windows (default: all).
        """
        batches = shard(batch_numbers(self.lengths[:windows], batch_size))
        return SavedStates(self.folder, f"states-{stream}-{block:05d}", batches, self.lengths)

    # -- facts about the whole model ----------------------------------------------------------

    def sensitivities(
        self, measure: Callable[..., Mapping[str, Sensitivity]]
    ) -> Mapping[str, Sensitivity]:
        """Return the sensitivities of the run, which are measured once.

        Args:
            measure: measures them, given the argument `states` of `layer_sensitivities`.
        """
        file = self.folder / "sensitivities.safetensors"
        if not self._exists(file):
            tensors = {
                f"{name}.{field}": tensor
                for name, sensitivity in measure(states=self._sensitivity_states).items()
                for field, tensor in vars(sensitivity).items()
            }
            if rank_and_size()[0] == 0:
                write_state(file, tensors, {"identity": self._identity})
            barrier()
        tensors, _ = read_state(file, identity=self._identity)
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        fields = [field.name for field in dataclasses.fields(Sensitivity)]
        return {name: Sensitivity(**{f: tensors[f"{name}.{f}"] for f in fields}) for name in names}

    def _sensitivity_states(self, block: int, windows: int) -> SavedStates:
        return self.states("sensitivity", block, 1, windows=windows)

    def fact(self, name: str, find: Callable[[], Any]) -> Any:
        """Return a fact about the model, which is found once.

        Args:
            name: name of the fact, and of its file.
            find: returns it, in a form that JSON can hold.
        """
        file = self.folder / f"{name}.json"
        if not self._exists(file):
            value = find()
            if rank_and_size()[0] == 0:
                write_json(file, value)
            barrier()
        return read_json(file)

    @staticmethod
    def _exists(file: Path) -> bool:
        """Return whether a file existed when the first process looked, so that all agree."""
        return gather(file.is_file())[0]

    # -- layers and blocks --------------------------------------------------------------------

    def has_layer(self, name: str) -> bool:
        """Return whether a layer of the current block was finished when the run started."""
        return self._layer_file(name).name in self._layers

    def layer(self, name: str) -> tuple[PackedLayer, LayerReport]:
        """Return a finished layer of the current block, or of no block."""
        tensors, facts = read_state(self._layer_file(name), identity=self._identity)
        return PackedLayer(**tensors), layer_report(facts["report"])

    def put_layer(self, packed: PackedLayer, report: LayerReport) -> None:
        """Store a finished layer; the process that quantized it calls this."""
        facts = {"identity": self._identity, "report": dataclasses.asdict(report)}
        write_state(self._layer_file(report.name), packed.tensors(), facts)

    def layer_outside(
        self,
        name: str,
        prepare: Callable[[], Callable[[], tuple[PackedLayer, Tensor, LayerReport]]],
    ) -> tuple[PackedLayer, LayerReport]:
        """Return a layer outside the blocks, which the first process quantizes once.

        Args:
            name: full name of the layer.
            prepare: finds the statistics of the layer, in all processes together, and returns the
                function that quantizes it.
        """
        if not self._exists(self._layer_file(name)):
            quantize = prepare()
            if rank_and_size()[0] == 0:
                packed, _, report = quantize()
                self.put_layer(packed, report)
            barrier()
        return self.layer(name)

    def block(self, index: int) -> FinishedBlock:
        """Return a finished block by its number, counted through all stacks."""
        file = self._block_file(index)
        _, facts = read_state(file, identity=self._identity, advice=_advice(self.folder))
        reports = [layer_report(report) for report in facts["reports"]]
        return FinishedBlock(facts["name"], file, reports)

    def finish_block(
        self,
        index: int,
        *,
        name: str,
        tensors: Mapping[str, Tensor],
        reports: Sequence[LayerReport],
        ends_stack: bool = False,
    ) -> None:
        """Store a finished block, count it, and delete the files that are no longer needed.

        The hidden states at the output of the block have to be in the journal already.

        Args:
            index: number of the block, counted through all stacks.
            name: name of the block in the model.
            tensors: tensors of the block, by name within it.
            reports: reports of its layers.
            ends_stack: whether it is the last of its stack, so that later stacks need its output.
        """
        # no block is counted before all processes have their part of its output in files
        barrier()
        if rank_and_size()[0] == 0:
            facts = {
                "identity": self._identity,
                "name": name,
                "reports": [dataclasses.asdict(report) for report in reports],
            }
            write_state(self._block_file(index), tensors, facts)
        ends = self._progress["ends"] + [index + 1] * ends_stack
        self._progress = {"blocks": index + 1, "ends": ends}
        if rank_and_size()[0] == 0:
            write_json(self.folder / _PROGRESS, self._progress)
        self._clear()

    def _layer_file(self, name: str) -> Path:
        return self.folder / f"layer-{name}.safetensors"

    def _block_file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _clear(self) -> None:
        """Delete layers of finished blocks, hidden states of past blocks, and incomplete files.

        After the first `barrier` no process reads any of them.
        """
        barrier()
        if rank_and_size()[0] == 0:
            outdated = [*self.folder.glob("*.tmp*")]
            for file in self.folder.glob("states-*"):
                _, stream, block, *_ = file.stem.split("-")
                # the output of a stack is an input of the stacks behind it
                is_output = int(block) in self._progress["ends"] and stream in _MODEL_STREAMS
                if not is_output and int(block) != self.blocks:
                    outdated.append(file)
            if self.blocks:
                reports = self.block(self.blocks - 1).reports
                outdated += [self._layer_file(report.name) for report in reports]
            for file in outdated:
                file.unlink(missing_ok=True)
        barrier()


def _advice(folder: Path) -> str:
    return f"Delete the folder {folder} to start the run from the beginning."
