"""What is finished of a run, on the disk: the run goes on from it after a crash.

A folder holds, each written whole or not at all::

    run.json              which run this is: model, settings, calibration windows, versions
    progress.json         how many blocks are finished, and where stacks of them end
    sensitivities...      of all layers, once they are known
    block-00003...        a finished block: its name, its tensors, and the reports of its layers
    layer-NAME...         a finished layer of the block at hand, or of none
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


class SavedStates:
    """Hidden states of this process's batches in files, mapped into memory a batch at a time.

    They are appended once, batch after batch, to a file of this process, and can be read when all
    are there.  A file has a tensor for every window, so that other batches, and other processes,
    can read it.

    Args:
        folder: of the files.
        name: how their names begin.
        batches: the numbers of the windows in every batch.
        lengths: tokens of every window.
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
            file, checksum = self._places[str(number)]
            (row,) = read_tensors(file, [str(number)]).values()
            if number not in self._checked and checksum_of(row) != checksum:
                raise CheckpointError(
                    f"{file}: the hidden states of window {number} do not match their checksum. "
                    f"Delete the folder {self._folder}, and the run begins again."
                )
            self._checked.add(number)
            rows.append(row)
        # a copy: the files are mapped no longer than this takes
        return torch.stack(rows)

    def append(self, hidden: Tensor) -> None:
        """Add the next batch, B x T x D."""
        if hidden.ndim != 3:
            raise CalibrationError(
                f"hidden states have the shape {tuple(hidden.shape)}, but only windows x tokens x "
                f"channels can be kept on the disk."
            )
        self._rows = list(hidden)
        self._writing = self._writing or self._write(hidden)
        next(self._writing, None)
        self._rows = []

    def _write(self, first: Tensor) -> Iterator[None]:
        """Write the rows that `append` left, a batch for each step."""
        file = self._folder / f"{self._name}-{rank_and_size()[0]:04d}.safetensors"
        width, numbers = first.shape[-1], [n for batch in self._batches for n in batch]
        specs = {str(n): ((self._lengths[n], width), first.dtype) for n in numbers}
        sums: dict[str, int] = {}
        with replacing(file) as handle:
            writer = TensorWriter(handle, specs, {})
            for batch in self._batches:
                for number, row in zip(batch, self._rows, strict=True):
                    sums[str(number)] = writer.add(row)
                if batch is not self._batches[-1]:
                    yield
        write_json(file.with_suffix(".json"), sums)

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Path, int]]:
        """File and checksum of every window."""
        return {
            number: (listing.with_suffix(".safetensors"), checksum)
            for listing in sorted(self._folder.glob(f"{self._name}-*.json"))
            for number, checksum in read_json(listing).items()
        }


class FinishedBlock(NamedTuple):
    """A block that is quantized, and on the disk."""

    name: str
    """Of the block in the model."""
    file: Path
    """With its tensors, by name within the block."""
    reports: list[LayerReport]
    """Of its layers, in the order of their work."""


class Journal:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        identity: which run this is, as JSON holds it.
        lengths: tokens of every calibration window.

    Raises:
        CheckpointError: the folder is that of another run; the message says what differs.
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
            logger.info("%s: going on after %d finished blocks.", self.folder, self.blocks)
        self._clear()
        # what another process finishes meanwhile is handed over, and not looked for here
        self._layers = {file.name for file in self.folder.glob("layer-*.safetensors")}
        barrier()

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return self._progress["blocks"]

    # -- hidden states ------------------------------------------------------------------------

    def states(
        self, stream: str, block: int, batch_size: int, *, windows: int | None = None
    ) -> SavedStates:
        """Hidden states at the input of a block, to be appended or to be read.

        Args:
            stream: a word for the model that they are of.
            block: its number.
            batch_size: windows in a batch.
            windows: how many of the calibration windows; default: all.
        """
        batches = shard(batch_numbers(self.lengths[:windows], batch_size))
        return SavedStates(self.folder, f"states-{stream}-{block:05d}", batches, self.lengths)

    # -- what belongs to the whole model ------------------------------------------------------

    def sensitivities(
        self, measure: Callable[..., Mapping[str, Sensitivity]]
    ) -> Mapping[str, Sensitivity]:
        """The sensitivities of the run, measured once.

        Args:
            measure: measures them, given the `states` of `layer_sensitivities`.
        """
        file = self.folder / "sensitivities.safetensors"
        if not self._is_there(file):
            tensors = {
                f"{name}.{field}": tensor
                for name, sensitivity in measure(states=self._few_states).items()
                for field, tensor in vars(sensitivity).items()
            }
            if rank_and_size()[0] == 0:
                write_state(file, tensors, {"identity": self._identity})
            barrier()
        tensors, _ = read_state(file, identity=self._identity)
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        fields = [field.name for field in dataclasses.fields(Sensitivity)]
        return {name: Sensitivity(**{f: tensors[f"{name}.{f}"] for f in fields}) for name in names}

    def _few_states(self, block: int, windows: int) -> SavedStates:
        return self.states("sensitivity", block, 1, windows=windows)

    def fact(self, name: str, find: Callable[[], Any]) -> Any:
        """Something that JSON holds, found once."""
        file = self.folder / f"{name}.json"
        if not self._is_there(file):
            value = find()
            if rank_and_size()[0] == 0:
                write_json(file, value)
            barrier()
        return read_json(file)

    @staticmethod
    def _is_there(file: Path) -> bool:
        """Whether a file is there, in the eyes of the first process."""
        return gather(file.is_file())[0]

    # -- layers and blocks --------------------------------------------------------------------

    def has_layer(self, name: str) -> bool:
        """Whether a layer of the block at hand is finished."""
        return self._layer_file(name).name in self._layers

    def layer(self, name: str) -> tuple[PackedLayer, LayerReport]:
        """A finished layer of the block at hand."""
        tensors, facts = read_state(self._layer_file(name), identity=self._identity)
        return PackedLayer(**tensors), layer_report(facts["report"])

    def put_layer(self, packed: PackedLayer, report: LayerReport) -> None:
        """Keep a finished layer."""
        facts = {"identity": self._identity, "report": dataclasses.asdict(report)}
        write_state(self._layer_file(report.name), packed.tensors(), facts)

    def layer_outside(
        self,
        name: str,
        prepare: Callable[[], Callable[[], tuple[PackedLayer, Tensor, LayerReport]]],
    ) -> tuple[PackedLayer, LayerReport]:
        """A layer of no block, quantized once, by the first process.

        Args:
            name: of the layer.
            prepare: finds its statistics, in all processes together, and returns what quantizes it.
        """
        if not self._is_there(self._layer_file(name)):
            quantize = prepare()
            if rank_and_size()[0] == 0:
                packed, _, report = quantize()
                self.put_layer(packed, report)
            barrier()
        return self.layer(name)

    def block(self, index: int) -> FinishedBlock:
        """A finished block, by its number in the order of the work."""
        file = self._block_file(index)
        advice = f"Delete the folder {self.folder}, and the run begins again."
        _, facts = read_state(file, identity=self._identity, advice=advice)
        reports = [layer_report(report) for report in facts["reports"]]
        return FinishedBlock(facts["name"], file, reports)

    def put_block(
        self, index: int, name: str, tensors: Mapping[str, Tensor], reports: Sequence[LayerReport]
    ) -> None:
        """Keep a block that is finished; `finish_block` makes it count."""
        facts = {
            "identity": self._identity,
            "name": name,
            "reports": [dataclasses.asdict(report) for report in reports],
        }
        write_state(self._block_file(index), tensors, facts)

    def finish_block(self, index: int, *, end: bool = False) -> None:
        """Count a block as finished, and let go of what is not needed any more.

        The block has been kept, and so have the hidden states that it puts out.

        Args:
            index: of the block.
            end: whether it is the last of its stack, so that what it puts out is needed on.
        """
        ends = self._progress["ends"] + [index + 1] * end
        self._progress = {"blocks": index + 1, "ends": ends}
        if rank_and_size()[0] == 0:
            write_json(self.folder / _PROGRESS, self._progress)
        self._clear()

    def _layer_file(self, name: str) -> Path:
        return self.folder / f"layer-{name}.safetensors"

    def _block_file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _clear(self) -> None:
        """Remove layers of finished blocks, hidden states of other blocks, and what a crash left.

        Nothing of it is read by a process that has got here.
        """
        barrier()
        if rank_and_size()[0] == 0:
            outdated = [*self.folder.glob("*.tmp*")]
            for file in self.folder.glob("states-*"):
                _, stream, block, *_ = file.stem.split("-")
                end = int(block) in self._progress["ends"] and stream in ("working", "original")
                if not end and int(block) != self.blocks:
                    outdated.append(file)
            if self.blocks:
                reports = self.block(self.blocks - 1).reports
                outdated += [self._layer_file(report.name) for report in reports]
            for file in outdated:
                file.unlink(missing_ok=True)
        barrier()
