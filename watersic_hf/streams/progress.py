"""Progress of a quantization, as shown on stderr."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

from tqdm.auto import tqdm

from watersic_hf.checkpoint.report import LayerReport, peak_bytes
from watersic_hf.streams.processes import rank_and_size

T = TypeVar("T")

#: Shortest time between two progress lines where stderr is not a terminal.
SECONDS_BETWEEN_LINES = 10.0


def is_live() -> bool:
    """Return whether this process, the one of rank 0, can show progress bars on stderr.

    It can if stderr is a terminal, or in a notebook.
    """
    return rank_and_size()[0] == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def progress_bar(blocks: Iterable[T], label: str, total: int) -> Iterable[T]:
    """Iterate over blocks with a progress bar.

    When stderr is not a terminal, one line with the label and the number of blocks is printed.

    Args:
        blocks: the blocks.
        label: text before the bar.
        total: number of blocks.
    """
    if is_live():
        return tqdm(blocks, label, total, unit="block", dynamic_ncols=True)
    if rank_and_size()[0] == 0:
        tqdm.write(f"{label}: {total} blocks", file=sys.stderr)
    return blocks


class Progress:
    """Shows the progress of the quantization of a model on stderr.

    On a terminal, and in a notebook, these are a bar with the remaining time and, below it, a
    status line: block, bits and error so far, peak memory, last layer.  When stderr is not a
    terminal, progress is printed as plain lines, at most one every `SECONDS_BETWEEN_LINES`.

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
        # weights of finished layers: all of them, and those that an earlier run has quantized
        self._done = self._done_earlier = 0
        self._finished_a_block = False
        # sums over the weights, of which the bits and the error so far are the means
        self._bits = self._error = 0.0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._live = is_live()
        self._bar = tqdm(
            total=self._weights,
            desc="Quantizing",
            unit_scale=True,
            smoothing=0.1,
            disable=not self._live,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} weights, "
            "{elapsed} elapsed, {remaining} remaining",
        )
        self._status = tqdm(
            total=0,
            position=1,
            bar_format="{desc}",
            disable=not self._live,
            dynamic_ncols=True,
            leave=False,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.close()
        self._bar.close()

    def block(self, name: str) -> None:
        """Begin a block.

        Args:
            name: full name of the block.
        """
        self._block += 1
        self._finished_a_block = self._done > self._done_earlier
        self._status.set_description_str(f"{self._position()}, {name}")

    def layer(self, report: LayerReport, *, earlier: bool = False) -> None:
        """Count a finished layer.

        Args:
            report: report of the layer.
            earlier: whether the layer was quantized by an earlier run, which this one resumes.
        """
        self._layer += 1
        self._done_earlier += report.weights if earlier else 0
        self._done += report.weights
        self._bits += report.bits * report.weights
        self._error += report.error * report.weights
        bits, error, memory = self._bits / self._done, self._error / self._done, peak_bytes()
        status = f"{self._position()}, {bits:.3f} bits, error {error:.2g} so far"
        if memory is not None:
            status += f", peak {memory / 1e9:.2f} GB"
        # comes last, as a line that is too long for the terminal is cut at its end
        status += f", {report.name}: {report.bits:.2f} bits, error {report.error:.2g}"
        self._status.set_description_str(status)
        self._bar.update(report.weights)
        if not self._live:
            self._print(status)

    def _position(self) -> str:
        return f"block {self._block}/{self._blocks}, layer {self._layer}/{self._layers}"

    def _print(self, status: str) -> None:
        """Print a line unless the last one is recent; the line of the last layer always appears."""
        now = time.monotonic()
        recent = now - self._last_line < SECONDS_BETWEEN_LINES and self._layer < self._layers
        if recent or rank_and_size()[0] > 0:
            return
        self._last_line = now
        elapsed = now - self._start
        interval = tqdm.format_interval
        done, ahead = self._done - self._done_earlier, self._weights - self._done
        # unknown before this run has finished a block: the first one includes work for all layers
        known = done and (self._finished_a_block or not ahead)
        remaining = interval(elapsed * ahead / done) if known else "?"
        tqdm.write(f"{interval(elapsed)} elapsed, {remaining} remaining, {status}", file=sys.stderr)
