r"""Moments of layers with more inputs than outputs, multiplied by their weights on the way.

Shapes: T = tokens, N = in_features, A = out_features, K = live columns, B = tokens or rows of one
        block.
Units:  every moment is a mean over tokens and is not centred.

A layer is quantized with S_H, but the other two moments of `Moments` appear only in products with
its weight: the linear term W S_C and the energy tr(W S_X W^T).  With the output y = W x of the
original layer, which that model has computed anyway, these are

.. math:: W S_C = E[y \hat x^T], \quad (W S_X W^T)_{rr} = E[y_r^2].

A layer of 28,672 inputs and 8,192 outputs needs one N x N matrix instead of three, and a layer with
few outputs a fraction of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.accumulator import TOKENS_PER_BLOCK, MomentAccumulator
from watersic_hf.core.inplace import restore_lower_, select_
from watersic_hf.core.whiten import live_columns

#: Number of inputs from which no copy of a square moment is made that can be avoided.
WIDE = 16385
#: Inputs per output from which they are collected in this form, as it is much faster.
INPUTS_PER_OUTPUT = 2
#: Number of rows of a weight that are converted to another dtype at a time.
ROWS_PER_BLOCK = 1024


def is_large(columns: int) -> bool:
    """Return whether the square moments of so many inputs must not be copied, for their memory."""
    return columns >= WIDE


def is_wide(rows: int, columns: int) -> bool:
    """Return whether a layer that is alone with its input is quantized with `ProjectedMoments`.

    Args:
        rows: number of its output rows.
        columns: number of its inputs.
    """
    return columns >= INPUTS_PER_OUTPUT * rows or (is_large(columns) and columns >= rows)


@dataclass(kw_only=True)
class ProjectedMoments:
    """Second moments of the input of one layer, for one quantization; see `quantize_wide`.

    Columns that carry no signal are left out of the matrices, but not out of the outputs, so the
    live columns also compensate for them.
    """

    live_N: Tensor
    """Bool, True for the columns that carry signal."""
    cov_KK: Tensor
    """S_H, or S_X if there is only one stream."""
    linear_AK: Tensor | None
    """C = W S_C + S_R for the live columns; None once `take_linear` has taken it."""
    energy_A: Tensor
    """Diagonal of W S_X W^T: mean square of every output."""
    residual_AK: Tensor | None
    """S_R in float32, which only the reported error of the layer needs."""
    tokens: int
    """Number of tokens behind the means."""
    own_tokens: None = None
    pool_fraction: float = 0.0

    @property
    def columns(self) -> int:
        """Number of input columns N."""
        return len(self.live_N)

    @property
    def residual_AN(self) -> Tensor | None:
        """S_R, under the name that it has in `Moments`."""
        return self.residual_AK

    def take_linear(self, factor_A1: Tensor) -> Tensor:
        """Return `linear_AK` with the rows multiplied by factors, and give it up.

        Args:
            factor_A1: factor of every output row.
        """
        linear_AK, self.linear_AK = self.linear_AK, None
        return linear_AK.mul_(factor_A1)


class ProjectedAccumulator:
    """Accumulate the moments of a layer, batch by batch.

    Precision and devices are those of `MomentAccumulator`.

    Args:
        weight_AN: weight of the layer.
        drift: fraction of the drift correction, see `Moments.with_drift`; every call of `add` then
            needs the drifted stream.  None: there is only one stream.
        residual: whether to collect S_R, which needs the drifted stream.
        device: device of the sums; default: the CPU.
    """

    def __init__(
        self,
        weight_AN: Tensor,
        *,
        drift: float | None,
        residual: bool,
        device: torch.device | str | None = None,
    ) -> None:
        self.weight_AN = weight_AN.detach()
        self.drift = drift
        rows, columns = weight_AN.shape
        stacked = None if drift is None else rows * (1 + residual)
        self._sums = MomentAccumulator(columns, rows_of_residual=stacked, device=device)
        self._power_N = torch.zeros(columns, dtype=torch.float64, device=device)
        self._output_power_A = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(
        self,
        x_TN: Tensor,
        drifted_TN: Tensor | None = None,
        *,
        output_TA: Tensor | None = None,
        residual_TA: Tensor | None = None,
    ) -> None:
        """Add the tokens of one batch.  Leading dimensions of all tensors are flattened.

        Args:
            x_TN, drifted_TN, residual_TA: as for `MomentAccumulator.add`.
            output_TA: W x, the output of the original layer without its bias; required with the
                drifted stream.

        Raises:
            CalibrationError: an entry is NaN or infinite.
            ValueError: shapes disagree, or a stream is missing or unexpected.
        """
        if self.drift is None:
            self._sums.add(x_TN, residual_TA=residual_TA)
            return
        if drifted_TN is None or output_TA is None:
            raise ValueError(
                "ProjectedAccumulator: the drifted stream and the output of the original layer are "
                "needed, as a fraction of the drift was given."
            )
        given = [x_TN, drifted_TN, output_TA]
        if residual_TA is not None:
            given.append(residual_TA)
        blocks = [stream.detach().flatten(0, -2).split(TOKENS_PER_BLOCK) for stream in given]
        for x_BN, drifted_BN, *stacked in zip(*blocks, strict=True):
            wide = torch.promote_types(x_BN.dtype, torch.float32)
            outputs_BA = torch.cat([part.to(wide) for part in stacked], 1)
            self._sums.add(drifted_BN, residual_TA=outputs_BA)
            blend_BN = drifted_BN.to(wide).lerp(x_BN.to(wide), self.drift)
            for total, values in (
                (self._power_N, blend_BN),
                (self._output_power_A, outputs_BA[:, : len(self.weight_AN)]),
            ):
                total += values.square().sum(0, dtype=torch.float64).to(total.device)

    def combine(self, add_up: Callable[[Tensor], object]) -> None:
        """Add the sums of the accumulators of other processes; see `MomentAccumulator.combine`."""
        self._sums.combine(add_up)
        for total in (self._power_N, self._output_power_A):
            add_up(total)

    def result(self) -> ProjectedMoments:
        """Return the means over all tokens; the accumulator is empty and unusable afterwards.

        Raises:
            CalibrationError: no token was added, or `result` was called before.
        """
        sums = self._sums.result()
        tokens, cov_NN, stacked = sums.tokens, sums.cov, sums.residual_AN
        del sums
        rows, residual_AN = len(self.weight_AN), None
        if stacked is None:
            power_N = cov_NN.diagonal().clone()
            linear_AN = cov_NN.new_empty(self.weight_AN.shape)
        else:
            power_N = self._power_N / tokens
            linear_AN = stacked[:rows]
        energy_A = self._blend(linear_AN, cov_NN, tokens)
        if stacked is not None and len(stacked) > rows:
            residual_AN = stacked[rows:].mul_(self.drift)
            linear_AN += residual_AN
        live_N = live_columns(power_N)
        # copies, so that the residual is kept in float32 only
        linear_AK = linear_AN[:, live_N]
        residual_AK = None if residual_AN is None else residual_AN[:, live_N].float()
        del stacked, linear_AN, residual_AN
        cov_KK = select_(cov_NN, live_N)
        # products are symmetric up to rounding; what uses them next has to find the same bits
        restore_lower_(cov_KK, cov_KK.diagonal().clone())
        return ProjectedMoments(
            live_N=live_N,
            cov_KK=cov_KK,
            linear_AK=linear_AK,
            energy_A=energy_A,
            residual_AK=residual_AK,
            tokens=tokens,
        )

    def _blend(self, linear_AN: Tensor, cov_NN: Tensor, tokens: int) -> Tensor:
        """Replace E[y x^T] by W S_C for a fraction of the drift, and return the energy of the rows.

        With one stream, both are those of the input itself.
        """
        drift = self.drift or 0.0
        energy_A = drift**2 * self._output_power_A / tokens
        for rows, weight_BN in self._blocks():
            linear_BN = linear_AN[rows]
            if drift:
                energy_A[rows] += 2 * drift * (1 - drift) * (linear_BN * weight_BN).sum(1)
            if drift < 1:
                own_BN = weight_BN @ cov_NN
                energy_A[rows] += (1 - drift) ** 2 * (own_BN * weight_BN).sum(1)
                linear_BN.copy_(own_BN.lerp_(linear_BN, drift) if drift else own_BN)
        return energy_A

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows, and the weight there in float64."""
        for start in range(0, len(self.weight_AN), ROWS_PER_BLOCK):
            rows = slice(start, start + ROWS_PER_BLOCK)
            yield rows, self.weight_AN[rows].to(self._power_N)
