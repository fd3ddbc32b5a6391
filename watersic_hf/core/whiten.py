"""Go from weights and moments to the domain in which every column has the same lattice step.

Shapes: A = out_features (rows), N = in_features (columns); a 1-D moment or factor is a diagonal.
Units:  moments are means over tokens; `damping` is relative to the mean of the moment's diagonal.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.moments import CalibrationError, Moments, factorize_
from watersic_hf.core.waterfill import whitened_variance

logger = logging.getLogger(__name__)

#: A column is dead when its mean square is below this fraction of the median column's.
DEAD_FRACTION = 1e-3
#: Damping of moments that were measured on many tokens; the paper's.
LEAST_DAMPING = 1e-4
#: Damping for every column there is per token, relative to the median power of a column.
DAMPING_PER_COLUMN = 4.0
#: How often a failed factorization is tried again, each time with ten times the damping.
RETRIES = 3


def live_columns(cov: Tensor) -> Tensor:
    """Return which columns carry signal: mean square at least `DEAD_FRACTION` of the median.

    The median and not the mean, because the inputs of gated MLPs are so heavy-tailed that a
    threshold at a fraction of the mean would remove most of their columns.
    """
    power_N = cov if cov.ndim == 1 else cov.diagonal()
    return (power_N >= DEAD_FRACTION * power_N.abs().median()) & (power_N > 0)


def damped_cholesky(cov: Tensor, damping: float, *, tokens: int, name: str) -> tuple[Tensor, float]:
    r"""Factor :math:`L L^T = S + \delta I` with :math:`\delta = d \operatorname{mean}(\diag S)`.

    Args:
        cov: S, float64; for a 1-D S the factor is the 1-D square root.
        damping: d.
        tokens: calibration tokens behind S, for the error message.
        name: layer, for messages.

    Returns:
        L and the damping that was used: `damping`, or up to 1000 times as much after retries.

    Raises:
        CalibrationError: S is not positive definite even with the strongest damping.
    """
    for attempt in range(RETRIES + 1):
        used = damping * 10**attempt
        shift = damping_shift(cov, used)
        if cov.ndim == 1:
            return (cov + shift).sqrt(), used
        damped_NN = cov.clone()
        damped_NN.diagonal().add_(shift)
        chol_NN = factorize_(damped_NN)
        if chol_NN is not None:
            return chol_NN, used
        if attempt < RETRIES:
            logger.warning(
                "%s: the input covariance is not positive definite with damping %g; trying %g.",
                name,
                used,
                10 * used,
            )
    n = cov.shape[0]
    raise CalibrationError(
        f"{name}: the input covariance ({n} x {n}) is not positive definite after damping "
        f"{used:g}; {tokens} calibration tokens cannot span {n} columns. Use at least {2 * n} "
        f"tokens, or raise `damping` (1e-3 is usually enough)."
    )


def damping_for(cov: Tensor, tokens: int) -> float:
    """Return the damping for second moments that were measured on `tokens`.

    The noise of the moments grows with columns over tokens; the paper's 1e-4 belongs to its
    millions of tokens, and is the least there is.  What is added to the diagonal is measured by the
    median column: a few massive ones, which can have nearly all of the power, do not raise it.
    """
    power_N = cov if cov.ndim == 1 else cov.diagonal()
    if not tokens or not len(power_N):
        return LEAST_DAMPING
    added = DAMPING_PER_COLUMN * len(power_N) / tokens * float(power_N.median())
    return max(LEAST_DAMPING, added / float(power_N.mean()))


def damping_shift(cov: Tensor, damping: float) -> Tensor:
    r"""Return :math:`\delta`, what the damping adds to every diagonal entry."""
    return damping * (cov if cov.ndim == 1 else cov.diagonal()).mean()


def whitened_target(weight_AN: Tensor, moments: Moments, chol: Tensor, damping: float) -> Tensor:
    r"""Return Y, the point that the lattice codes shall approach.

    .. math:: Y = (W S_C + \delta W + S_R) L^{-T}

    in drift mode and :math:`Y = W L + S_R L^{-T}` otherwise; the two agree when the streams do.
    The damping multiplies W: it pulls towards the original weight, not towards zero.

    Args:
        weight_AN: weight, float64, live columns only (as are the moments).
        moments: S_C and S_R.
        chol: lower Cholesky factor L of the damped ``moments.layer_cov``.
        damping: the damping in `chol`.

    Returns:
        Y as an (A, N) view whose columns are contiguous, the layout that `zsic` works in.
    """
    if chol.ndim == 1:
        target_AN = weight_AN * chol
        if moments.residual_AN is not None:
            target_AN += moments.residual_AN / chol
        return target_AN.T.contiguous().T
    if moments.cross_cov_NN is not None:
        linear_AN = moments.linear_term(weight_AN)
        linear_AN.add_(weight_AN * damping_shift(moments.layer_cov, damping))
        target_NA = torch.linalg.solve_triangular(chol, linear_AN.T, upper=False)
    else:
        target_NA = chol.T @ weight_AN.T
        if moments.residual_AN is not None:
            target_NA += torch.linalg.solve_triangular(chol, moments.residual_AN.T, upper=False)
    return target_NA.contiguous().T


@dataclass(frozen=True)
class Whitening:
    """The domain of one layer's inputs in which every column has the same lattice step.

    Source: the whitening of WaterSIC (method of arXiv 2603.04956), here to ask what steps would
    cost before anything is quantized.
    """

    live_N: Tensor
    """Which columns carry signal; the others take no part."""

    chol: Tensor
    """Factor of the damped moment of the live columns."""

    @classmethod
    def of(cls, moments: Moments, damping: float | None, *, name: str) -> Whitening:
        """The whitening of a layer's inputs.

        Args:
            moments: of the inputs.
            damping: as that of `damped_cholesky`; None is that of `damping_for`.
            name: layer, for messages.

        Raises:
            CalibrationError: the moments cannot be factored.
        """
        live_N = live_columns(moments.cov)
        cov = moments.select(live_N).layer_cov
        damping = damping or damping_for(cov, moments.tokens)
        chol, _ = damped_cholesky(cov, damping, tokens=moments.tokens, name=name)
        return cls(live_N, chol)

    def variances(self, weight_AN: Tensor) -> Tensor:
        """Variance of every column of a weight, (N,); 0 for those that are not live.

        The rate that a layer needs for a distortion depends on nothing else; see
        `waterfill.rate_at_level`.
        """
        variance_N = torch.zeros_like(self.live_N, dtype=torch.float64)
        variance_N[self.live_N] = whitened_variance(weight_AN[:, self.live_N].double(), self.chol)
        return variance_N

    def leverages(self, x_TN: Tensor) -> Tensor:
        r"""What every token feels of a step: :math:`x^T (S + \delta I)^{-1} x / N`, (T,).

        A step c makes errors in the weight that are white in this domain.  In the output of a token
        they are :math:`c^2 / 12` times N times its leverage: its share in the moments, for which
        the errors were shaped.  The mean over tokens is 1 where nothing is damped.
        """
        live_TN = x_TN[:, self.live_N].double()
        if self.chol.ndim == 1:
            white_NT = (live_TN / self.chol).T
        else:
            white_NT = torch.linalg.solve_triangular(self.chol, live_TN.T, upper=False)
        return white_NT.square().sum(0) / max(1, len(white_NT))
