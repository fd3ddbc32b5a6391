r"""Split the distortion budget of a linear layer over its input columns.

Shapes: A = out_features (rows, the paper's a), N = in_features (columns, the paper's n).
Units:  rates are bits per weight; spacings are in weight units; `step` is in whitened units;
        distortions and variances are mean squares in the whitened domain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Rate above the Gaussian bound that a scalar lattice costs at high rate, in bits per weight.
SHAPING_LOSS = 0.5 * math.log2(2 * math.pi * math.e / 12)


def chol_diagonal(chol: Tensor) -> Tensor:
    """Return l_i, the diagonal of a Cholesky factor; a 1-D factor is that diagonal itself."""
    return chol if chol.ndim == 1 else chol.diagonal()


def whitened_variance(weight_AN: Tensor, chol: Tensor) -> Tensor:
    r"""Return :math:`\sigma_i^2 = s_i \ell_{ii}^2`, where s_i is the mean square of column i.

    Args:
        weight_AN: weight, float64.
        chol: lower Cholesky factor L, (N, N) or its diagonal (N,).
    """
    return weight_AN.square().mean(0) * chol_diagonal(chol).square()


def step_for_rate(weight_AN: Tensor, chol: Tensor, rate: float) -> Tensor:
    r"""Return the lattice step c that spends `rate` bits per weight in the high-rate limit.

    Column i of the whitened weight has variance :math:`\sigma_i^2 = s_i \ell_{ii}^2`, where s_i is
    the mean square of the weight's column i.  Reverse waterfilling gives every column the same
    distortion c^2 / 12, hence

    .. math:: c = \exp\Big(\tfrac12 \operatorname{mean}_i \ln(12\,\sigma_i^2) - R \ln 2\Big).

    Args:
        weight_AN: weight, float64.  All-zero columns are left out of the mean.
        chol: lower Cholesky factor L of the damped input covariance, float64, (N, N) or its
            diagonal (N,).
        rate: Shannon rate R in bits per weight.  At high R the codes cost `SHAPING_LOSS` = 0.2546
            bits more if every column has its own entropy model, and a pooled model costs still
            more.  `rate.search_step` therefore measures the cost instead of trusting this formula.

    Returns:
        The step c, a float64 scalar; the spacing of column i is ``c / chol[i, i]``.
    """
    variance_N = whitened_variance(weight_AN, chol)
    variance_N = variance_N[variance_N > 0]
    return (0.5 * (12 * variance_N).log().mean() - rate * math.log(2)).exp()


def step_for_budget(weight_AN: Tensor, chol: Tensor, rate: float) -> Tensor:
    r"""Return the lattice step at which reverse waterfilling spends `rate` > 0 bits per weight.

    `step_for_rate` allows negative rates for weak columns.  Here, columns below the water level
    :math:`\theta = c^2 / 12` have rate 0, so the step solves

    .. math:: \operatorname{mean}_i \max(0, \tfrac12 \log_2(\sigma_i^2 / \theta)) = R.

    The two agree if all columns are above the level; this one is also valid at low rates.

    Args:
        weight_AN: weight, float64.  All-zero columns count in the mean, with rate 0.
        chol: lower Cholesky factor L of the damped input covariance, float64, (N, N) or its
            diagonal (N,).
        rate: Shannon rate R in bits per weight.

    Returns:
        The step c, a float64 scalar.
    """
    variance_N = whitened_variance(weight_AN, chol)
    log_N = variance_N[variance_N > 0].log().sort(descending=True).values
    count_N = torch.arange(1, len(log_N) + 1, dtype=log_N.dtype, device=log_N.device)
    level_N = (log_N.cumsum(0) - 2 * rate * math.log(2) * variance_N.numel()) / count_N
    # the k columns of largest variance are active if they exceed the level of these k alone
    active = int((level_N < log_N).sum().clamp(min=1))
    return (0.5 * (math.log(12) + level_N[active - 1])).exp()


def rate_at_level(variance_N: Tensor, level: float) -> float:
    r"""Return :math:`\operatorname{mean}_i \max(0, \tfrac12 \log_2(\sigma_i^2 / \theta))`.

    This is the rate, in bits per weight, that reverse waterfilling assigns at a water level.

    Args:
        variance_N: whitened variance of every column.
        level: water level, the distortion of every column above it.
    """
    return float(0.5 * (variance_N / level).clamp(min=1).log2().mean())


def spacings(chol: Tensor, step: Tensor | float) -> Tensor:
    r"""Return :math:`\alpha_i = c / \ell_{ii}`, the lattice spacing of column i in weight units.

    Args:
        chol: lower Cholesky factor L, (N, N) or its diagonal (N,).
        step: lattice step c.
    """
    return step / chol_diagonal(chol)


def shannon_rate(variance_N: Tensor, distortion: float) -> float:
    r"""Return the rate-distortion function of independent Gaussian components.

    By reverse waterfilling, with the level :math:`\theta` that solves
    :math:`\operatorname{mean}_i \min(\sigma_i^2, \theta) = D`,

    .. math:: R(D) = \operatorname{mean}_i \max(0, \tfrac12 \log_2(\sigma_i^2 / \theta)).

    Args:
        variance_N: variances of the components.  For a weight with independent entries of variance
            s, these are s times the eigenvalues of the input covariance.
        distortion: mean square error D per component.

    Returns:
        R(D) in bits per component.
    """
    if distortion <= 0:
        return math.inf
    variance_N = variance_N.double().clamp(min=0).sort().values
    total = distortion * len(variance_N)
    if total >= float(variance_N.sum()):
        return 0.0
    below_N = variance_N.cumsum(0) - variance_N
    above_N = torch.arange(len(variance_N), 0, -1, device=variance_N.device)
    level_N = (total - below_N) / above_N
    # components in ascending order: the first one that is not under water sets the level
    first = int((level_N > variance_N).sum())
    level = level_N[first]
    return rate_at_level(variance_N, level)
