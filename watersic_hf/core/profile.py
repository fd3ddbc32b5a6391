r"""Summarize the rates of the columns of a quantized weight in a few numbers per layer.

Shapes: A = out_features (rows), N = in_features (columns).
Units:  rates are bits per weight; the water level is the distortion c^2 / 12, whitened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.rate import column_entropies
from watersic_hf.core.trellis import scalar_deviation, values_to_codes

#: Number of groups of columns in a profile.
GROUPS = 32
#: Histogram bins per bit.
BINS_PER_BIT = 4
#: Lower bound of the waterfilling height, in bits: an all-zero column would have minus infinity.
DEEPEST = -3.0


@dataclass(frozen=True, kw_only=True)
class ColumnProfile:
    r"""Rates of the columns of one weight, from the column of largest variance to the smallest."""

    waterfilling: tuple[float, ...]
    r"""Height above the water level, :math:`\tfrac12 \log_2(12 \sigma_i^2 / c^2)` bits: the rate
    that reverse waterfilling assigns, averaged over each of at most `GROUPS` groups of columns.  A
    column below 0 is under water and has rate 0."""
    entropies: tuple[float, ...]
    """Mean entropy of the codes of the same groups, in bits per code, if every column has its own
    entropy model."""
    histogram: tuple[int, ...]
    """Number of columns by the entropy of their codes: bin i starts at i / `BINS_PER_BIT` bits."""


def column_deviations(weight_AN: Tensor, row_scale_A: Tensor, spacing_N: Tensor) -> Tensor:
    r"""Return :math:`\sigma_i / c`, the root mean square of every column in units of its spacing.

    The whitened standard deviation is :math:`s_i \ell_{ii}` and the spacing :math:`c / \ell_{ii}`,
    so the statistics of the inputs cancel.  Rows with scale 0 and columns with spacing 0 count as
    0.

    Args:
        weight_AN: original weight, any float dtype.
        row_scale_A: scale of every row; the weight is divided by it.
        spacing_N: lattice spacing of every column, in weight units.
    """
    row_scale_A = torch.where(row_scale_A == 0, math.inf, row_scale_A.float())
    deviation_N = (weight_AN.float() / row_scale_A[:, None]).square_().mean(0).sqrt_()
    return deviation_N / torch.where(spacing_N == 0, math.inf, spacing_N.float())


def column_profile(
    codes_AN: Tensor, deviation_N: Tensor, *, trellis: bool = False
) -> ColumnProfile:
    """Return the profile of a quantized weight.

    Args:
        codes_AN: codes Z, or values of a trellis, any integer dtype.
        deviation_N: root mean square of every column in units of its spacing, from
            `column_deviations`; if only the codes are known, the root mean square of the codes.
        trellis: whether these are values of a trellis.  Their entropies are those of the codes
            without knowledge of the quantizer, and so slightly above what is stored.
    """
    if trellis:
        codes_AN, deviation_N = values_to_codes(codes_AN), scalar_deviation(deviation_N)
    filling_N = (math.sqrt(12) * deviation_N.double()).log2().clamp(min=DEEPEST)
    entropy_N = column_entropies(codes_AN)
    order_N = filling_N.argsort(descending=True, stable=True)
    groups = range(min(GROUPS, len(order_N)))

    def means(values_N: Tensor) -> tuple[float, ...]:
        parts = values_N[order_N].tensor_split(len(groups))
        return tuple(round(float(part.mean()), 3) for part in parts)

    return ColumnProfile(
        waterfilling=means(filling_N),
        entropies=means(entropy_N),
        histogram=tuple((entropy_N * BINS_PER_BIT).long().bincount().tolist()),
    )
