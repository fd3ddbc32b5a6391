r"""Moments of layers with very many inputs, multiplied by their weights while they are collected.

Shapes: T = tokens, N = in_features, A = out_features, K = live columns, B = tokens of one block.
Units:  every moment is a mean over tokens and is not centred.

A layer is quantized with S_H, but the other two moments of `Moments` appear only in products with
its weight: the linear term W S_C and the energy tr(W S_X W^T).  With the output y = W x of the
original layer, these are

.. math:: W S_C = E[y \hat x^T], \quad (W S_X W^T)_{rr} = E[y_r^2],

so a layer of 28,672 inputs and 8,192 outputs needs one N x N matrix instead of three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from watersic_hf.core.accumulator import TOKENS_PER_BLOCK, MomentAccumulator
from watersic_hf.core.inplace import restore_lower_, select_
from watersic_hf.core.whiten import live_columns

#: Number of inputs from which moments are collected in this form, if it is the smaller one.
WIDE = 16385
#: Number of rows of a weight that are converted to another dtype at a time.
ROWS_PER_BLOCK = 1024


def is_wide(rows: int, columns: int) -> bool:
    """Return whether layers that share an input are quantized with `ProjectedMoments`.

    Args:
        rows: number of output rows of all these layers.
        columns: number of their inputs.
    """
    return columns >= WIDE and rows <= columns


@dataclass(kw_only=True)
class ProjectedMoments:
    """Second moments of the input of one layer, for one quantization; see `quantize_wide`.

    Columns that carry no signal are left out of the matrices, but not out of the outputs, so the
    live columns also compensate for them.
    """

    live_N: Tensor
    """Bool, True for the columns that carry signal."""
    cov_KK: Tensor
    """S_H, or S_X if there is only one stream; shared by the layers of a group."""
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
    """Accumulate the moments of layers that share an input, batch by batch.

    Precision and devices are those of `MomentAccumulator`; outputs are computed in float32.

    Args:
        weights: weights of the layers by name.
        drift: fraction of the drift correction, see `Moments.with_drift`; every call of `add` then
            needs the drifted stream.  None: there is only one stream.
        residual: whether to collect S_R, which needs the drifted stream; all layers then have the
            same number of rows.
        device: device of the sums; default: the CPU.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        drift: float | None,
        residual: bool,
        device: torch.device | str | None = None,
    ) -> None:
        self.weights = dict(weights)
        self.drift = drift
        self.residual = residual
        columns = next(iter(weights.values())).shape[1]
        self._rows = [len(weight_AN) for weight_AN in weights.values()]
        stacked = [] if drift is None else [*self._rows]
        stacked += self._rows[:1] if residual else []
        self._sums = MomentAccumulator(
            columns, rows_of_residual=sum(stacked) if stacked else None, device=device
        )
        self._power_N = torch.zeros(columns, dtype=torch.float64, device=device)
        self._energy_A = torch.zeros(sum(self._rows), dtype=torch.float64, device=device)

    def add(
        self, x_TN: Tensor, drifted_TN: Tensor | None = None, *, residual_TA: Tensor | None = None
    ) -> None:
        """Add the tokens of one batch; the arguments are those of `MomentAccumulator.add`.

        Raises:
            CalibrationError: an entry is NaN or infinite.
            ValueError: shapes disagree, or a stream is missing or unexpected.
        """
        streams = (x_TN, drifted_TN, residual_TA)
        blocks = [
            [None] * -(-x_TN[..., 0].numel() // TOKENS_PER_BLOCK)
            if stream is None
            else stream.detach().flatten(0, -2).split(TOKENS_PER_BLOCK)
            for stream in streams
        ]
        for x_BN, drifted_BN, residual_BA in zip(*blocks, strict=True):
            if self.drift is None:
                self._sums.add(x_BN, residual_TA=residual_BA)
                continue
            wide = torch.promote_types(
                torch.promote_types(x_BN.dtype, drifted_BN.dtype), torch.float32
            )
            blend_BN = drifted_BN.to(wide).lerp(x_BN.to(wide), self.drift)
            output_BA = self._outputs(blend_BN)
            stacked_BA = output_BA
            if residual_BA is not None:
                stacked_BA = torch.cat([output_BA, residual_BA.to(output_BA)], 1)
            self._sums.add(drifted_BN, residual_TA=stacked_BA)
            self._power_N += blend_BN.double().square_().sum(0).to(self._power_N.device)
            self._energy_A += output_BA.double().square_().sum(0).to(self._energy_A.device)

    def combine(self, add_up: Callable[[Tensor], object]) -> None:
        """Add the sums of the accumulators of other processes; see `MomentAccumulator.combine`."""
        self._sums.combine(add_up)
        for total in (self._power_N, self._energy_A):
            add_up(total)

    def result(self) -> dict[str, ProjectedMoments]:
        """Return the means by layer; the accumulator is empty and unusable afterwards.

        Raises:
            CalibrationError: no token was added, or `result` was called before.
        """
        sums = self._sums.result()
        tokens, cov_NN, stacked_AN = sums.tokens, sums.cov, sums.residual_AN
        del sums
        residual_AN = None
        if self.drift is None:
            power_N = cov_NN.diagonal().clone()
            linear = {n: self._linear(weight_AN, cov_NN) for n, weight_AN in self.weights.items()}
            energy = {
                name: (linear_AN * self.weights[name]).sum(1) for name, linear_AN in linear.items()
            }
        else:
            power_N = self._power_N / tokens
            energy_A = (self._energy_A / tokens).split(self._rows)
            energy = dict(zip(self.weights, energy_A, strict=True))
            parts = stacked_AN[: sum(self._rows)].split(self._rows)
            linear = dict(zip(self.weights, parts, strict=True))
            if self.residual:
                residual_AN = stacked_AN[-self._rows[0] :].mul_(self.drift)
                linear = {name: part.add_(residual_AN) for name, part in linear.items()}
        live_N = live_columns(power_N)
        # copies, so that the residual is kept in float32 only
        linear = {name: part[:, live_N] for name, part in linear.items()}
        residual_AK = None if residual_AN is None else residual_AN[:, live_N].float()
        del stacked_AN, residual_AN
        cov_KK = select_(cov_NN, live_N)
        # products are symmetric up to rounding; layers of a group have to find the same bits
        restore_lower_(cov_KK, cov_KK.diagonal().clone())
        return {
            name: ProjectedMoments(
                live_N=live_N,
                cov_KK=cov_KK,
                linear_AK=linear[name],
                energy_A=energy[name],
                residual_AK=residual_AK,
                tokens=tokens,
            )
            for name in self.weights
        }

    def _outputs(self, x_BN: Tensor) -> Tensor:
        """Return the outputs of all layers."""
        weights = [w for weight in self.weights.values() for w in weight.split(ROWS_PER_BLOCK)]
        return torch.cat([F.linear(x_BN, w.detach().to(x_BN)) for w in weights], 1)

    @staticmethod
    def _linear(weight_AN: Tensor, cov_NN: Tensor) -> Tensor:
        """Return W S."""
        linear_AN = cov_NN.new_empty(weight_AN.shape)
        blocks = linear_AN.split(ROWS_PER_BLOCK), weight_AN.detach().split(ROWS_PER_BLOCK)
        for linear_BN, weight_BN in zip(*blocks, strict=True):
            torch.mm(weight_BN.double(), cov_NN, out=linear_BN)
        return linear_AN
