"""What a person sees while a model is quantized."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

from tqdm.auto import tqdm

from watersic_hf.checkpoint.report import LayerReport, peak_bytes
from watersic_hf.streams.processes import rank_and_size

T = TypeVar("T")

#: Without a terminal, the least seconds between two lines.
LINE_EVERY = 10.0


def is_live() -> bool:
    """Whether standard error shows lines that change; of several processes the first one's."""
    return rank_and_size()[0] == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def steps(blocks: Iterable[T], label: str, total: int) -> Iterable[T]:
    """Blocks, one after another, behind a bar; without a terminal a line says that they begin."""
    if is_live():
        return tqdm(blocks, label, total, unit="block", dynamic_ncols=True)
    if rank_and_size()[0] == 0:
        tqdm.write(f"{label}: {total} blocks", file=sys.stderr)
    return blocks


class Progress:
    """Shows on standard error how far the quantization of a model is.

    On a terminal, and in a notebook, two lines that change: a bar with the time that is left, and
    below it the block, bits and error so far, the peak memory, and the last layer.
    Elsewhere all of it in a plain line, every `LINE_EVERY` seconds at most.

    Args:
        layers: number of layers to quantize.
        weights: number of weights in them.
        blocks: number of blocks that hold them.
    """

    def __init__(self, *, layers: int, weights: int, blocks: int) -> None:
        self._layers = layers
        self._weights = weights
        self._blocks = blocks
        self._block = self._layer = 0
        self._seen = self._seen_earlier = 0
        self._whole_blocks = False
        self._spent = self._lost = 0.0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._live = is_live()
        self._bar = tqdm(
            total=self._weights, desc="Quantizing", unit_scale=True, smoothing=0.1,
            disable=not self._live, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} weights, "
            "{elapsed} gone, {remaining} left",
        )  # fmt: skip
        self._below = tqdm(
            total=0, position=1, bar_format="{desc}", disable=not self._live, dynamic_ncols=True,
            leave=False,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._below.close()
        self._bar.close()

    def block(self, name: str) -> None:
        """A block is begun."""
        self._block += 1
        self._whole_blocks = self._seen > self._seen_earlier
        self._below.set_description_str(f"{self._where()}, {name}")

    def layer(self, report: LayerReport, *, earlier: bool = False) -> None:
        """A layer is quantized, or was in an earlier run that this one goes on from."""
        self._layer += 1
        self._seen_earlier += report.weights if earlier else 0
        self._seen += report.weights
        self._spent += report.bits * report.weights
        self._lost += report.error * report.weights
        bits, error, memory = self._spent / self._seen, self._lost / self._seen, peak_bytes()
        state = f"{self._where()}, {bits:.3f} bits, error {error:.2g} so far"
        if memory is not None:
            state += f", peak {memory / 1e9:.2f} GB"
        # a line that is too long for the terminal loses its end
        state += f", {report.name}: {report.bits:.2f} bits, error {report.error:.2g}"
        self._below.set_description_str(state)
        self._bar.update(report.weights)
        if not self._live:
            self._say(state)

    def _where(self) -> str:
        return f"block {self._block}/{self._blocks}, layer {self._layer}/{self._layers}"

    def _say(self, state: str) -> None:
        now = time.monotonic()
        soon = now - self._last_line < LINE_EVERY and self._layer < self._layers
        if soon or rank_and_size()[0] > 0:
            return
        self._last_line = now
        gone = now - self._start
        interval = tqdm.format_interval
        done, ahead = self._seen - self._seen_earlier, self._weights - self._seen
        # nobody knows before this run has a whole block; much of the first is done for all layers
        known = done and (self._whole_blocks or not ahead)
        left = interval(gone * ahead / done) if known else "?"
        tqdm.write(f"{interval(gone)} gone, {left} left, {state}", file=sys.stderr)
