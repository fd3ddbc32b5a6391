r"""What the columns of a quantized weight spend, in numbers few enough to keep for every layer.

Shapes: A = out_features (rows), N = in_features (columns).
Units:  rates are bits per weight; the water level is the distortion c^2 / 12, whitened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.rate import column_entropies

#: Groups of columns that a profile keeps.
GROUPS = 32
#: Bins of the histogram in a bit.
BINS_PER_BIT = 4
#: Columns further below the water level than this, in bits, count as this far.
DEEPEST = -3.0


@dataclass(frozen=True, kw_only=True)
class ColumnProfile:
    r"""The columns of one weight, from the strongest to the weakest."""

    waterfilling: tuple[float, ...]
    r"""What reverse waterfilling gives, :math:`\tfrac12 \log_2(12 \sigma_i^2 / c^2)`, as the means
    of up to `GROUPS` groups of columns; below 0 a column is under water, and costs nothing."""
    entropies: tuple[float, ...]
    """What the codes of the same groups cost, if every column has a model of its own."""
    histogram: tuple[int, ...]
    """Columns by the entropy of their codes, `BINS_PER_BIT` bins in a bit, from 0 on."""


def column_deviations(weight_AN: Tensor, row_scale_A: Tensor, spacing_N: Tensor) -> Tensor:
    r"""Return :math:`\sigma_i / c`, the root mean square of every column in units of its spacing.

    The whitened standard deviation is :math:`s_i \ell_{ii}` and the spacing :math:`c / \ell_{ii}`,
    so the statistics of the inputs cancel.  Rows of scale 0, and columns of spacing 0, count as 0.
    """
    row_scale_A = torch.where(row_scale_A == 0, math.inf, row_scale_A.float())
    deviation_N = (weight_AN.float() / row_scale_A[:, None]).square_().mean(0).sqrt_()
    return deviation_N / torch.where(spacing_N == 0, math.inf, spacing_N.float())


def column_profile(codes_AN: Tensor, deviation_N: Tensor) -> ColumnProfile:
    """Sum up the columns of a weight.

    Args:
        codes_AN: integers.
        deviation_N: standard deviation of every column in units of its spacing; for the codes
            alone, their root mean square.
    """
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
