"""Estimate the memory, disk space and time of a run from the configuration of the model alone.

Units: bytes and seconds; gigabytes are 10^9 bytes.
"""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.rates import Rates, measure_rates
from watersic_hf.integration.selection import Selection
from watersic_hf.integration.settings import SET_OPTION, settings_of
from watersic_hf.integration.sizes import RunSizes
from watersic_hf.integration.source import ModelSource
from watersic_hf.streams.memory import free_memory
from watersic_hf.streams.precision import fast_dtype

#: Smallest number of calibration windows that is proposed.
FEWEST_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings with which a run fits the machine."""

    settings: dict[str, Any]
    """Settings of `WaterSICConfig` that differ from those asked for."""
    processes: int
    options: str
    """The same as options of the command line."""
    memory: int
    """Bytes that one process holds at its peak."""
    disk: int
    """Bytes on the disk at its peak."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate of a run: memory of each process, disk space and time of all."""

    model: str
    blocks: int
    layers: int
    weights: int
    """Weights of the blocks that are quantized."""
    tokens: int
    processes: int
    memory: dict[str, int]
    """Bytes that one process holds at its peak, by purpose."""
    disk: dict[str, int]
    """Bytes on the disk at its peak, by purpose, without the model's own files."""
    seconds: dict[str, float]
    """Seconds by purpose."""
    rates: Rates
    free_memory: int
    """Bytes of memory that are free on this machine."""
    free_disk: int
    """Bytes that are free on the disk of the output."""
    fits: bool
    """Whether all processes fit into this memory, and the files onto this disk."""
    proposal: Proposal | None
    """Settings that fit, if those asked for do not and there are any."""


def plan(
    model: str,
    config: WaterSICConfig,
    *,
    dtype: Any = "auto",
    processes: int = 1,
    folder: str | Path = ".",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
) -> Plan:
    """Return what `quantize_to_folder` would take; of the model only config.json is read.

    Args:
        model: folder or hub name.
        config: how the model would be quantized.
        dtype: as in `quantize_to_folder`.
        processes: number of processes that would share the work on this machine.
        folder: folder to save to, whose disk counts; it need not exist.  Default: this one.
        device: device on which the rates are measured.
        revision: as in `quantize_to_folder`.
        subfolder: as in `quantize_to_folder`.
        trust_remote_code: as in `quantize_to_folder`.

    Raises:
        ValueError: the model has no layer to quantize.
    """
    source = ModelSource(
        name=model, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    model_config = source.load_config()
    empty = source.empty_model(model_config)
    if dtype == "auto":
        dtype = getattr(model_config, "dtype", None) or empty.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    computed = fast_dtype(dtype, torch.device(device))
    selection = Selection.of(empty, config)
    selection.check(config)
    sizes = RunSizes.of(
        empty, selection, config, dtype=dtype, computed=computed, processes=processes
    )
    rates = measure_rates(computed, device, config.lattice)
    machine = _Machine(memory=free_memory(), disk=_free_disk(Path(folder)))
    fits = not machine.excess(sizes)
    return Plan(
        model=model,
        blocks=len(sizes.blocks),
        layers=sum(map(len, sizes.shapes)),
        weights=sizes.weights,
        tokens=sizes.tokens,
        processes=processes,
        memory=sizes.memory(),
        disk=sizes.disk(),
        seconds=sizes.seconds(rates),
        rates=rates,
        free_memory=machine.memory,
        free_disk=machine.disk,
        fits=fits,
        proposal=None if fits else _propose(sizes, machine, rates),
    )


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """Bytes that are free on a machine."""

    memory: int
    disk: int

    def excess(self, sizes: RunSizes) -> float:
        """Return how much a run exceeds the memory and the disk, relative to them; 0 if it fits."""
        memory = sizes.processes * sum(sizes.memory().values())
        disk = sum(sizes.disk().values())
        pairs = (memory, self.memory), (disk, self.disk)
        return sum(max(0.0, needed / max(1, free) - 1) for needed, free in pairs)


def _free_disk(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.is_dir())).free


def _propose(sizes: RunSizes, machine: _Machine, rates: Rates) -> Proposal | None:
    """Return settings that fit the machine and change as little as possible; None if none do.

    The changes are tried in order of what they cost, and only those that help are made.
    """
    asked, changed, excess = sizes, {}, machine.excess(sizes)
    for change in _changes(asked):
        if not excess:
            break
        smaller = machine.excess(_with(asked, changed | change))
        if smaller < excess:
            changed, excess = changed | change, smaller
    if excess:
        return None
    for name in list(changed):
        # a later change can make an earlier one needless
        others = {key: value for key, value in changed.items() if key != name}
        if not machine.excess(_with(asked, others)):
            changed = others
    sizes = _with(asked, changed)
    settings = {name: value for name, value in changed.items() if name != "processes"}
    options = [_option(name, value) for name, value in settings.items()]
    if sizes.processes != asked.processes:
        options.append(f"--processes {sizes.processes}")
    return Proposal(
        settings=settings,
        processes=sizes.processes,
        options=" ".join(options),
        memory=sum(sizes.memory().values()),
        disk=sum(sizes.disk().values()),
        seconds=sum(sizes.seconds(rates).values()),
    )


def _changes(sizes: RunSizes) -> Iterator[dict[str, Any]]:
    """Yield changes of a run that make it smaller, in the order in which to try them."""
    config = sizes.config
    # fewer processes at a time take longer; smaller batches hardly
    yield from ({"batch_size": size} for size in _halves(config.batch_size, 1))
    yield from ({"processes": count} for count in _halves(sizes.processes, 1))
    if config.dataset is not None:
        yield from ({"samples": count} for count in _halves(config.samples, FEWEST_SAMPLES))
        if config.calibration.two_streams:
            one_stream = {"drift": 0.0, "attention": 0.0, "mixing": False}
            yield {k: value for k, value in one_stream.items() if getattr(config, k) != value}
        yield {"dataset": None}


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _with(sizes: RunSizes, change: dict[str, Any]) -> RunSizes:
    """Return the sizes of a run with some settings changed."""
    config = copy.copy(sizes.config)
    for name, value in change.items():
        if name != "processes":
            setattr(config, name, value)
    return replace(sizes, config=config, processes=change.get("processes", sizes.processes))


def _option(name: str, value: Any) -> str:
    """Return a setting as an option of the command line."""
    option = settings_of(WaterSICConfig)[name].option
    text = "none" if value is None else str(value).lower()
    return f"{option} {name}={text}" if option == SET_OPTION else f"{option} {text}"
