"""Accumulate the second moments of a layer's input, batch by batch.

Shapes: T = tokens, N = in_features, A = out_features, B = tokens of one block.
Units:  sums over tokens; `MomentAccumulator.result` divides them by the number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from watersic_hf.core.moments import CalibrationError, Moments, not_finite

#: Number of tokens whose products are summed in float32 before they are added to the float64 sum.
TOKENS_PER_BLOCK = 2048

#: Minimum number of rows of a symmetric moment that are computed with one matrix product.
PANEL = 256
#: Largest number of entries of a product; larger ones are computed some rows at a time.
ENTRIES = 2**26


class MomentAccumulator:
    """Accumulate the products of a layer's inputs, batch by batch.

    Products are computed in float32 (in float64 if any input is float64) over blocks of
    `TOKENS_PER_BLOCK` tokens, on the device of the inputs; the sums are kept in float64 on
    `device`.  For bfloat16 inputs the bfloat16 units of the processor are used, which loses
    nothing: these products are exact in float32, in which the units sum.

    Args:
        columns: number of input columns N.
        drift: also collect S_H and S_C; every call of `add` then needs the drifted stream.
            Default: False.
        rows_of_residual: number of output rows A, to also collect S_R; every call of `add` then
            needs the residual error.  Default: S_R is not collected.
        device: device of the sums; default: the CPU.
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
        """Add the tokens of one batch.  Leading dimensions of all tensors are flattened.

        Args:
            x_TN: input of the layer in the original model, any float dtype.
            drifted_TN: input for the same tokens in the partly quantized model; required with
                `drift`, otherwise not allowed.
            weight_T: importance of each token, not negative; default: 1.  The products of a token
                are multiplied by it, while the means still divide by the number of tokens, so
                importances with mean 1 keep the scale of the moments.
            residual_TA: error of the residual stream, original minus quantized; required with
                `rows_of_residual`, otherwise not allowed.

        Raises:
            CalibrationError: an entry is NaN or infinite.
            ValueError: shapes disagree, or a stream is missing or unexpected.
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
        # a token weight would have to be rounded to bfloat16
        exact = weight_T is None and all(stream.dtype == torch.bfloat16 for stream in streams)
        given = [t for t in (*streams, weight_T, residual_TA) if t is not None]
        wide = functools.reduce(torch.promote_types, (t.dtype for t in given), torch.float32)
        for start in range(0, len(x_TN), TOKENS_PER_BLOCK):
            block = slice(start, start + TOKENS_PER_BLOCK)
            x_BN = x_TN[block].to(wide)
            seen_BN = x_BN if drifted_TN is None else drifted_TN[block].to(wide)
            importance = None if weight_T is None else weight_T[block].to(wide)
            weighted_BN = seen_BN if importance is None else seen_BN * importance
            with _bfloat16_products(exact):
                self._sum_square(
                    self._cov_NN, x_BN, x_BN if importance is None else x_BN * importance
                )
                if drifted_TN is not None:
                    self._sum_square(self._drifted_cov_NN, seen_BN, weighted_BN)
                    self._sum(self._cross_cov_NN, x_BN, weighted_BN)
            if residual_TA is not None:
                self._sum(self._residual_AN, residual_TA[block].to(wide), weighted_BN)
        self.tokens += len(x_TN)

    def combine(self, add_up: Callable[[Tensor], object]) -> None:
        """Add the sums of the accumulators of other processes, which saw other tokens.

        Args:
            add_up: function that replaces a tensor by its sum over all processes, in place.
        """
        tokens = torch.tensor(self.tokens)
        sums = (self._cov_NN, self._drifted_cov_NN, self._cross_cov_NN, self._residual_AN)
        for total in (tokens, *sums):
            if total is not None:
                add_up(total)
        self.tokens = int(tokens)

    def result(self) -> Moments:
        """Return the means over all tokens; the accumulator is empty and unusable afterwards.

        The means take over the memory of the sums, as both would not always fit.

        Raises:
            CalibrationError: no token was added, or `result` was called before.
        """
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
        rows = max(1, ENTRIES // total.shape[1])
        for panel, left_TP in zip(total.split(rows), left_TA.split(rows, dim=1), strict=True):
            panel.add_((left_TP.T @ right_TN).to(total.device))

    def _panels(self) -> Iterator[slice]:
        """Yield the rows of a symmetric moment, one panel of consecutive rows at a time."""
        width = max(PANEL, self.columns // 8)
        for start in range(0, self.columns, width):
            yield slice(start, min(start + width, self.columns))

    def _sum_square(self, total: Tensor, left_TN: Tensor, right_TN: Tensor) -> None:
        """Add a symmetric product, up to the diagonal panels only; `result` mirrors the rest."""
        for panel in self._panels():
            columns = slice(0, panel.stop)
            self._sum(total[panel, columns], left_TN[:, panel], right_TN[:, columns])

    @staticmethod
    def _optional(
        role: str, stream: Tensor | None, total: Tensor | None, x_TN: Tensor
    ) -> Tensor | None:
        """Check that a stream is given exactly if it has a sum, and return it flattened."""
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
    """Flatten a stream to (T, width), and check that all its entries are finite."""
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


@contextmanager
def _bfloat16_products(exact: bool) -> Iterator[None]:
    """Allow bfloat16 units for float32 products if that is exact; they sum in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
