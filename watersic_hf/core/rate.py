"""Measure the cost of codes, and search the lattice step that meets a budget of bits.

Shapes: A = out_features (rows), N = in_features (columns), S = sampled rows.
Units:  bits are per weight; steps are searched on a scale of octaves (log2).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.trellis import TRELLIS_DEVIATION, TRELLIS_LOSS, Path, Trellis
from watersic_hf.core.waterfill import SHAPING_LOSS
from watersic_hf.core.zsic import LARGEST_CODE, BlockStep, zsic, zsic_block

logger = logging.getLogger(__name__)

#: ``charge(codes_AN, rows, path)`` returns the stored bits per weight, everything included, of a
#: layer with `rows` rows whose codes are distributed like `codes_AN`, which may hold only some of
#: them.  `path` is that of the values of a trellis through these rows, or None for codes.
Charge = Callable[[Tensor, int, Path | None], float]

#: Bits that the paper charges for each row scale and each column scale.
SCALE_BITS = 16
#: Magnitude up to which `column_entropies` counts values separately.
COUNTED = 2047
#: Number of columns that are counted at a time.
COLUMNS_PER_BLOCK = 256
#: Largest distance of a step from the start of the search, in octaves.
MAX_OCTAVES = 24.0
#: Largest distance between two consecutive steps of an extrapolation, in octaves.
MAX_STRIDE = 4.0
#: Slope, in bits per octave, below which two evaluations count as a plateau.
FLAT = 0.1
#: Relative error of the bits at which the search on a sample of the rows stops.
SEARCH_TOLERANCE = 3e-3
#: Relative error of the bits at which the correction on all rows stops.
FINAL_TOLERANCE = 8e-3
#: Largest number of runs over all rows, including the corrections.
FULL_RUNS = 4


def pooled_entropy(codes: Tensor) -> float:
    """Return the empirical entropy of all codes under one histogram, in bits per code."""
    if codes.numel() == 0:
        return 0.0
    low, high = int(codes.min()), int(codes.max())
    if high - low < codes.numel():
        counts = torch.bincount(codes.flatten().long() - low)
    else:
        counts = torch.unique(codes, return_counts=True)[1]
    probability = counts[counts > 0].double() / codes.numel()
    return float(-(probability * probability.log2()).sum())


def column_entropies(codes_AN: Tensor) -> Tensor:
    """Return the empirical entropy of every column, in bits per code, float64.

    Codes beyond `COUNTED` in magnitude count as one value on each side, so that a single huge code
    does not need a huge histogram.
    """
    entropies = []
    for codes_AB in codes_AN.split(COLUMNS_PER_BLOCK, dim=1):
        low, high = (max(-COUNTED, min(int(end), COUNTED)) for end in codes_AB.aminmax())
        width, columns = high - low + 1, codes_AB.shape[1]
        index_AB = codes_AB.long().clamp_(low, high) - low
        index_AB += width * torch.arange(columns, device=codes_AB.device)
        counts = torch.bincount(index_AB.flatten(), minlength=width * columns)
        probability_BV = counts.view(columns, width).double() / len(codes_AB)
        entropies.append(-torch.special.xlogy(probability_BV, probability_BV).sum(1) / math.log(2))
    return torch.cat(entropies).clamp_(min=0)


def paper_rate(codes_AN: Tensor, live_N: Tensor | None = None) -> float:
    """Return the rate as the paper counts it: pooled entropy of the live codes, plus the scales.

    Every row and every column costs `SCALE_BITS`; for a dead column, this pays for its index.

    Args:
        codes_AN: codes of all columns, any integer dtype.
        live_N: bool, True for the live columns; default: all columns are live.
    """
    rows, columns = codes_AN.shape
    live_codes_AN = codes_AN if live_N is None else codes_AN[:, live_N]
    payload = pooled_entropy(live_codes_AN) * live_codes_AN.shape[1] / columns
    return payload + SCALE_BITS / rows + SCALE_BITS / columns


def search_step(
    bits_at: Callable[[float], float],
    target: float,
    *,
    start: float,
    tolerance: float,
    finest: float = 0.0,
    evaluations: int = 12,
) -> float:
    """Return a step whose codes cost about `target` bits per weight.

    The search is a secant method in log2(step), because at high rate the bits fall by one per
    octave.  Once it has found a step that is too fine and one that is too coarse, it stays between
    them; on a plateau it doubles its stride.

    Args:
        bits_at: function that returns the cost of a step, in bits per weight.  It must decrease
            with the step, but need not be smooth or exact.
        target: bits per weight to spend.
        start: first step to try.
        tolerance: deviation from the target, in bits per weight, at which the search stops.
        finest: smallest step that is tried; default: no limit.
        evaluations: largest number of calls of `bits_at`; default: 12.

    Returns:
        The step, of all those that were tried, whose cost is closest to the target.
    """
    start = max(start, finest)
    lowest = max(-MAX_OCTAVES, math.log2(finest / start)) if finest > 0 else -MAX_OCTAVES
    tried: list[tuple[float, float]] = []
    octave = 0.0
    for _ in range(evaluations):
        excess = bits_at(start * 2.0**octave) - target
        tried.append((octave, excess))
        if abs(excess) <= tolerance:
            break
        octave = min(max(_next_octave(tried), lowest), MAX_OCTAVES)
        if any(octave == known for known, _ in tried):
            break
    best, _ = min(tried, key=lambda point: abs(point[1]))
    return start * 2.0**best


def _next_octave(tried: list[tuple[float, float]]) -> float:
    """Return the next octave to try, given pairs of octaves and excess bits."""
    too_fine = [octave for octave, excess in tried if excess > 0]
    too_coarse = [octave for octave, excess in tried if excess <= 0]
    if not too_fine or not too_coarse:
        return _extrapolate(tried)
    low, high = sorted((max(too_fine), min(too_coarse)))
    (near, excess), (far, far_excess) = sorted(tried, key=lambda point: abs(point[1]))[:2]
    if excess != far_excess:
        proposal = near - excess * (far - near) / (far_excess - excess)
        if low < proposal < high:
            return proposal
    return (low + high) / 2


def _extrapolate(tried: list[tuple[float, float]]) -> float:
    """Return the next octave if all points lie on one side of the target."""
    last, excess = tried[-1]
    if len(tried) == 1:
        stride = excess
    else:
        before, excess_before = tried[-2]
        slope = (excess - excess_before) / (last - before)
        stride = -excess / slope if slope < -FLAT else 2 * max(abs(last - before), 0.5)
    stride = min(abs(stride), MAX_STRIDE)
    return last + stride if excess > 0 else last - stride


@dataclass(frozen=True, kw_only=True)
class CodedLayer:
    """The codes of a layer at one lattice step, and their cost."""

    step: float
    """Lattice step c, whitened units."""
    codes_AN: Tensor
    """Codes Z of all columns, in the smallest integer dtype; 0 in dead columns."""
    path: Path | None
    """Order in which a trellis visits the rows; None for codes."""
    shrinkage_N: Tensor
    """Gains of the live columns."""
    bits: float | None
    """Stored bits per weight by `Charge`; None if the codes were not charged."""


@dataclass(frozen=True, kw_only=True)
class WhitenedLayer:
    """The lattice problem of one layer in the whitened domain, over its live columns."""

    target_AN: Tensor
    """Target Y."""
    chol: Tensor
    """Lower Cholesky factor L of the damped moment, (N, N) or its diagonal (N,)."""
    live_N: Tensor
    """Bool over all columns of the layer, True for those that the target holds."""
    block_step: BlockStep = zsic_block
    """Function that quantizes a block of columns; see `zsic`."""
    trellis: Trellis | None = None
    """What chooses values instead of rounding; see `zsic`."""

    @property
    def path(self) -> Path | None:
        """Order in which a trellis visits the rows."""
        return None if self.trellis is None else self.trellis.path

    @property
    def loss(self) -> float:
        """Rate above the Gaussian bound at high rate, in bits per weight."""
        return SHAPING_LOSS if self.trellis is None else TRELLIS_LOSS

    def lattice_step(self, step: float) -> float:
        """Return the step at which this layer has the distortion of a scalar lattice's step."""
        return step if self.trellis is None else step / (math.sqrt(12) * TRELLIS_DEVIATION)

    def code(self, step: float, charge: Charge | None = None) -> CodedLayer:
        """Quantize all rows with one lattice step.

        Args:
            step: lattice step c, whitened units.
            charge: cost of the codes; default: they are not charged.
        """
        codes_AN, shrinkage_N = zsic(
            self.target_AN, self.chol, step, block_step=self.block_step, trellis=self.trellis
        )
        codes_AN = to_smallest_dtype(insert_columns(codes_AN, self.live_N))
        spent = None if charge is None else charge(codes_AN, len(codes_AN), self.path)
        return CodedLayer(
            step=step, codes_AN=codes_AN, path=self.path, shrinkage_N=shrinkage_N, bits=spent
        )


class LayerSearch:
    """Search the lattice step at which a layer costs a given number of bits.

    The search runs on a sample of the rows in float32; its result is corrected on all rows.

    Args:
        layer: layer to quantize.
        charge: cost of codes.
        sample: indices of the rows in the sample.
    """

    def __init__(self, layer: WhitenedLayer, charge: Charge, sample: Tensor) -> None:
        self.layer = layer
        self.charge = charge
        self.sample_SN = layer.target_AN[sample].float()
        self.sample_trellis = None if layer.trellis is None else layer.trellis.select(sample)
        self.sample_path = None if layer.path is None else layer.path.select(sample)
        self.runs: dict[float, CodedLayer] = {}

    def run(
        self, bits: float, *, start: float, coarsest: float, sampled: bool, name: str
    ) -> CodedLayer:
        """Return the run over all rows whose cost is closest to `bits`.

        Args:
            bits: stored bits per weight to spend.
            start: first step to try.
            coarsest: step to use if the fixed costs alone exceed `bits`.
            sampled: whether to search on the sample first.
            name: name of the layer, for the log.
        """
        rows, columns = len(self.layer.target_AN), len(self.layer.live_N)
        zeros = torch.zeros(
            len(self.sample_SN), columns, dtype=torch.int32, device=self.layer.live_N.device
        )
        floor = self.charge(zeros, rows, self.sample_path)
        if floor >= bits:
            logger.warning(
                "%s: %g bits per weight were requested, but the scales and headers of a %d x %d "
                "layer alone cost %.4g; using the coarsest useful step. Request more bits, or "
                "leave the layer dense.",
                name,
                bits,
                rows,
                columns,
                floor,
            )
            self.bits_of_all_rows(coarsest)
            return self.runs[coarsest]
        # a tiny layer may be unable to spend its bits at any step that keeps the codes in int32
        finest = 2 * float(self.layer.target_AN.abs().max()) / LARGEST_CODE
        if sampled:
            # the factor in float32 is freed before the runs over all rows
            start = search_step(
                functools.partial(self.bits_of_sample, self.layer.chol.float()),
                bits,
                start=start,
                tolerance=SEARCH_TOLERANCE * bits,
                finest=finest,
            )
        step = search_step(
            self.bits_of_all_rows,
            bits,
            start=start,
            tolerance=FINAL_TOLERANCE * bits,
            finest=finest,
            evaluations=FULL_RUNS,
        )
        return self.runs[step]

    def bits_of_sample(self, chol: Tensor, step: float) -> float:
        """Return the cost of the whole layer at a step, estimated from the sample.

        Args:
            chol: factor of the layer in float32.
            step: lattice step c, whitened units.
        """
        codes_SN, _ = zsic(
            self.sample_SN,
            chol,
            step,
            block_step=self.layer.block_step,
            trellis=self.sample_trellis,
        )
        codes_SN = insert_columns(codes_SN, self.layer.live_N)
        return self.charge(codes_SN, len(self.layer.target_AN), self.sample_path)

    def bits_of_all_rows(self, step: float) -> float:
        """Return the cost of the layer at a step, and keep the run."""
        self.runs[step] = self.layer.code(step, self.charge)
        return self.runs[step].bits


def insert_columns(live_values: Tensor, live_N: Tensor) -> Tensor:
    """Return the values of the live columns at their columns, with zeros for the dead columns.

    Args:
        live_values: values of the live columns, along the last dimension.
        live_N: bool over all columns, True for the live ones.
    """
    values = live_values.new_zeros(*live_values.shape[:-1], len(live_N))
    values[..., live_N] = live_values
    return values


def to_smallest_dtype(codes_AN: Tensor) -> Tensor:
    """Return the codes in the smallest of int8, int16 and their own dtype that holds them."""
    low, high = (int(end) for end in codes_AN.aminmax()) if codes_AN.numel() else (0, 0)
    for dtype in (torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return codes_AN.to(dtype)
    return codes_AN
