"""Measure how fast a machine quantizes.

Shapes: A = out_features, N = in_features, T = tokens.
Units:  seconds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from watersic_hf.checkpoint import layer_charge, pack_layer
from watersic_hf.checkpoint.report import describe_run
from watersic_hf.core import LayerSettings, MomentAccumulator, quantize_weight
from watersic_hf.nn import block_step, path_search

#: Sizes of the square layers, and tokens, that rates are measured with.
SIZES, TOKENS = (512, 1024), 512
#: Sizes of the layers for a quick measurement.
QUICK_SIZES = (128, 256)
#: Seconds that each rate is measured for at least, in so many rounds.  Other processes slow a
#: machine down for a while; the median over some seconds is what a run will see.
LEAST_SECONDS, ROUNDS = 2.0, 5


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is, measured in about ten seconds."""

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


def measure_rates(
    dtype: torch.dtype,
    device: torch.device | str,
    lattice: str,
    *,
    quick: bool = False,
) -> Rates:
    """Measure how fast one process on this machine is.

    Args:
        dtype: dtype of the model.
        device: device that computes.
        lattice: one of `LATTICES`.
        quick: whether to measure small layers once, which takes about a second.
    """
    g = torch.Generator().manual_seed(0)
    sizes = small, large = QUICK_SIZES if quick else SIZES
    x_TN = torch.randn(TOKENS, large, generator=g).to(device, dtype)
    weight_AN = torch.randn(large, large, generator=g).to(device, dtype)
    sums = MomentAccumulator(large, drift=True, device=device)
    sums.add(x_TN, x_TN)
    known = sums.result()
    sums = MomentAccumulator(large, drift=True, device=device)

    def quantize(size: int) -> None:
        layer_AN = weight_AN[:size, :size].contiguous()
        done = quantize_weight(
            layer_AN,
            known.select(torch.arange(large, device=device) < size),
            bits=3.0,
            charge=layer_charge,
            settings=LayerSettings(lattice=lattice),
            block_step=block_step(layer_AN.device),
            search=path_search(layer_AN.device) if lattice == "trellis" else None,
        )
        scales = done.row_scale_A, done.col_scale_N
        pack_layer(done.codes_AN, *scales, path=done.path, name="sample")

    forward, moments, *layers = _median_seconds(
        [
            lambda: x_TN @ weight_AN.T,
            lambda: sums.add(x_TN, x_TN),
            lambda: quantize(small),
            lambda: quantize(large),
        ],
        device,
        seconds=0.0 if quick else LEAST_SECONDS,
        rounds=1 if quick else ROUNDS,
    )
    # seconds = weight n^2 + product n^3
    per_weight = [seconds / size**2 for seconds, size in zip(layers, sizes, strict=True)]
    product = max(0.0, per_weight[1] - per_weight[0]) / (large - small)
    return Rates(
        machine=describe_run(0).machine,
        forward=forward / TOKENS / large**2,
        moments=moments / TOKENS / large**2,
        weight=max(0.0, per_weight[1] - product * large),
        product=product,
    )


def _median_seconds(
    work: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    seconds: float,
    rounds: int,
) -> list[float]:
    """Return the median seconds of calls of every piece of work.

    They are called in turn, so that what else the machine does slows all of them down alike.
    """
    times: list[list[float]] = [[] for _ in work]
    for call in work:
        # compiles and loads what it needs
        call()
    for _ in range(rounds):
        for call, found in zip(work, times, strict=True):
            start, calls = time.perf_counter(), 0
            # a call of a millisecond would be timed between two slices of another process
            while calls == 0 or time.perf_counter() - start < seconds / rounds:
                call()
                calls += 1
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize(device)
            found.append((time.perf_counter() - start) / calls)
    return [statistics.median(found) for found in times]
