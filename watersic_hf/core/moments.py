"""Second moments of a layer's input, for one stream of activations or for two.

Shapes: T = tokens, N = in_features, A = out_features.
Units:  every moment is a mean over tokens and is not centred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Number of tokens, per input column, that the moments of a pool are worth; see `pool_fraction`.
POOL_PER_COLUMN = 0.5


class CalibrationError(ValueError):
    """The calibration data is not sufficient for what was requested."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    r"""Second moments of a layer's input: means over tokens, not centred.

    Let x be the input in the original model, :math:`\hat x` the input in the partly quantized model
    and r the error of the residual stream that the layer writes to (original minus quantized):

    .. math:: S_X = E[x x^T], \quad S_H = E[\hat x \hat x^T], \quad S_C = E[x \hat x^T],
              \quad S_R = E[r \hat x^T].

    The moments are in drift mode if S_H and S_C are given.
    """

    cov: Tensor
    """S_X, of shape (N, N); or only its diagonal, of shape (N,), if the inputs are treated as
    uncorrelated."""
    tokens: int
    """Number of tokens behind the means; 0 for moments that were not measured."""
    drifted_cov_NN: Tensor | None = None
    """S_H.  S_H and S_C are either both given or both None."""
    cross_cov_NN: Tensor | None = None
    """S_C; its rows belong to the original input, its columns to the drifted one."""
    residual_AN: Tensor | None = None
    """S_R, which is added to the linear term of the objective."""
    own_tokens: int | None = None
    """For pooled moments: the number of tokens of the part itself, without the pool."""
    pool_fraction: float = 0.0
    """For pooled moments: the weight of the pool, from 0 to 1."""

    def __post_init__(self) -> None:
        columns = self.columns
        if self.cov.shape not in {(columns,), (columns, columns)}:
            raise ValueError(
                f"Moments: cov has shape {tuple(self.cov.shape)}; it must be square or a diagonal."
            )
        if (self.drifted_cov_NN is None) != (self.cross_cov_NN is None):
            raise ValueError("Moments: drifted_cov_NN and cross_cov_NN belong together; give both.")
        for field in ("drifted_cov_NN", "cross_cov_NN"):
            value = getattr(self, field)
            if value is not None and (self.cov.ndim == 1 or value.shape != self.cov.shape):
                raise ValueError(
                    f"Moments: {field} has shape {tuple(value.shape)}, but cov has "
                    f"{tuple(self.cov.shape)}; drift needs square moments of one size."
                )
        residual = self.residual_AN
        if residual is not None and (residual.ndim != 2 or residual.shape[1] != columns):
            raise ValueError(
                f"Moments: residual_AN has shape {tuple(residual.shape)}; it needs {columns} "
                f"columns."
            )

    @classmethod
    def identity(cls, columns: int, *, device: torch.device | str | None = None) -> Moments:
        """Return moments with the identity covariance, for quantization without data.

        Args:
            columns: number of input columns N.
            device: device of the moments; default: the CPU.
        """
        return cls(cov=torch.ones(columns, dtype=torch.float64, device=device), tokens=0)

    @property
    def columns(self) -> int:
        """Number of input columns N."""
        return self.cov.shape[-1]

    @property
    def layer_cov(self) -> Tensor:
        """Moment of the input that the quantized layer receives: S_H in drift mode, else S_X."""
        return self.cov if self.drifted_cov_NN is None else self.drifted_cov_NN

    def or_identity(self) -> Moments:
        """Return these moments, or those of `identity` if the layer's input is zero.

        Such an input says nothing about the weight: every weight gives the same output.
        """
        power_N = self.layer_cov if self.cov.ndim == 1 else self.layer_cov.diagonal()
        # not a number is true, so moments with such entries stay as they are
        if bool(power_N.any()):
            return self
        return Moments.identity(self.columns, device=self.cov.device)

    def linear_term(self, weight_AN: Tensor) -> Tensor:
        """Return C = W S_C + S_R, the correlation of the target output with the layer's input.

        Args:
            weight_AN: weight W of the original layer.
        """
        cross = self.cov if self.cross_cov_NN is None else self.cross_cov_NN
        linear_AN = times(weight_AN, cross)
        return linear_AN if self.residual_AN is None else linear_AN + self.residual_AN

    def with_drift(self, fraction: float) -> Moments:
        r"""Return these moments with only a fraction of the drift correction.

        With fraction f, the result has the moments of the original input
        :math:`\hat x + f \, (x - \hat x)` and of the residual error :math:`f \, r`.  With f = 1 the
        layer compensates for the whole drift of its input, as far as these tokens show it; with
        f = 0 it keeps its own function on the drifted input.  Values in between shrink the
        correction: it is a regression, and the noise that it fits grows with N / T.

        Args:
            fraction: f, from 0 to 1; without drift moments it has no effect.
        """
        if self.cross_cov_NN is None or fraction == 1:
            return self
        rest = 1 - fraction
        cov_NN = rest**2 * self.drifted_cov_NN
        for cross_NN in (self.cross_cov_NN, self.cross_cov_NN.T):
            cov_NN.add_(cross_NN, alpha=fraction * rest)
        residual_AN = self.residual_AN
        return replace(
            self,
            cov=cov_NN.add_(self.cov, alpha=fraction**2),
            cross_cov_NN=self.drifted_cov_NN.lerp(self.cross_cov_NN, fraction),
            residual_AN=None if residual_AN is None else fraction * residual_AN,
        )

    def mix(self, other: Moments, fraction: float) -> Moments:
        """Return ``(1 - fraction) * self + fraction * other``.

        Args:
            other: moments with the same fields as these.
            fraction: weight of `other`, from 0 to 1.
        """

        def mixed(name: str) -> Tensor | None:
            mine, theirs = getattr(self, name), getattr(other, name)
            return None if mine is None else mine.lerp(theirs, fraction)

        return Moments(
            cov=mixed("cov"),
            tokens=self.tokens,
            drifted_cov_NN=mixed("drifted_cov_NN"),
            cross_cov_NN=mixed("cross_cov_NN"),
            residual_AN=mixed("residual_AN"),
        )

    def pooled(self, pool: Moments, fraction: float) -> Moments:
        """Return the weighted mean of these moments and those of a pool.

        The token count of the result is the number of tokens whose plain mean would be as noisy.

        Args:
            pool: moments of all tokens that these are a part of.
            fraction: weight of the pool, as returned by `pool_fraction`.
        """
        noise = (1 - fraction) ** 2 / self.tokens + fraction**2 / pool.tokens
        mixed = replace(self.mix(pool, fraction), tokens=max(1, round(1 / noise)))
        return replace(mixed, own_tokens=self.tokens, pool_fraction=fraction)

    def without_own_tokens(self) -> Moments:
        """Return these moments of a pool as the pooled moments of a part that has no tokens."""
        return replace(self, own_tokens=0, pool_fraction=1.0)

    def scale_rows(self, factor_A1: Tensor) -> Moments:
        """Return the moments of the problem in which output row r is multiplied by a factor.

        Only S_R changes, as the other moments do not depend on the outputs.

        Args:
            factor_A1: factor of every output row.
        """
        if self.residual_AN is None:
            return self
        return replace(self, residual_AN=self.residual_AN * factor_A1)

    def select(self, live_N: Tensor) -> Moments:
        """Return the moments of the live columns, in float64.

        Args:
            live_N: bool, True for the columns to keep.
        """

        def square(moment: Tensor | None) -> Tensor | None:
            if moment is None or bool(live_N.all()):
                return None if moment is None else moment.double()
            return (moment[live_N] if moment.ndim == 1 else moment[live_N][:, live_N]).double()

        residual = self.residual_AN
        return Moments(
            cov=square(self.cov),
            tokens=self.tokens,
            drifted_cov_NN=square(self.drifted_cov_NN),
            cross_cov_NN=square(self.cross_cov_NN),
            residual_AN=None if residual is None else residual[:, live_N].double(),
        )


def pool_fraction(columns: int, tokens: int) -> float:
    r"""Return the weight of the pool for a part of it that only few tokens reach.

    The pool counts as prior knowledge worth :math:`\kappa` tokens, so with n tokens and N columns
    its weight is

    .. math:: \kappa / (n + \kappa), \quad \kappa = k N, \quad k = `POOL_PER_COLUMN`.

    Args:
        columns: number of input columns N.
        tokens: number of tokens n of the part; with 0 the weight is 1.
    """
    prior = POOL_PER_COLUMN * columns
    return prior / (tokens + prior)


def times(matrix_AN: Tensor, moment: Tensor) -> Tensor:
    """Return ``matrix @ moment``, where a 1-D `moment` stands for a diagonal matrix."""
    return matrix_AN * moment if moment.ndim == 1 else matrix_AN @ moment


def factorize_(matrix_NN: Tensor) -> Tensor | None:
    """Compute the Cholesky factor of a symmetric matrix in place.

    Args:
        matrix_NN: matrix to factor; it is overwritten even if the factorization fails.

    Returns:
        The lower Cholesky factor, a view of `matrix_NN`, or None if the matrix is not positive
        definite.
    """
    # LAPACK works in place only on column-major matrices
    chol_NN = matrix_NN.T
    info = torch.empty((), dtype=torch.int32, device=matrix_NN.device)
    torch.linalg.cholesky_ex(chol_NN, out=(chol_NN, info))
    return chol_NN if int(info) == 0 else None


def not_finite(values: Tensor) -> int:
    """Return the number of entries that are NaN or infinite; fast if there are none."""
    # NaN propagates through aminmax, so two numbers tell whether a full count is needed
    if values.numel() == 0 or all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):
        return 0
    return values.numel() - int(torch.isfinite(values).sum())
