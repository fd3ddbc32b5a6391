r"""Quantize a weight with more inputs than outputs, with a single square moment.

Shapes: A = out_features (rows), N = in_features (columns), K = live columns, B = rows of one block.

The method is that of `quantize_weight`.  The other moments were multiplied by the weight while they
were collected.  Besides S_H there is never more than one K x K matrix in memory, the Gram matrix of
the rescaler, as the Cholesky factor lies in the lower triangle of S_H: more would not fit for a
layer of very many inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from watersic_hf.core.inplace import restore_lower_
from watersic_hf.core.moments import CalibrationError, Moments
from watersic_hf.core.projected import ROWS_PER_BLOCK, ProjectedMoments
from watersic_hf.core.quantize import (
    DEFAULT_SETTINGS,
    LayerSettings,
    QuantizedWeight,
    check_inputs,
    lattice_layer,
    quantize_weight,
    row_factors,
    run_at,
    sample_rows,
)
from watersic_hf.core.rate import Charge, CodedLayer, insert_columns
from watersic_hf.core.rescale import rescale
from watersic_hf.core.trellis import PathSearch
from watersic_hf.core.waterfill import spacings
from watersic_hf.core.whiten import LEAST_DAMPING, damped_cholesky, damping_for, damping_shift
from watersic_hf.core.zsic import BlockStep, zsic_block


def quantize_wide(
    weight_AN: Tensor,
    moments: ProjectedMoments,
    *,
    bits: float,
    charge: Charge,
    row_importance_A: Tensor | None = None,
    settings: LayerSettings = DEFAULT_SETTINGS,
    generator: torch.Generator | None = None,
    block_step: BlockStep = zsic_block,
    search: PathSearch | None = None,
    octaves: float | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight with moments that can be used only once.

    Args:
        weight_AN, bits, charge, row_importance_A, settings, generator, block_step, search, octaves,
        name: as for `quantize_weight`.
        moments: moments of this weight; their linear term is overwritten.

    Raises:
        CalibrationError: the moments are not finite or not positive definite, or were used before.
        ValueError: the weight is not a finite float matrix, or the arguments are inconsistent.
    """
    check_inputs(weight_AN, moments, name)
    if moments.linear_AK is None:
        raise CalibrationError(f"{name}: its moments were used before; collect them again.")
    live_N = moments.live_N & (weight_AN != 0).any(0)
    substitute = _without_signal(moments, live_N)
    if substitute is not None:
        return quantize_weight(
            weight_AN,
            substitute,
            bits=bits,
            charge=charge,
            row_importance_A=row_importance_A,
            settings=settings,
            generator=generator,
            block_step=block_step,
            search=search,
            name=name,
        )
    layer = _WideLayer(weight_AN, moments, live_N, row_factors(weight_AN, row_importance_A, name))
    damping, diagonal_K = layer.factorize(settings.damping, tokens=moments.tokens, name=name)
    target_AK = layer.target(damping * diagonal_K.mean())
    steps = block_step, search
    problem = lattice_layer(target_AK, layer.cov, live_N, settings, *steps, name=name)
    del target_AK
    run, octaves = run_at(
        problem,
        layer.column_rms_1K,
        bits,
        None,
        charge=charge,
        sample=sample_rows(len(weight_AN), settings.search_rows, generator),
        octaves=octaves,
        name=name,
    )
    spacing_K = spacings(layer.cov, run.step)
    del problem
    restore_lower_(layer.cov, diagonal_K)
    row_scale_A, gain_K = layer.fit_scales(run, spacing_K, damping, settings)
    col_scale_N = insert_columns(spacing_K * gain_K, live_N)
    row_scale_A = row_scale_A / layer.factor_A1[:, 0]
    return QuantizedWeight(
        codes_AN=run.codes_AN,
        path=run.path,
        row_scale_A=row_scale_A,
        col_scale_N=col_scale_N,
        step=run.step,
        spacing_N=insert_columns(spacing_K, live_N),
        shrinkage_N=insert_columns(run.shrinkage_N, live_N),
        live_N=live_N,
        zero_input=False,
        damping=damping,
        bits=run.bits,
        error=layer.relative_error(run.codes_AN, row_scale_A, col_scale_N),
        octaves=octaves,
    )


def _without_signal(moments: ProjectedMoments, live_N: Tensor) -> Moments | None:
    """Return moments without data if the input or the weight is zero in all columns."""
    if not bool(moments.cov_KK.diagonal().any()):
        zeros_N = torch.zeros_like(live_N, dtype=torch.float64)
        return Moments(cov=zeros_N, tokens=moments.tokens)
    if not bool(live_N.any()):
        return Moments.identity(moments.columns, device=live_N.device)
    return None


class _WideLayer:
    """A weight with its moments over the live columns, rows multiplied by their factors."""

    def __init__(
        self, weight_AN: Tensor, moments: ProjectedMoments, live_N: Tensor, factor_A1: Tensor
    ) -> None:
        self.weight_AN, self.live_N, self.factor_A1 = weight_AN, live_N, factor_A1
        self.energy_A = moments.energy_A
        self.residual_AK = moments.residual_AK
        self.cov = moments.cov_KK
        self.linear_AK = moments.take_linear(factor_A1)
        kept_K = live_N[moments.live_N]
        if not bool(kept_K.all()):
            # columns of weights that are all zero, as in a pruned model: a copy for this layer
            self.cov = self.cov[kept_K][:, kept_K]
            self.linear_AK = self.linear_AK[:, kept_K]
            if self.residual_AK is not None:
                self.residual_AK = self.residual_AK[:, kept_K]

    def _blocks(self) -> list[slice]:
        rows = len(self.weight_AN)
        return [slice(i, min(i + ROWS_PER_BLOCK, rows)) for i in range(0, rows, ROWS_PER_BLOCK)]

    def _weight(self, rows: slice) -> Tensor:
        return self.weight_AN[rows][:, self.live_N].double() * self.factor_A1[rows]

    @property
    def column_rms_1K(self) -> Tensor:
        """Root mean square of every column of the weight, as a weight of one row."""
        total_K = sum(self._weight(rows).square().sum(0) for rows in self._blocks())
        return (total_K / len(self.weight_AN)).sqrt()[None]

    def factorize(self, damping: float | None, *, tokens: int, name: str) -> tuple[float, Tensor]:
        """Put the Cholesky factor into the lower triangle of `cov`.

        Returns:
            The damping that was used, and the diagonal with which `restore_lower_` undoes this.
        """
        diagonal_K = self.cov.diagonal().clone()
        damping = damping or damping_for(self.cov, tokens)
        _, used = damped_cholesky(self.cov, damping, tokens=tokens, name=name, in_place=True)
        return used, diagonal_K

    def target(self, shift: Tensor) -> Tensor:
        """Return Y as `whitened_target` does, while `cov` holds the factor.

        Args:
            shift: value that was added to the diagonal of the moment.
        """
        damped_AK = self.linear_AK.clone()
        for rows in self._blocks():
            damped_AK[rows].addcmul_(self._weight(rows), shift)
        # in place: a row-major matrix of rows is a column-major one of columns
        target_KA = damped_AK.T
        torch.linalg.solve_triangular(self.cov, target_KA, upper=False, out=target_KA)
        return target_KA.contiguous().T

    def fit_scales(
        self, run: CodedLayer, spacing_K: Tensor, damping: float, settings: LayerSettings
    ) -> tuple[Tensor, Tensor]:
        """Return row scales and column gains, as for `quantize_weight`."""
        if not settings.rescale or not bool((run.codes_AN != 0).any()):
            return torch.ones_like(self.energy_A), run.shrinkage_N
        shift = float(damping_shift(self.cov, max(0.0, damping - LEAST_DAMPING)))
        energy = float((self.energy_A * self.factor_A1[:, 0].square()).sum())
        for rows in self._blocks():
            weight_BK = self._weight(rows)
            energy += shift * float(weight_BK.square().sum())
            self.linear_AK[rows].add_(weight_BK, alpha=shift)
        scales = rescale(
            run.codes_AN if bool(self.live_N.all()) else run.codes_AN[:, self.live_N],
            spacing_K,
            run.shrinkage_N,
            cov=self.cov,
            linear_AN=self.linear_AK,
            energy=energy,
            shift=shift,
        )
        for rows in self._blocks():
            self.linear_AK[rows].sub_(self._weight(rows), alpha=shift)
        return scales

    def relative_error(self, codes_AN: Tensor, row_scale_A: Tensor, col_scale_N: Tensor) -> float:
        """Return `relative_output_error` of the dequantized weight."""
        error = energy = float(self.energy_A.sum())
        scale_K = col_scale_N[self.live_N]
        for rows in self._blocks():
            dequantized_BK = codes_AN[rows][:, self.live_N] * scale_K * row_scale_A[rows, None]
            cross_BK = self.linear_AK[rows] / self.factor_A1[rows]
            if self.residual_AK is not None:
                cross_BK -= self.residual_AK[rows]
            gained_BK = dequantized_BK @ self.cov - 2 * cross_BK
            error += float((gained_BK * dequantized_BK).sum())
        return max(error, 0.0) / energy if energy > 0 else 0.0
