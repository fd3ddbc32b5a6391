"""Numbers that the memory, disk space and time of a run follow from.

Shapes: A = out_features, N = in_features.
Units:  bytes and seconds.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from watersic_hf.calibration import describe
from watersic_hf.checkpoint.report import resident_bytes
from watersic_hf.core import ROWS_PER_BAND, is_wide
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.rates import Rates
from watersic_hf.integration.run import window_length
from watersic_hf.integration.selection import Selection
from watersic_hf.nn import FusedExperts
from watersic_hf.quantization import CalibrationSettings
from watersic_hf.streams import block_stacks
from watersic_hf.streams.topology import Stack

#: Passes of the tokens through a block in one model.  Its layers run once; what lies between them
#: runs again for the groups of layers behind it.
PASSES = 2.5
#: Float64 matrices that are alive at a time while a layer is quantized, besides its moments:
#: square ones of its inputs, and ones of the shape of its weight.
SQUARES, WEIGHTS = 3, 6
#: Bytes per weight of a wide layer while its scales are fitted, besides the residual: the linear
#: term, and the codes of some runs; and rows that are converted to float64 at a time.
WIDE_BYTES, WIDE_ROWS = 8 + 3, 3 * 2048


@dataclass(kw_only=True)
class RunSizes:
    """Numbers that a plan is made of."""

    model: nn.Module
    blocks: Stack
    selection: Selection
    config: WaterSICConfig
    itemsize: int
    """Bytes of a dense weight in the files."""
    computed: int
    """Bytes of a number that is computed with; see `fast_dtype`."""
    processes: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        selection: Selection,
        config: WaterSICConfig,
        *,
        dtype: torch.dtype,
        computed: torch.dtype,
        processes: int,
    ) -> "RunSizes":
        """Return the numbers of a run.

        Args:
            model: the model, whose weights may be on meta.
            selection: what is quantized of it.
            config: how.
            dtype: dtype of the dense weights in the files.
            computed: dtype that is computed with.
            processes: number of processes that share the work.
        """
        return cls(
            model=model,
            blocks=[block for stack in block_stacks(model, selection.shapes) for block in stack],
            selection=selection,
            config=config,
            itemsize=dtype.itemsize,
            computed=computed.itemsize,
            processes=processes,
        )

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
        run = batch * length * (activations + 4 * self.width) * self.computed
        # logits, their probabilities and gradients in float32
        head = 4 * 4 * length * vocabulary
        # a vocabulary matrix is quantized some rows at a time, and held as codes and as the result
        matrices = [
            self._layer_bytes(min(a, 2 * ROWS_PER_BAND), n) + 2 * a * n for a, n in self.vocabulary
        ]
        work = max([layer, run, head, *matrices])
        routed = {}
        if self.experts and self.tokens:
            states = self.streams * self.tokens * self.width * self.computed
            routed = {"all that reaches the experts of a block": states}
        return {
            "Python and libraries": resident_bytes() or 0,
            "embedding, head and norms, mapped from the file": self.rest() * self.computed,
            "a block, dense and quantized": 2 * block * self.computed,
            "a layer at work with its moments, or a batch, or the head": work,
        } | routed

    def _layer_bytes(self, rows: int, columns: int) -> int:
        squares, weights = columns * columns, rows * columns
        if self.tokens and is_wide(rows, columns):
            # the moment, and the Gram matrix of the scales
            residual = 4 * (self.settings.residual and self.settings.two_streams)
            return 16 * squares + (WIDE_BYTES + residual) * weights + 8 * WIDE_ROWS * columns
        if not self.tokens:
            # the identity covariance is a diagonal
            return 8 * WEIGHTS * weights
        moments = 3 if self.settings.two_streams else 1
        matrices = WEIGHTS + self.settings.residual
        return 8 * ((moments + SQUARES) * squares + matrices * weights)

    def disk(self) -> dict[str, int]:
        """Return the bytes on the disk at its peak, by purpose."""
        vocabulary = sum(a * n for a, n in self.vocabulary)
        dense = sum(p.numel() for p in self.model.parameters()) - self.weights - vocabulary
        bits = self.weights * self.config.bits
        bits += sum(math.prod(m.shape) * m.bits for m in self.selection.quantized_vocabulary)
        model = int(bits / 8) + dense * self.itemsize
        rest = (self.rest() - vocabulary) * self.itemsize
        state = self.tokens * self.width * self.computed
        few = min(self.tokens, self.settings.sensitivity_tokens) * self.width * self.computed
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
        squares = sum(map(_moment_products, self.shapes))
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


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run calibrates on, and how long it takes with that and with other amounts of text."""

    dataset: str | None
    """Name of the calibration set; None: the model is quantized without data."""
    windows: int
    length: int
    """Tokens of a window."""
    seconds: dict[int, float]
    """Estimated seconds of the run, by number of windows."""

    @classmethod
    def of(cls, sizes: RunSizes, rates: Rates, windows: int) -> "Outlook":
        """Return the outlook of a run on so many windows, with a quarter and four times as many."""
        seconds = {}
        for count in sorted({max(1, windows // 4), windows, 4 * windows}) if windows else [0]:
            config = copy.copy(sizes.config)
            config.samples = count
            seconds[count] = sum(replace(sizes, config=config).seconds(rates).values())
        return cls(
            dataset=describe(sizes.config.dataset),
            windows=windows,
            length=sizes.length,
            seconds=seconds,
        )


def _moment_products(shapes: list[tuple[int, int]]) -> float:
    """Return the products per token for the moments of a block, in units of `Rates.moments`."""
    # of the layers with the same number of inputs most share their input, and one does not
    square = {n for a, n in shapes if not is_wide(a, n)}
    wide = [(a, n) for a, n in shapes if n not in square]
    # half of a square, and the products of the outputs and of the residual with the inputs
    return sum(n**2 / 4 + a * n for a, n in wide) + sum(2 * n**2 for n in square)
