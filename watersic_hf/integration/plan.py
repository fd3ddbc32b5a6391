"""What quantizing a model would take: memory, disk and time, from its configuration alone.

Shapes: A = out_features, N = in_features.
Units:  bytes and seconds; gigabytes are 10^9 bytes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from watersic_hf.checkpoint import layer_charge, pack_layer
from watersic_hf.checkpoint.report import describe_run, resident_bytes
from watersic_hf.core import ROWS_PER_BAND, MomentAccumulator, quantize_weight
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.quantizer import WaterSICHfQuantizer
from watersic_hf.integration.streaming import empty_model
from watersic_hf.integration.tables import Table
from watersic_hf.nn import FusedExperts, block_step
from watersic_hf.quantization import CalibrationSettings
from watersic_hf.streams import block_stacks

#: Passes of the tokens through a block in one model: up to each group of layers, and out of it.
PASSES = 2.5
#: Square matrices of the inputs, and matrices of the weight's shape, in float64, that are alive at
#: a time while a layer is quantized, besides its moments.
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
    """Seconds per weight that is quantized..."""
    product: float
    """...and per weight and column of it."""

    def layer(self, rows: int, columns: int) -> float:
        """Seconds to quantize a layer."""
        work = rows * columns * self.weight
        return work + (rows + columns) / 2 * columns**2 * self.product


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would take; for each of its processes, and for all on the disk."""

    model: str
    blocks: int
    layers: int
    weights: int
    """That are quantized."""
    tokens: int
    processes: int
    memory: dict[str, int]
    """Bytes that one process holds at its peak, by what for."""
    disk: dict[str, int]
    """Bytes on the disk at its peak, by what for; the model's own files are not among them."""
    seconds: dict[str, float]
    """By what for."""
    rates: Rates


def plan(
    model: str, config: WaterSICConfig, *, dtype: Any = "auto", processes: int = 1,
    device: torch.device | str = "cpu",
) -> Plan:  # fmt: skip
    """The plan of `quantize_to_folder`; of the model only the configuration is read.

    Args:
        model: folder or hub name.
        config: what would be done.
        dtype: as there.
        processes: that would share the work.
        device: that rates are measured on.
    """
    model_config = AutoConfig.from_pretrained(model)
    names = getattr(model_config, "architectures", None) or [""]
    empty = empty_model(getattr(transformers, names[0], AutoModelForCausalLM), model_config)
    if dtype == "auto":
        dtype = getattr(model_config, "dtype", None) or empty.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    quantizer = WaterSICHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(empty)
    stack = [block for stack in block_stacks(empty, quantizer.shapes) for block in stack]
    shapes = [
        [shape for n, shape in quantizer.shapes.items() if n.startswith(f"{name}.")]
        for name, _ in stack
    ]
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    length = min(config.sequence_length, longest or config.sequence_length)
    size = _Sizes(
        empty, [block for _, block in stack], shapes, [*quantizer.experts.values()],
        quantizer.tables, config, dtype.itemsize, length, processes,
    )  # fmt: skip
    memory = size.memory()
    rates = measure_rates(dtype, device)
    return Plan(
        model=model,
        blocks=len(stack),
        layers=sum(map(len, shapes)),
        weights=size.weights,
        tokens=size.tokens,
        processes=processes,
        memory=memory,
        disk=size.disk(),
        seconds=size.seconds(rates),
        rates=rates,
    )


@dataclass
class _Sizes:
    """What the parts of a plan are made of."""

    model: nn.Module
    blocks: list[nn.Module]
    shapes: list[list[tuple[int, int]]]
    experts: list[FusedExperts]
    tables: list[Table]
    config: WaterSICConfig
    itemsize: int
    length: int
    processes: int

    @property
    def settings(self) -> CalibrationSettings:
        return self.config.calibration

    @property
    def streams(self) -> int:
        return 2 if self.settings.two_streams else 1

    @property
    def tokens(self) -> int:
        return self.config.samples * self.length if self.config.dataset is not None else 0

    @property
    def weights(self) -> int:
        return sum(a * n for block in self.shapes for a, n in block)

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def experts_per_token(self) -> int:
        return getattr(self.model.config.get_text_config(), "num_experts_per_tok", None) or 1

    def idle(self) -> int:
        """Weights of experts that a token does not go through."""
        return sum(
            math.prod(layout.shape(matrix)) * (layout.experts - self.experts_per_token)
            for layout in self.experts
            for matrix in layout.matrices
        )

    def rest(self) -> int:
        """Elements of the tensors outside the blocks; those that are tied count once."""
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in inside)

    def table_weights(self) -> int:
        """Weights of tables that are quantized."""
        return sum(math.prod(table.shape) for table in self.tables)

    def memory(self) -> dict[str, int]:
        block = max(sum(p.numel() for p in block.parameters()) for block in self.blocks)
        batch = min(self.config.batch_size, max(1, self.config.samples // self.processes))
        length = min(self.length, self.tokens)
        # in and out of every layer of a block that is not run as one
        activations = max((sum(a + n for a, n in shapes) for shapes in self.shapes), default=0)
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        layer = max(self._layer_bytes(a, n) for shapes in self.shapes for a, n in shapes)
        run = batch * length * (activations + 4 * self.width) * self.itemsize
        # logits, their probabilities and gradients in float32
        head = 4 * 4 * length * vocabulary
        # of a table some rows are at work, and all are there as codes and as what they become
        tables = [
            self._layer_bytes(min(a, 2 * ROWS_PER_BAND), n) + 2 * a * n
            for a, n in (table.shape for table in self.tables)
        ]
        work = max([layer, run, head, *tables])
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
        quantized = self.weights + self.table_weights()
        dense = sum(p.numel() for p in self.model.parameters()) - quantized
        bits = self.weights * self.config.bits
        bits += sum(math.prod(table.shape) * table.bits for table in self.tables)
        model = int(bits / 8) + dense * self.itemsize
        rest = (self.rest() - self.table_weights()) * self.itemsize
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
        passes = PASSES * self.streams * self.tokens / self.processes
        # forward, and twice that much backward
        few = 3 * min(self.tokens, self.settings.sensitivity_tokens) / self.processes
        layers = [[rates.layer(a, n) for a, n in shapes] for shapes in self.shapes]
        # the largest layer of a block has an input of its own, and one process does it
        largest = [max(t, default=0.0) for t in layers]
        shared = [(sum(t) - l) / self.processes + l for t, l in zip(layers, largest, strict=True)]
        # layers with the same number of inputs: most share them, one does not
        squares = sum(2 * n**2 for shapes in self.shapes for n in {n for _, n in shapes})
        # a token counts for every expert that it has
        more = self.experts_per_token - 2
        squares += sum(more * (layout.hidden**2 + layout.inner**2) for layout in self.experts)
        weights = sum(p.numel() for block in self.blocks for p in block.parameters()) - self.idle()
        return {
            "sensitivities": rates.forward * few * (weights + self.rest()),
            "both models, block by block": rates.forward * passes * weights,
            "moments": rates.moments * squares * self.tokens / self.processes,
            "quantizing": sum(shared) + sum(rates.layer(*table.shape) for table in self.tables),
        }


def measure_rates(dtype: torch.dtype, device: torch.device | str) -> Rates:
    """Measure this machine, one process of it."""
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
                layer_AN, part, bits=3.0, charge=layer_charge, block_step=recursion
            )
            pack_layer(done.codes_AN, done.row_scale_A, done.col_scale_N, name="sample")

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
    """Seconds that something takes, measured for at least so long."""
    work()
    times, start = 0, time.perf_counter()
    while times == 0 or time.perf_counter() - start < least:
        work()
        times += 1
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
