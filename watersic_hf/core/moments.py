"""Collect the second moments of a layer's input, over one or two streams of activations.

Shapes: T = tokens, N = in_features, A = out_features.
Units:  every moment is a mean over tokens and is not centred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Tokens whose products are summed in float32 before they enter the float64 sum.
TOKENS_PER_BLOCK = 1024

#: Rows of a symmetric moment that are summed at a time, at least.
PANEL = 256

#: Tokens that the moments of a pool count for, for every column; see `pool_share`.
POOL_PER_COLUMN = 0.5


class CalibrationError(ValueError):
    """The calibration data cannot support what was asked of it."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    r"""Second moments of a layer's input, not centred, means over tokens.

    With x the input in the original model, :math:`\hat x` the input in the partly quantized one and
    r the error of the residual stream that the layer writes to:

    .. math:: S_X = E[x x^T], \quad S_H = E[\hat x \hat x^T], \quad S_C = E[x \hat x^T],
              \quad S_R = E[r \hat x^T].

    Drift mode is on when both S_H and S_C are given.
    """

    cov: Tensor
    """S_X: (N, N), or (N,) when only a diagonal is known; inputs then count as uncorrelated."""
    tokens: int
    """Tokens behind the means; 0 for moments that were not measured."""
    drifted_cov_NN: Tensor | None = None
    """S_H, given together with S_C or not at all."""
    cross_cov_NN: Tensor | None = None
    """S_C; rows index the original input, columns the drifted one."""
    residual_AN: Tensor | None = None
    """S_R; added to the linear term of the objective."""
    own_tokens: int | None = None
    """Tokens of the part itself, in moments that are pooled."""
    pool_share: float = 0.0
    """Share of the pool in moments that are pooled."""

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
        """Return the moments of white inputs, for quantization without data."""
        return cls(cov=torch.ones(columns, dtype=torch.float64, device=device), tokens=0)

    @property
    def columns(self) -> int:
        """Number of input columns N."""
        return self.cov.shape[-1]

    @property
    def layer_cov(self) -> Tensor:
        """Moment of what the layer will really see: S_H in drift mode, S_X otherwise."""
        return self.cov if self.drifted_cov_NN is None else self.drifted_cov_NN

    def linear_term(self, weight_AN: Tensor) -> Tensor:
        """Return C = W S_C + S_R, the correlation of the wanted output with the layer's input."""
        cross = self.cov if self.cross_cov_NN is None else self.cross_cov_NN
        linear_AN = times(weight_AN, cross)
        return linear_AN if self.residual_AN is None else linear_AN + self.residual_AN

    def with_drift(self, share: float) -> Moments:
        r"""Return these moments with only a share of the drift correction.

        They are those of an original input :math:`\hat x + \text{share} \, (x - \hat x)` and of
        that share of r.  With 1 the layer makes up for all of the drift of its input, as far as
        these tokens tell; with 0 it keeps its function on the drifted input.  Shares between are a
        shrinkage: the correction is a regression, and what it fits to noise grows with N over the
        tokens.
        """
        if self.cross_cov_NN is None or share == 1:
            return self
        rest = 1 - share
        cov_NN = rest**2 * self.drifted_cov_NN
        for cross_NN in (self.cross_cov_NN, self.cross_cov_NN.T):
            cov_NN.add_(cross_NN, alpha=share * rest)
        residual_AN = self.residual_AN
        return replace(
            self,
            cov=cov_NN.add_(self.cov, alpha=share**2),
            cross_cov_NN=self.drifted_cov_NN.lerp(self.cross_cov_NN, share),
            residual_AN=None if residual_AN is None else share * residual_AN,
        )

    def mix(self, other: Moments, share: float) -> Moments:
        """Return ``(1 - share) * self + share * other``; both have the same fields."""

        def mixed(name: str) -> Tensor | None:
            mine, theirs = getattr(self, name), getattr(other, name)
            return None if mine is None else mine.lerp(theirs, share)

        return Moments(
            cov=mixed("cov"),
            tokens=self.tokens,
            drifted_cov_NN=mixed("drifted_cov_NN"),
            cross_cov_NN=mixed("cross_cov_NN"),
            residual_AN=mixed("residual_AN"),
        )

    def pooled(self, pool: Moments, share: float) -> Moments:
        """Return these moments with a share of those of a pool, as of `pool_share`.

        Both are means over tokens; the result counts for as many tokens as would give a mean with
        as little noise.
        """
        noise = (1 - share) ** 2 / self.tokens + share**2 / pool.tokens
        mixed = replace(self.mix(pool, share), tokens=max(1, round(1 / noise)))
        return replace(mixed, own_tokens=self.tokens, pool_share=share)

    def for_none(self) -> Moments:
        """Return these moments of a pool as those of a part that no token reaches."""
        return replace(self, own_tokens=0, pool_share=1.0)

    def scale_rows(self, factor_A1: Tensor) -> Moments:
        """Return the moments of a problem whose outputs, row by row, are `factor_A1` times these.

        Only S_R has to do with outputs.
        """
        if self.residual_AN is None:
            return self
        return replace(self, residual_AN=self.residual_AN * factor_A1)

    def select(self, live_N: Tensor) -> Moments:
        """Return the float64 moments of the columns where `live_N` is True."""

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


def pool_share(columns: int, tokens: int) -> float:
    r"""Return the share of a pool in the moments of a part of it that is known by few tokens.

    .. math:: \kappa / (n + \kappa), \quad \kappa = k N

    for n tokens and N columns: the pool is prior knowledge worth :math:`\kappa` tokens.  With no
    token all is the pool's.
    """
    prior = POOL_PER_COLUMN * columns
    return prior / (tokens + prior)


def times(matrix_AN: Tensor, moment: Tensor) -> Tensor:
    """Return ``matrix @ moment``, where a 1-D `moment` stands for a diagonal matrix."""
    return matrix_AN * moment if moment.ndim == 1 else matrix_AN @ moment


def factorize_(matrix_NN: Tensor) -> Tensor | None:
    """Factor a symmetric positive definite matrix in its own memory.

    Args:
        matrix_NN: overwritten, also when it cannot be factored.

    Returns:
        The lower Cholesky factor, a view of `matrix_NN`; None if that was not positive definite.
    """
    # by columns, as LAPACK works in place
    chol_NN = matrix_NN.T
    info = torch.empty((), dtype=torch.int32, device=matrix_NN.device)
    torch.linalg.cholesky_ex(chol_NN, out=(chol_NN, info))
    return chol_NN if int(info) == 0 else None


class MomentAccumulator:
    """Sum the products of a layer's inputs as they stream by.

    Products are taken in float32 (float64 for float64 inputs) over blocks of tokens, on the device
    of the inputs; the sums are float64 and live on `device`.  Products of bfloat16 inputs are
    exact in the processor's bfloat16 units, which sum them in float32, and are taken there.

    Args:
        columns: N.
        drift: also collect S_H and S_C; every `add` then needs the drifted stream.
        rows_of_residual: A, when S_R is wanted; every `add` then needs the residual error.
        device: of the sums.
    """

    def __init__(
        self,
        columns: int,
        *,
        drift: bool = False,
        rows_of_residual: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        def zeros(rows: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=device)

        self.columns = columns
        self.tokens = 0
        self._cov_NN = zeros(columns)
        self._drifted_cov_NN = zeros(columns) if drift else None
        self._cross_cov_NN = zeros(columns) if drift else None
        self._residual_AN = None if rows_of_residual is None else zeros(rows_of_residual)

    def add(
        self,
        x_TN: Tensor,
        drifted_TN: Tensor | None = None,
        *,
        weight_T: Tensor | None = None,
        residual_TA: Tensor | None = None,
    ) -> None:
        """Add the tokens of one batch; leading dimensions are flattened.

        Args:
            x_TN: input in the original model.
            drifted_TN: input of the same tokens in the partly quantized model (drift only).
            weight_T: importance of each token, default 1.  It multiplies the token's products; the
                means still divide by the number of tokens, so importances of mean 1 keep the scale.
            residual_TA: error of the residual stream, original minus quantized.

        Raises:
            CalibrationError: an entry is NaN or infinite.
            ValueError: the shapes disagree, or a stream is missing or not expected.
        """
        x_TN = _tokens("x", x_TN, self.columns)
        drifted_TN = self._optional("drifted", drifted_TN, self._drifted_cov_NN, x_TN)
        residual_TA = self._optional("residual", residual_TA, self._residual_AN, x_TN)
        if weight_T is not None:
            weight_T = _tokens("weight", weight_T.reshape(-1, 1), 1)
            if len(weight_T) != len(x_TN) or bool((weight_T < 0).any()):
                raise ValueError(
                    f"MomentAccumulator: token weights must be non-negative, one for each of the "
                    f"{len(x_TN)} tokens; {len(weight_T)} were given."
                )
        streams = [x_TN] if drifted_TN is None else [x_TN, drifted_TN]
        exact = weight_T is None and all(stream.dtype == torch.bfloat16 for stream in streams)
        for start in range(0, len(x_TN), TOKENS_PER_BLOCK):
            block = slice(start, start + TOKENS_PER_BLOCK)
            x_BN = _widen(x_TN[block])
            seen_BN = x_BN if drifted_TN is None else _widen(drifted_TN[block])
            importance = None if weight_T is None else _widen(weight_T[block])
            weighted_BN = seen_BN if importance is None else seen_BN * importance
            with _narrow_products(exact):
                self._sum_square(
                    self._cov_NN, x_BN, x_BN if importance is None else x_BN * importance
                )
                if drifted_TN is not None:
                    self._sum_square(self._drifted_cov_NN, seen_BN, weighted_BN)
                    self._sum(self._cross_cov_NN, x_BN, weighted_BN)
            if residual_TA is not None:
                self._sum(self._residual_AN, _widen(residual_TA[block]), weighted_BN)
        self.tokens += len(x_TN)

    def combine(self, add_up: Callable[[Tensor], object]) -> None:
        """Take in what other accumulators, of other tokens, have summed.

        Args:
            add_up: sums a tensor over all of them, in place.
        """
        tokens = torch.tensor(self.tokens)
        sums = (self._cov_NN, self._drifted_cov_NN, self._cross_cov_NN, self._residual_AN)
        for total in (tokens, *sums):
            if total is not None:
                add_up(total)
        self.tokens = int(tokens)

    def result(self) -> Moments:
        """Return the means over all tokens, in the memory of the sums: the end of this object."""
        if self.tokens == 0:
            raise CalibrationError(
                "MomentAccumulator: no token was added, so there are no moments. Feed at least one "
                "batch, or use Moments.identity to quantize without data."
            )
        sums = {
            "cov": self._cov_NN,
            "drifted_cov_NN": self._drifted_cov_NN,
            "cross_cov_NN": self._cross_cov_NN,
            "residual_AN": self._residual_AN,
        }
        for name in ("cov", "drifted_cov_NN"):
            total = sums[name]
            for panel in () if total is None else self._panels():
                total[: panel.start, panel] = total[panel, : panel.start].T
        tokens, self.tokens = self.tokens, 0
        self._cov_NN = self._drifted_cov_NN = self._cross_cov_NN = self._residual_AN = None
        means = {n: None if total is None else total.div_(tokens) for n, total in sums.items()}
        return Moments(tokens=tokens, **means)

    @staticmethod
    def _sum(total: Tensor, left_TA: Tensor, right_TN: Tensor) -> None:
        total.add_((left_TA.T @ right_TN).to(total.device))

    def _panels(self) -> Iterator[slice]:
        """Rows of the symmetric moments, some at a time."""
        width = max(PANEL, self.columns // 8)
        for start in range(0, self.columns, width):
            yield slice(start, min(start + width, self.columns))

    def _sum_square(self, total: Tensor, left_TN: Tensor, right_TN: Tensor) -> None:
        """Add a symmetric product up to its diagonal panels; `result` mirrors the rest."""
        for panel in self._panels():
            columns = slice(0, panel.stop)
            self._sum(total[panel, columns], left_TN[:, panel], right_TN[:, columns])

    @staticmethod
    def _optional(
        role: str, stream: Tensor | None, total: Tensor | None, x_TN: Tensor
    ) -> Tensor | None:
        if (stream is None) != (total is None):
            wanted = "is needed by" if stream is None else "was not announced to"
            raise ValueError(f"MomentAccumulator: the {role} stream {wanted} this accumulator.")
        if stream is None:
            return None
        stream = _tokens(role, stream, total.shape[1] if role == "drifted" else total.shape[0])
        if len(stream) != len(x_TN):
            raise ValueError(
                f"MomentAccumulator: {role} has {len(stream)} tokens, but x has {len(x_TN)}."
            )
        return stream


def _tokens(role: str, stream: Tensor, width: int) -> Tensor:
    """Flatten a stream to (T, width) and refuse what is not a number."""
    if not stream.is_floating_point() or stream.shape[-1] != width:
        raise ValueError(
            f"MomentAccumulator: {role} has shape {tuple(stream.shape)} and dtype {stream.dtype}; "
            f"it needs a float dtype and {width} entries per token."
        )
    stream = stream.detach().reshape(-1, width)
    bad = not_finite(stream)
    if bad:
        raise CalibrationError(
            f"MomentAccumulator: {bad} of {stream.numel()} entries of {role} are NaN or infinite. "
            f"Drop the batch, or run the model in a wider dtype (bfloat16 or float32)."
        )
    return stream


def not_finite(values: Tensor) -> int:
    """How many entries are NaN or infinite; fast where there are none."""
    if values.numel() == 0 or all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):
        return 0
    return values.numel() - int(torch.isfinite(values).sum())


def _widen(stream: Tensor) -> Tensor:
    return stream.to(torch.promote_types(stream.dtype, torch.float32))


@contextmanager
def _narrow_products(exact: bool) -> Iterator[None]:
    """Let float32 products be taken in bfloat16, summed in float32, where that loses nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
