"""Estimate the memory, disk space and time of a run from the configuration of the model alone.

Shapes: A = out_features, N = in_features.
Units:  bytes and seconds; gigabytes are 10^9 bytes.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from watersic_hf.checkpoint import layer_charge, pack_layer
from watersic_hf.checkpoint.report import describe_run, resident_bytes
from watersic_hf.core import (
    ROWS_PER_BAND,
    LayerSettings,
    MomentAccumulator,
    quantize_weight,
)
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.run import window_length
from watersic_hf.integration.selection import Selection
from watersic_hf.integration.source import ModelSource
from watersic_hf.nn import FusedExperts, block_step, path_search
from watersic_hf.quantization import CalibrationSettings
from watersic_hf.streams import block_stacks
from watersic_hf.streams.topology import Stack

#: Passes of the tokens through a block in one model: up to each group of layers, and to its end.
PASSES = 2.5
#: Float64 matrices that are alive at a time while a layer is quantized, besides its moments:
#: square ones of its inputs, and ones of the shape of its weight.
SQUARES, WEIGHTS = 3, 6
#: Sizes of the square layers, and tokens, that rates are measured with.
SIZES, TOKENS = (512, 1024), 512


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is, measured in a few seconds."""

    machine: str
    forward: float
    """Seconds per token and weight of a layer."""
    moments: float
    """Seconds per token and squared input of a layer, both streams."""
    weight: float
    """Seconds to quantize a layer: per weight..."""
    product: float
    """...and per weight and column."""

    def layer(self, rows: int, columns: int) -> float:
        """Return the seconds to quantize a layer."""
        work = rows * columns * self.weight
        return work + (rows + columns) / 2 * columns**2 * self.product


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


def plan(
    model: str,
    config: WaterSICConfig,
    *,
    dtype: Any = "auto",
    processes: int = 1,
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
        processes: number of processes that would share the work.
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
    selection = Selection.of(empty, config)
    selection.check(config)
    sizes = _Sizes(
        model=empty,
        blocks=[block for stack in block_stacks(empty, selection.shapes) for block in stack],
        selection=selection,
        config=config,
        itemsize=dtype.itemsize,
        processes=processes,
    )
    memory = sizes.memory()
    rates = measure_rates(dtype, device, config.lattice)
    return Plan(
        model=model,
        blocks=len(sizes.blocks),
        layers=sum(map(len, sizes.shapes)),
        weights=sizes.weights,
        tokens=sizes.tokens,
        processes=processes,
        memory=memory,
        disk=sizes.disk(),
        seconds=sizes.seconds(rates),
        rates=rates,
    )


@dataclass(kw_only=True)
class _Sizes:
    """Numbers that a plan is made of."""

    model: nn.Module
    blocks: Stack
    selection: Selection
    config: WaterSICConfig
    itemsize: int
    """Bytes of a dense weight."""
    processes: int

    @cached_property
    def shapes(self) -> list[list[tuple[int, int]]]:
        """(A, N) of the layers of every block."""
        layers = self.selection.shapes.items()
        return [
            [shape for layer, shape in layers if layer.startswith(f"{name}.")]
            for name, _ in self.blocks
        ]

    @property
    def length(self) -> int:
        """Tokens of a calibration window."""
        return window_length(self.model, self.config)

    @property
    def settings(self) -> CalibrationSettings:
        """Settings of the calibration."""
        return self.config.calibration

    @property
    def streams(self) -> int:
        """Number of models that run side by side."""
        return 2 if self.settings.two_streams else 1

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.config.samples * self.length if self.config.dataset is not None else 0

    @property
    def weights(self) -> int:
        """Weights of the blocks that are quantized."""
        return sum(a * n for block in self.shapes for a, n in block)

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.model.config.get_text_config().hidden_size

    @property
    def experts_per_token(self) -> int:
        """Experts of a layer that a token goes through."""
        return getattr(self.model.config.get_text_config(), "num_experts_per_tok", None) or 1

    @property
    def experts(self) -> Collection[FusedExperts]:
        """Modules of experts that are quantized."""
        return self.selection.experts.values()

    @property
    def vocabulary(self) -> list[tuple[int, int]]:
        """(A, N) of the vocabulary matrices that are quantized."""
        return [matrix.shape for matrix in self.selection.quantized_vocabulary]

    def idle(self) -> int:
        """Return the weights of experts that a token does not go through."""
        return sum(
            math.prod(layout.shape(matrix)) * (layout.experts - self.experts_per_token)
            for layout in self.experts
            for matrix in layout.matrices
        )

    def rest(self) -> int:
        """Return the elements of the tensors outside the blocks; tied ones count once."""
        inside = {id(p) for _, block in self.blocks for p in block.parameters()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in inside)

    def memory(self) -> dict[str, int]:
        """Return the bytes that one process holds at its peak, by purpose."""
        block = max(sum(p.numel() for p in block.parameters()) for _, block in self.blocks)
        batch = min(self.config.batch_size, max(1, self.config.samples // self.processes))
        length = min(self.length, self.tokens)
        # inputs and outputs of every layer of a block that does not run as one kernel
        activations = max((sum(a + n for a, n in shapes) for shapes in self.shapes), default=0)
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        layer = max(self._layer_bytes(a, n) for shapes in self.shapes for a, n in shapes)
        run = batch * length * (activations + 4 * self.width) * self.itemsize
        # logits, their probabilities and gradients in float32
        head = 4 * 4 * length * vocabulary
        # a vocabulary matrix is quantized some rows at a time, and held as codes and as the result
        matrices = [
            self._layer_bytes(min(a, 2 * ROWS_PER_BAND), n) + 2 * a * n for a, n in self.vocabulary
        ]
        work = max([layer, run, head, *matrices])
        routed = {}
        if self.experts and self.tokens:
            states = self.streams * self.tokens * self.width * self.itemsize
            routed = {"all that reaches the experts of a block": states}
        return {
            "Python and libraries": resident_bytes() or 0,
            "embedding, head and norms, mapped from the file": self.rest() * self.itemsize,
            "a block, dense and quantized": 2 * block * self.itemsize,
            "a layer at work with its moments, or a batch, or the head": work,
        } | routed

    def _layer_bytes(self, rows: int, columns: int) -> int:
        moments = 3 if self.settings.two_streams else 1
        squares = (moments + SQUARES) * columns * columns
        matrices = (WEIGHTS + self.settings.residual) * rows * columns
        return 8 * (squares + matrices)

    def disk(self) -> dict[str, int]:
        """Return the bytes on the disk at its peak, by purpose."""
        vocabulary = sum(a * n for a, n in self.vocabulary)
        dense = sum(p.numel() for p in self.model.parameters()) - self.weights - vocabulary
        bits = self.weights * self.config.bits
        bits += sum(math.prod(m.shape) * m.bits for m in self.selection.quantized_vocabulary)
        model = int(bits / 8) + dense * self.itemsize
        rest = (self.rest() - vocabulary) * self.itemsize
        state = self.tokens * self.width * self.itemsize
        few = min(self.tokens, self.settings.sensitivity_tokens) * self.width * self.itemsize
        return {
            "the quantized model": model,
            "what of it is finished, until it is complete": model - rest,
            "hidden states, before and behind a block": max(
                2 * self.streams * state, (len(self.blocks) + 1) * few * self.settings.sensitivity
            ),
        }

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Return the seconds of a run, by purpose."""
        passes = PASSES * self.streams * self.tokens / self.processes
        # forward, and twice that much backward
        few = 3 * min(self.tokens, self.settings.sensitivity_tokens) / self.processes
        layers = [[rates.layer(a, n) for a, n in shapes] for shapes in self.shapes]
        # the largest layer of a block has an input of its own, and one process quantizes it
        largest = [max(t, default=0.0) for t in layers]
        split = [(sum(t) - l) / self.processes + l for t, l in zip(layers, largest, strict=True)]
        vocabulary = [rates.layer(a, n) for a, n in self.vocabulary]
        # of the layers with the same number of inputs most share their input, and one does not
        squares = sum(2 * n**2 for shapes in self.shapes for n in {n for _, n in shapes})
        # a token counts for every expert that it goes through
        more = self.experts_per_token - 2
        squares += sum(more * (layout.hidden**2 + layout.inner**2) for layout in self.experts)
        held = sum(p.numel() for _, block in self.blocks for p in block.parameters())
        used = held - self.idle()
        return {
            "sensitivities": rates.forward * few * (used + self.rest()),
            "both models, block by block": rates.forward * passes * used,
            "moments": rates.moments * squares * self.tokens / self.processes,
            "quantizing": sum(split) + sum(vocabulary),
        }


def measure_rates(dtype: torch.dtype, device: torch.device | str, lattice: str) -> Rates:
    """Measure how fast one process on this machine is, with a lattice of `LATTICES`."""
    g = torch.Generator().manual_seed(0)
    x_TN = torch.randn(TOKENS, SIZES[-1], generator=g).to(device, dtype)
    weight_AN = torch.randn(SIZES[-1], SIZES[-1], generator=g).to(device, dtype)
    forward = _seconds(lambda: x_TN @ weight_AN.T, device)
    sums = MomentAccumulator(SIZES[-1], drift=True, device=device)
    moments = _seconds(lambda: sums.add(x_TN, x_TN), device)
    known = sums.result()
    times = []
    for size in SIZES:
        part = known.select(torch.arange(SIZES[-1], device=device) < size)
        layer_AN = weight_AN[:size, :size].contiguous()

        def work(layer_AN: torch.Tensor = layer_AN, part: Any = part) -> None:
            recursion = block_step(layer_AN.device)
            done = quantize_weight(
                layer_AN,
                part,
                bits=3.0,
                charge=layer_charge,
                settings=LayerSettings(lattice=lattice),
                block_step=recursion,
                search=path_search(layer_AN.device) if lattice == "trellis" else None,
            )
            scales = done.row_scale_A, done.col_scale_N
            pack_layer(done.codes_AN, *scales, path=done.path, name="sample")

        times.append(_seconds(work, device, least=0))
    small, large = SIZES
    # seconds = weight n^2 + product n^3
    product = max(0.0, times[1] / large**2 - times[0] / small**2) / (large - small)
    return Rates(
        machine=describe_run(0).machine,
        forward=forward / TOKENS / SIZES[-1] ** 2,
        moments=moments / TOKENS / SIZES[-1] ** 2,
        weight=max(0.0, times[1] / large**2 - product * large),
        product=product,
    )


def _seconds(
    work: Callable[[], object], device: torch.device | str, *, least: float = 0.3
) -> float:
    """Return the mean seconds of calls of `work`, called for at least `least` seconds."""
    work()
    times, start = 0, time.perf_counter()
    while times == 0 or time.perf_counter() - start < least:
        work()
        times += 1
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
