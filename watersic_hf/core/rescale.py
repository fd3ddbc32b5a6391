r"""Fit one scale per row and one per column to finished codes by alternating least squares.

Shapes: A = out_features (rows), N = in_features (columns); a 1-D moment is a diagonal.
The weight is :math:`\hat W = T Z \diag(\alpha) G` with T = diag(t), G = diag(g); with A = Z
diag(alpha) the objective is

.. math:: J(t, g) = \operatorname{tr} W S_X W^T - 2 \langle C, T A G \rangle
                    + \langle T A G S, T A G \rangle.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from watersic_hf.core.moments import factorize_, times

MAX_ITERATIONS = 1000
#: Relative change of the objective below which the iteration has converged.
TOLERANCE = 3e-4
#: Relative increase of the objective that is tolerated as a rounding error.
RISE = 1e-6
#: Ridge of both least-squares problems, relative to their mean diagonal.
RIDGE = 1e-8
#: Fractions of the step to the best gains that are tried, in this order.
FRACTIONS = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
#: Range to which the column gains are clipped after a column step.
GAIN_RANGE = (-0.1, 1.5)
#: Number of rows whose codes are converted to float64 at a time.
ROWS_PER_BLOCK = 2048


def rescale(
    codes_AN: Tensor,
    spacing_N: Tensor,
    shrinkage_N: Tensor,
    *,
    cov: Tensor,
    linear_AN: Tensor,
    energy: float,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Return t and g that are at least as good as t = 1 and g = `shrinkage_N`.

    Args:
        codes_AN: codes Z, any integer dtype.
        spacing_N: lattice spacing :math:`\alpha` of every column, float64.
        shrinkage_N: gain :math:`\gamma` of every column, the initial value of g.
        cov: moment S of the input that the quantized layer receives, (N, N) or its diagonal (N,).
        linear_AN: linear term C, from `Moments.linear_term`.
        energy: tr(W S_X W^T).  With a residual term J is off by a constant, and may be negative.
        shift: value that is added to the diagonal of S; default: 0.

    Returns:
        The row scales t, normalized so that the mean of abs(t) is 1, and the column gains g.
    """
    problem = _Problem(codes_AN, spacing_N, cov, linear_AN, energy, shift)
    row_A = torch.ones(codes_AN.shape[0], dtype=torch.float64, device=codes_AN.device)
    gain_N = shrinkage_N.double()
    value = problem.value(row_A, *problem.row_terms(gain_N))
    for _ in range(MAX_ITERATIONS):
        new_gain_N, linear_A, power_A = _better_gains(problem, row_A, gain_N, value)
        new_row_A = linear_A / (power_A + _ridge(power_A))
        new_value = problem.value(new_row_A, linear_A, power_A)
        if new_value > _allowed(value):
            break
        mean = new_row_A.abs().mean()
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        row_A, gain_N = new_row_A / mean, new_gain_N * mean
        converged = abs(new_value - value) <= TOLERANCE * abs(value)
        value = new_value
        if converged:
            break
    return row_A, gain_N


def _better_gains(
    problem: _Problem, row_A: Tensor, gain_N: Tensor, value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best column gains for the given row scales, and their row terms.

    If rounding or clipping to `GAIN_RANGE` makes them worse than `gain_N`, the step is shortened.
    """
    solution_N = problem.best_gains(row_A)
    for fraction in FRACTIONS:
        trial_N = torch.lerp(gain_N, solution_N, fraction).clamp(*GAIN_RANGE)
        terms = problem.row_terms(trial_N)
        if problem.value(row_A, *terms) <= _allowed(value):
            return trial_N, *terms
    return gain_N, *problem.row_terms(gain_N)


class _Problem:
    """The least-squares problems of the row scales and of the column gains, for fixed codes."""

    def __init__(
        self,
        codes_AN: Tensor,
        spacing_N: Tensor,
        cov: Tensor,
        linear_AN: Tensor,
        energy: float,
        shift: float,
    ) -> None:
        self.codes_AN = codes_AN
        self.spacing_N = spacing_N
        self.cov = cov
        self.linear_AN = linear_AN
        self.energy = energy
        self.shift = shift

    def best_gains(self, row_A: Tensor) -> Tensor:
        r"""Solve :math:`(F + \rho I) g = b` with F = S o (A^T T^2 A), b = diag(A^T T C)."""
        gram, linear_N = self._column_terms(row_A)
        if gram.ndim == 1:
            return linear_N / gram
        # F is positive semidefinite by the Schur product theorem
        chol_NN = factorize_(gram)
        if chol_NN is None:
            # rounding has made F indefinite; it was overwritten, so build it again
            return torch.linalg.solve(self._column_terms(row_A)[0], linear_N)
        half_N1 = torch.linalg.solve_triangular(chol_NN, linear_N[:, None], upper=False)
        return torch.linalg.solve_triangular(chol_NN.T, half_N1, upper=True)[:, 0]

    def _column_terms(self, row_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return F with its ridge, and b."""
        gram = torch.zeros_like(self.cov)
        linear_N = torch.zeros_like(self.spacing_N)
        for rows, scaled_BN in self._scaled_rows():
            scaled_BN = scaled_BN * row_A[rows, None]
            linear_N += (scaled_BN * self.linear_AN[rows]).sum(0)
            if gram.ndim == 1:
                gram += scaled_BN.square().sum(0)
            else:
                gram.addmm_(scaled_BN.T, scaled_BN)
        diagonal = gram if gram.ndim == 1 else gram.diagonal()
        shift_N = self.shift * diagonal
        gram *= self.cov
        diagonal += shift_N
        diagonal += _ridge(diagonal)
        return gram, linear_N

    def row_terms(self, gain_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return <C_r, M_r> and M_r S M_r^T for every row r of M = A diag(g)."""
        linear_A = torch.empty(len(self.codes_AN), dtype=torch.float64, device=gain_N.device)
        power_A = torch.empty_like(linear_A)
        for rows, scaled_BN in self._scaled_rows():
            scaled_BN = scaled_BN * gain_N
            linear_A[rows] = (scaled_BN * self.linear_AN[rows]).sum(1)
            seen_BN = times(scaled_BN, self.cov).add_(scaled_BN, alpha=self.shift)
            power_A[rows] = (seen_BN * scaled_BN).sum(1)
        return linear_A, power_A

    def value(self, row_A: Tensor, linear_A: Tensor, power_A: Tensor) -> float:
        """Return the objective J, given the row terms."""
        return self.energy + float((row_A * power_A - 2 * linear_A) @ row_A)

    def _scaled_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows, and A = Z diag(alpha) for them."""
        for start in range(0, len(self.codes_AN), ROWS_PER_BLOCK):
            rows = slice(start, start + ROWS_PER_BLOCK)
            yield rows, self.codes_AN[rows] * self.spacing_N


def _allowed(value: float) -> float:
    """Return the largest objective that counts as no worse than `value`."""
    return value + RISE * abs(value)


def _ridge(diagonal: Tensor) -> Tensor:
    """Return a ridge relative to the mean diagonal, and positive even if the diagonal is zero."""
    return (RIDGE * diagonal.abs().mean()).clamp(min=torch.finfo(torch.float64).tiny)
