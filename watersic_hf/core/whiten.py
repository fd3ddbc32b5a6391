"""Transform weights to the whitened domain, in which all columns have the same lattice step.

Shapes: A = out_features (rows), N = in_features (columns), T = tokens; a 1-D moment or factor is a
        diagonal.
Units:  moments are means over tokens; `damping` is relative to the mean of the moment's diagonal.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from watersic_hf.core.inplace import factorize_lower_, restore_lower_, select_
from watersic_hf.core.moments import CalibrationError, Moments, factorize_
from watersic_hf.core.waterfill import whitened_variance

logger = logging.getLogger(__name__)

#: A column is dead if its mean square is below this fraction of the median over the columns.
DEAD_FRACTION = 1e-3
#: Smallest damping, the value of the paper; used for moments of very many tokens.
LEAST_DAMPING = 1e-4
#: Damping at one column per token, relative to the median mean square of a column.
DAMPING_PER_COLUMN = 4.0
#: Number of times that a failed factorization is retried, each time with ten times the damping.
RETRIES = 3


def live_columns(cov: Tensor) -> Tensor:
    """Return which columns carry signal: a mean square of at least `DEAD_FRACTION` of the median.

    The threshold is relative to the median and not to the mean, because the inputs of gated MLPs
    are so heavy-tailed that a fraction of the mean would remove most of their columns.  If all
    inputs are zero no column matters less than another, and all are kept.

    Args:
        cov: second moment S of the inputs, (N, N) or its diagonal (N,).

    Returns:
        Bool (N,), True for the columns to keep.
    """
    power_N = cov if cov.ndim == 1 else cov.diagonal()
    if not bool(power_N.any()):
        return torch.ones_like(power_N, dtype=torch.bool)
    return (power_N >= DEAD_FRACTION * power_N.abs().median()) & (power_N > 0)


def damped_cholesky(
    cov: Tensor, damping: float, *, tokens: int, name: str, in_place: bool = False
) -> tuple[Tensor, float]:
    r"""Factor :math:`L L^T = S + \delta I` with :math:`\delta = d \operatorname{mean}(\diag S)`.

    Args:
        cov: second moment S, float64.  For a 1-D S the factor is the 1-D square root.
        damping: damping d, relative to the mean of the diagonal.
        tokens: number of calibration tokens behind S, for the error message.
        name: name of the layer, for messages.
        in_place: whether L takes the lower triangle of a matrix S, so that no copy is made.  The
            entries of S above the diagonal stay where they are; `restore_lower_` undoes this.

    Returns:
        The lower Cholesky factor L, and the damping that was used: `damping`, or 10, 100 or 1000
        times as much after retries.

    Raises:
        CalibrationError: S is not positive definite even with the strongest damping.
    """
    for attempt in range(RETRIES + 1):
        used = damping * 10**attempt
        shift = damping_shift(cov, used)
        if cov.ndim == 1:
            return (cov + shift).sqrt(), used
        chol_NN = _shifted_factor_(cov, shift) if in_place else _shifted_factor(cov, shift)
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


def _shifted_factor(cov_NN: Tensor, shift: Tensor) -> Tensor | None:
    """Return the Cholesky factor of S + shift I; None if that is not positive definite."""
    damped_NN = cov_NN.clone()
    damped_NN.diagonal().add_(shift)
    return factorize_(damped_NN)


def _shifted_factor_(cov_NN: Tensor, shift: Tensor) -> Tensor | None:
    """Do the same in the lower triangle of S, which is restored if that fails."""
    diagonal_N = cov_NN.diagonal().clone()
    cov_NN.diagonal().add_(shift)
    if factorize_lower_(cov_NN):
        return cov_NN
    restore_lower_(cov_NN, diagonal_N)
    return None


def damping_for(cov: Tensor, tokens: int) -> float:
    """Return the default damping for second moments that were measured on few or many tokens.

    The noise of the moments grows with N / T, so the damping does too, with a minimum of 1e-4: the
    value of the paper, which uses millions of tokens.  The value that is added to the diagonal is
    proportional to the median over the columns, as a few massive columns, which can hold nearly all
    the power, would raise the mean and damp the other columns away.

    Args:
        cov: second moment S, (N, N) or its diagonal (N,).
        tokens: number of calibration tokens T; with 0, for moments that were not measured, the
            minimum is returned.

    Returns:
        The damping d, relative to the mean of the diagonal, as `damped_cholesky` takes it.
    """
    power_N = cov if cov.ndim == 1 else cov.diagonal()
    if not tokens or not len(power_N):
        return LEAST_DAMPING
    added = DAMPING_PER_COLUMN * len(power_N) / tokens * float(power_N.median())
    return max(LEAST_DAMPING, added / float(power_N.mean()))


def damping_shift(cov: Tensor, damping: float) -> Tensor:
    r"""Return :math:`\delta`, the value that a relative damping adds to every diagonal entry."""
    return damping * (cov if cov.ndim == 1 else cov.diagonal()).mean()


def whitened_target(weight_AN: Tensor, moments: Moments, chol: Tensor, damping: float) -> Tensor:
    r"""Return Y, the weight in the whitened domain that the lattice codes approximate.

    .. math:: Y = (W S_C + \delta W + S_R) L^{-T}

    in drift mode and :math:`Y = W L + S_R L^{-T}` otherwise; the two agree if both streams are
    equal.  The damping :math:`\delta` multiplies W, so it pulls towards the original weight and not
    towards zero.

    Args:
        weight_AN: weight W, float64, live columns only.
        moments: moments of the live columns.
        chol: lower Cholesky factor L of the damped ``moments.layer_cov``.
        damping: relative damping with which `chol` was computed.

    Returns:
        Y (A, N), as a view whose columns are contiguous: the layout in which `zsic` works.
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
    """The whitening of one layer's inputs, for cost estimates before the layer is quantized."""

    live_N: Tensor
    """Bool, True for the columns that carry signal; the others are left out."""

    chol: Tensor
    """Lower Cholesky factor of the damped moment of the live columns."""

    @classmethod
    def of(
        cls, moments: Moments, damping: float | None, *, name: str, in_place: bool = False
    ) -> Whitening:
        """Return the whitening of a layer's inputs.

        Args:
            moments: second moments of the inputs.
            damping: damping relative to the mean of the diagonal; None: that of `damping_for`.
            name: name of the layer, for messages.
            in_place: whether the factor takes the memory of the moments, which are then unusable.

        Raises:
            CalibrationError: the moments cannot be factored even with the strongest damping.
        """
        live_N = live_columns(moments.cov)
        if in_place and moments.cov.ndim == 2:
            moments = replace(moments, cov=select_(moments.cov, live_N))
        else:
            moments = moments.select(live_N)
        live_moments = moments.or_identity()
        cov, tokens = live_moments.layer_cov, live_moments.tokens
        damping = damping or damping_for(cov, tokens)
        chol, _ = damped_cholesky(cov, damping, tokens=tokens, name=name, in_place=in_place)
        return cls(live_N, chol)

    def variances(self, weight_AN: Tensor) -> Tensor:
        """Return the whitened variance of every column of a weight, (N,); 0 for dead columns.

        They determine the rate that the layer needs for a distortion; see
        `waterfill.rate_at_level`.

        Args:
            weight_AN: weight with all columns, any float dtype.
        """
        variance_N = torch.zeros_like(self.live_N, dtype=torch.float64)
        variance_N[self.live_N] = whitened_variance(weight_AN[:, self.live_N].double(), self.chol)
        return variance_N

    def leverages(self, x_TN: Tensor) -> Tensor:
        r"""Return the leverage :math:`x^T (S + \delta I)^{-1} x / N` of every token, (T,).

        With a step c, the errors of the weight have the covariance :math:`c^2 / 12 \cdot I` in the
        whitened domain.  A token's output then has the mean square error :math:`N c^2 / 12` times
        its leverage, in every row.  Without damping, the mean leverage over the calibration tokens
        is 1.  They are computed in float32, as weights of tokens need no more.

        Args:
            x_TN: inputs of the layer with all columns, any float dtype.
        """
        live_TN, chol = x_TN[:, self.live_N].float(), self.chol.float()
        if chol.ndim == 1:
            whitened_NT = (live_TN / chol).T
        else:
            whitened_NT = torch.linalg.solve_triangular(chol, live_TN.T, upper=False)
        return whitened_NT.square_().sum(0, dtype=torch.float64) / max(1, len(whitened_NT))
