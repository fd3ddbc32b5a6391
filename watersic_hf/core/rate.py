"""Say what codes cost, and find the lattice step that costs what was asked for.

Units: bits per weight; steps are searched on a scale of octaves (log2).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.zsic import LARGEST_CODE, BlockStep, zsic, zsic_block

logger = logging.getLogger(__name__)

#: ``charge(codes_AN, rows)``: stored bits per weight, everything included, of a layer of `rows`
#: rows whose codes are distributed like `codes_AN`, which may be a subset of them.
Charge = Callable[[Tensor, int], float]

#: Bits that the paper charges for each row scale and each column scale.
SCALE_BITS = 16
#: Magnitude up to which the values of a column are counted one by one.
COUNTED = 2047
#: Columns that are counted at a time.
COLUMNS_PER_BLOCK = 256
#: The search stays within this many octaves of where it starts.
MAX_OCTAVES = 24.0
#: The longest move between two evaluations, in octaves.
MAX_STRIDE = 4.0
#: Bits per octave below which two evaluations count as a plateau.
FLAT = 0.1
#: Relative error of the bits that the search on a subset of the rows stops at.
SEARCH_TOLERANCE = 3e-3
#: Relative error of the bits of the finished layer below which it is not run again.
FINAL_TOLERANCE = 8e-3
#: Runs over all rows, corrections included.
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
    share = counts[counts > 0].double() / codes.numel()
    return float(-(share * share.log2()).sum())


def column_entropies(codes_AN: Tensor) -> Tensor:
    """Return the empirical entropy of every column, in bits per code, float64.

    Codes beyond `COUNTED` in magnitude count as one value on either side.
    """
    entropies = []
    for codes_AB in codes_AN.split(COLUMNS_PER_BLOCK, dim=1):
        low, high = (max(-COUNTED, min(int(end), COUNTED)) for end in codes_AB.aminmax())
        width, columns = high - low + 1, codes_AB.shape[1]
        index_AB = codes_AB.long().clamp_(low, high) - low
        index_AB += width * torch.arange(columns, device=codes_AB.device)
        counts = torch.bincount(index_AB.flatten(), minlength=width * columns)
        share_BV = counts.view(columns, width).double() / len(codes_AB)
        entropies.append(-torch.special.xlogy(share_BV, share_BV).sum(1) / math.log(2))
    return torch.cat(entropies).clamp_(min=0)


def paper_rate(codes_AN: Tensor, live_N: Tensor | None = None) -> float:
    """Return the rate by the paper's account: pooled entropy of the live codes, and the scales.

    Every row and every column pays `SCALE_BITS`: for a dead column, that is its index.
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
    """Find a step whose codes cost `target` bits per weight.

    A secant in log2(step), because at high rate the bits fall by one per octave.  Between a step
    that is too fine and one that is too coarse it never leaves the bracket; on a plateau it doubles
    its stride.

    Args:
        bits_at: what a step costs; falls with the step, but need neither be smooth nor exact.
        target: bits per weight.
        start: the first step to try.
        tolerance: bits per weight that count as reached.
        finest: no step below this one is tried.
        evaluations: the most that may be spent.

    Returns:
        Of all the steps tried, the one that came closest.
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
    """Continue from points that all lie on one side of the target."""
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
    """The codes of one step, all columns, and what they cost."""

    step: float
    codes_AN: Tensor
    shrinkage_N: Tensor
    bits: float | None


def code_layer(
    target_AN: Tensor,
    chol: Tensor,
    live_N: Tensor,
    step: float,
    charge: Charge | None = None,
    *,
    block_step: BlockStep = zsic_block,
) -> CodedLayer:
    """Run the recursion over all rows."""
    codes_AN, shrinkage_N = zsic(target_AN, chol, step, block_step=block_step)
    codes_AN = narrow(insert_columns(codes_AN, live_N))
    spent = None if charge is None else charge(codes_AN, len(codes_AN))
    return CodedLayer(step=step, codes_AN=codes_AN, shrinkage_N=shrinkage_N, bits=spent)


class LayerSearch:
    """The step for a number of bits: first on a sample of the rows, then corrected on all."""

    def __init__(
        self,
        target_AN: Tensor,
        chol: Tensor,
        live_N: Tensor,
        charge: Charge,
        sample: Tensor,
        block_step: BlockStep,
    ) -> None:
        self.target_AN = target_AN
        self.chol = chol
        self.live_N = live_N
        self.charge = charge
        self.block_step = block_step
        self.sample_SN = target_AN[sample].float()
        self.sample_chol = chol.float()
        self.runs: dict[float, CodedLayer] = {}

    def run(self, bits: float, *, start: float, coarsest: float, name: str) -> CodedLayer:
        """Return the run over all rows that comes closest to `bits`."""
        rows, columns = len(self.target_AN), len(self.live_N)
        zeros = torch.zeros(
            len(self.sample_SN), columns, dtype=torch.int32, device=self.live_N.device
        )
        floor = self.charge(zeros, rows)
        if floor >= bits:
            logger.warning(
                "%s: %g bits per weight were asked for, but scales and headers of a %d x %d layer "
                "alone cost %.4g; using the coarsest useful step. Ask for more, or leave the layer "
                "out.",
                name,
                bits,
                rows,
                columns,
                floor,
            )
            self.bits_of_all_rows(coarsest)
            return self.runs[coarsest]
        # a tiny layer may not be able to spend its bits, however fine the step
        finest = 2 * float(self.target_AN.abs().max()) / LARGEST_CODE
        step = search_step(
            self.bits_of_sample,
            bits,
            start=start,
            tolerance=SEARCH_TOLERANCE * bits,
            finest=finest,
        )
        step = search_step(
            self.bits_of_all_rows,
            bits,
            start=step,
            tolerance=FINAL_TOLERANCE * bits,
            finest=finest,
            evaluations=FULL_RUNS,
        )
        return self.runs[step]

    def bits_of_sample(self, step: float) -> float:
        """Return what the whole layer would cost, judged by the sample and in float32."""
        codes_SN, _ = zsic(self.sample_SN, self.sample_chol, step, block_step=self.block_step)
        return self.charge(insert_columns(codes_SN, self.live_N), len(self.target_AN))

    def bits_of_all_rows(self, step: float) -> float:
        """Return what the layer costs, and keep the run."""
        self.runs[step] = code_layer(
            self.target_AN, self.chol, self.live_N, step, self.charge, block_step=self.block_step
        )
        return self.runs[step].bits


def insert_columns(live_values: Tensor, live_N: Tensor) -> Tensor:
    """Put the values of the live columns among zeros for the dead ones."""
    values = live_values.new_zeros(*live_values.shape[:-1], len(live_N))
    values[..., live_N] = live_values
    return values


def narrow(codes_AN: Tensor) -> Tensor:
    """Return the codes in the smallest signed integer dtype that holds them."""
    low, high = (int(end) for end in codes_AN.aminmax()) if codes_AN.numel() else (0, 0)
    for dtype in (torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return codes_AN.to(dtype)
    return codes_AN
