r"""Quantize columns with a trellis of eight states instead of rounding them.

The search itself is an argument, as only compiled code is fast enough: `PathSearch`.

Shapes: A = out_features (rows), N = in_features (columns), B = columns of one block,
        K = levels of a scale, Q = 2 quantizers, V = magnitudes of a code.
Units:  targets are in whitened units; `step` is the distance of neighbouring values, half of the
        step of a scalar lattice of the same rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

#: ``search(target_A, level_A, cost_KQV, path_rows)`` returns the values, int32, of the cheapest
#: path down a column: the one with the smallest sum of squared errors and costs.  `target_A` is in
#: units of the step, float64; `level_A` (int64) says in which level of `cost_KQV` (float64) the
#: cost of a code stands, by its quantizer and magnitude.  Levels below 0 count as 0; beyond the
#: last, codes cost nothing; the last magnitude stands for all larger ones.  After `path_rows` rows,
#: the next path starts.
PathSearch = Callable[[Tensor, Tensor, Tensor, int], Tensor]

#: Rate above the Gaussian bound at high rate, in bits per weight; `SHAPING_LOSS` is the lattice's.
TRELLIS_LOSS = 0.09
#: Square root of the distortion in units of the squared step, at high rate, for the first step of a
#: search; for a lattice whose step is 1, it is sqrt(1 / 12).
TRELLIS_DEVIATION = 0.5
#: Rows of a path.  A path starts in a fixed state, which costs a few hundredths of a bit at its
#: first rows, while single rows can only be decoded together with their path.
PATH_ROWS = 1024
#: Rows of a path in a weight with more than `TALL` rows, such as a vocabulary matrix.
TALL_PATH_ROWS, TALL = 128, 16384
#: Classes of rows per octave of their scale, and levels per octave in the table of costs.
PER_OCTAVE = 8
#: Largest class of a row: twelve octaves.
LARGEST_CLASS = 12 * PER_OCTAVE
#: log2 of the scale of the first level of the costs, in steps, and their number.
FIRST_LEVEL, LEVELS = -3.0, 7 * PER_OCTAVE + 1
#: Magnitudes of codes in the table of costs.
MAGNITUDES = 40
#: Price of a bit, in squared steps; it serves all rates from 1 to 4 bits (README).
PRICE = 0.3
#: Largest cost of a code, in bits: about that of an escaped value.
LARGEST_COST = 16.0


class Path(NamedTuple):
    """The order in which a trellis visits the rows of a weight: by class, then by number."""

    row_class_A: Tensor
    """Classes of the rows, eighths of an octave of the scale of their targets; int64, from 0 on."""
    rows: int
    """Rows of a path; the next one starts after them."""

    @property
    def order_A(self) -> Tensor:
        """The rows in the order of the path."""
        return self.row_class_A.argsort(stable=True)

    def select(self, rows: Tensor) -> Path:
        """Return the path through some of the rows."""
        return self._replace(row_class_A=self.row_class_A[rows])


@functools.lru_cache(maxsize=1)
def code_costs() -> Tensor:
    """Return the price of codes by level, quantizer and magnitude, in squared steps, float64.

    It is that of the Gaussian probability of the values that are rounded to the code.  The level l
    belongs to the scale ``2^(FIRST_LEVEL + l / PER_OCTAVE)`` in steps.
    """
    level_K = torch.arange(LEVELS, dtype=torch.float64)
    unit_K1 = 2.0 ** -(FIRST_LEVEL + level_K[:, None] / PER_OCTAVE) / math.sqrt(2)
    value_V = 2.0 * torch.arange(MAGNITUDES, dtype=torch.float64)
    # decision levels: quantizer 0 at odd numbers, quantizer 1 at 1/2 and the even numbers from 2 on
    low_QV = torch.stack([value_V - 1, value_V - 2])
    high_QV = torch.stack([value_V + 1, value_V])
    low_QV[1, :2], high_QV[1, :2] = torch.tensor([[-0.5, 0.5], [0.5, 2.0]], dtype=torch.float64)
    erfc = torch.special.erfc
    mass_KQV = erfc(unit_K1[:, None] * low_QV) - erfc(unit_K1[:, None] * high_QV)
    bits_KQV = -(mass_KQV / 2).clamp(min=2.0**-LARGEST_COST).log2()
    return PRICE * bits_KQV


def row_power(target_AN: Tensor, power_N: Tensor | None = None) -> Tensor:
    """Return the mean square of the targets of every row, relative to that of their columns.

    Args:
        target_AN: target Y, in whitened units.
        power_N: mean square of the columns; default: that of these rows.
    """
    square_AN = target_AN.square()
    power_N = square_AN.mean(0) if power_N is None else power_N
    weight_N = torch.where(power_N > 0, 1 / power_N.clamp(min=1e-300), 0.0)
    return square_AN @ weight_N / max(1, int((power_N > 0).sum()))


def row_path(power_A: Tensor) -> Path:
    """Return the path through rows whose targets have these mean squares."""
    # rows that are zero belong to the smallest class, but do not make it smaller for the others
    positive_A = power_A > 0
    least = float(power_A[positive_A].min()) if bool(positive_A.any()) else 1.0
    class_A = (power_A.clamp(min=least).log2() * PER_OCTAVE / 2).round().long()
    class_A = class_A.clamp(min=int(class_A.max()) - LARGEST_CLASS)
    rows = PATH_ROWS if len(power_A) <= TALL else TALL_PATH_ROWS
    return Path(class_A - class_A.min(), rows)


def values_to_codes(values_AN: Tensor) -> Tensor:
    """Return the codes of values: ``2 k - q sign(k)`` is the value of code k of quantizer q."""
    size_AN = values_AN.abs()
    return values_AN.sign() * ((size_AN >> 1) + (size_AN & 1))


def scalar_deviation(deviation: Tensor) -> Tensor:
    """Convert deviations in units of the step to the lattice step of the same distortion."""
    return deviation / (math.sqrt(12) * TRELLIS_DEVIATION)


@dataclass(frozen=True, kw_only=True)
class Trellis:
    """What replaces rounding: a search, and the path of the rows that it visits.

    The rows of all targets must be in the order of the path.
    """

    search: PathSearch
    """Finds the cheapest path down a column."""
    path: Path
    """Order of the rows."""

    @functools.cached_property
    def level_A(self) -> Tensor:
        """Levels of the rows relative to the root mean square of a column, in path order, int64."""
        class_A = self.path.row_class_A.sort().values.double()
        mean = torch.exp2(2 * class_A / PER_OCTAVE).mean().log2() / 2
        return (class_A - PER_OCTAVE * mean).round().long()

    def select(self, rows: Tensor) -> Trellis:
        """Return the trellis of some of the rows."""
        return replace(self, path=self.path.select(rows))

    def values(self, y_A: Tensor, step: float) -> Tensor:
        """Return the values of a column, int32.

        Args:
            y_A: target of the column, rows in path order.
            step: distance of neighbouring values.
        """
        scaled_A = y_A.double() / step
        power = float(scaled_A.square().mean())
        if power == 0:
            return torch.zeros_like(y_A, dtype=torch.int32)
        level = round(PER_OCTAVE * (math.log2(power) / 2 - FIRST_LEVEL))
        costs = code_costs().to(y_A.device)
        return self.search(scaled_A, self.level_A + level, costs, self.path.rows)
