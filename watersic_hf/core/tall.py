"""Quantize a weight with very many rows, as a table of embeddings, in bounded memory.

Shapes: A = out_features (rows), N = in_features (columns), B = rows of one band.

Rows of a weight disturb each other only through what they share: the step and the gains of the
columns.  Both are found on a sample of the rows; then every band is quantized by itself.  Sample
and bands are drawn at random, since the rows of a table are ordered, frequent tokens first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from watersic_hf.core.metrics import output_error
from watersic_hf.core.moments import Moments, times
from watersic_hf.core.quantize import (
    DEFAULT_SETTINGS,
    LayerSettings,
    QuantizedWeight,
    quantize_weight,
)
from watersic_hf.core.rate import FULL_RUNS, Charge, insert_columns, narrow
from watersic_hf.core.whiten import damped_cholesky, whitened_target
from watersic_hf.core.zsic import BlockStep, zsic, zsic_block

#: Rows that the step and the gains of the columns are found on.
SAMPLE_ROWS = 8192
#: Rows that are quantized at a time.
ROWS_PER_BAND = 8192
#: Relative error of the bits below which the rows are not quantized again.
TOLERANCE = 5e-3


def quantize_tall(
    weight_AN: Tensor,
    moments: Moments,
    *,
    bits: float,
    charge: Charge,
    row_importance_A: Tensor | None = None,
    settings: LayerSettings = DEFAULT_SETTINGS,
    generator: torch.Generator | None = None,
    block_step: BlockStep = zsic_block,
    sample_rows: int = SAMPLE_ROWS,
    name: str = "weight",
) -> QuantizedWeight:
    """`quantize_weight` for a weight whose float64 copies would not fit in memory.

    Besides the weight and its codes only bands of rows are held.  A weight of at most twice
    `sample_rows` rows is left to `quantize_weight`.

    Args:
        weight_AN, moments, bits, charge, row_importance_A, settings, generator, block_step, name:
            as for `quantize_weight`; the moments have no residual.
        sample_rows: rows that the step and the gains are found on.

    Raises:
        CalibrationError: the moments are not finite, all zero or not positive definite.
        ValueError: the weight is not a finite float matrix, or arguments contradict each other.
    """
    rows = len(weight_AN)
    if row_importance_A is not None:
        row_importance_A = row_importance_A.to(weight_AN.device, torch.float64)
    options = {
        "bits": bits, "settings": settings, "generator": generator, "block_step": block_step,
        "name": name,
    }  # fmt: skip
    if rows <= 2 * sample_rows:
        return quantize_weight(
            weight_AN, moments, charge=charge, row_importance_A=row_importance_A, **options
        )
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    order_A = torch.randperm(rows, generator=generator).to(weight_AN.device)
    sample = order_A[:sample_rows]
    pilot = quantize_weight(
        weight_AN[sample], moments,
        charge=lambda codes_SN, sampled: charge(codes_SN, round(rows * sampled / sample_rows)),
        row_importance_A=None if row_importance_A is None else row_importance_A[sample],
        **options,
    )  # fmt: skip
    emphasis_A1 = torch.ones(rows, 1, dtype=torch.float64, device=weight_AN.device)
    if row_importance_A is not None:
        emphasis_A1 = (row_importance_A / row_importance_A[sample].mean()).sqrt()[:, None]
    bands = _Bands(weight_AN, moments, emphasis_A1, order_A, pilot, settings, block_step, name)
    step, spent = pilot.step, bits
    for _ in range(FULL_RUNS):
        # a bit is an octave
        step *= 2.0 ** (spent - bits)
        codes_AN, row_scale_A, error = bands.run(step)
        spent = charge(codes_AN, rows)
        if abs(spent - bits) <= TOLERANCE * bits:
            break
    return replace(
        pilot,
        codes_AN=codes_AN,
        row_scale_A=row_scale_A,
        col_scale_N=pilot.col_scale_N * (step / pilot.step),
        spacing_N=pilot.spacing_N * (step / pilot.step),
        step=step,
        bits=spent,
        error=error,
    )


class _Bands:
    """A weight that is quantized some rows at a time, with what a sample of them has settled."""

    def __init__(
        self,
        weight_AN: Tensor,
        moments: Moments,
        emphasis_A1: Tensor,
        order_A: Tensor,
        pilot: QuantizedWeight,
        settings: LayerSettings,
        block_step: BlockStep,
        name: str,
    ) -> None:
        self.weight_AN, self.moments, self.pilot = weight_AN, moments, pilot
        self.emphasis_A1, self.order_A = emphasis_A1, order_A
        self.live_moments = moments.select(pilot.live_N)
        self.chol, self.damping = damped_cholesky(
            self.live_moments.layer_cov, pilot.damping, tokens=moments.tokens, name=name
        )
        self.rescale, self.block_step = settings.rescale, block_step
        self.gain_N = (pilot.col_scale_N / pilot.spacing_N)[pilot.live_N]

    def run(self, step: float) -> tuple[Tensor, Tensor, float]:
        """The codes of all rows with one step, their row scales, and the relative error."""
        live_N = self.pilot.live_N
        scale_N = self.gain_N * self.pilot.spacing_N[live_N] * (step / self.pilot.step)
        codes_AN, row_scale_A, error, energy = [], [], 0.0, 0.0
        for weight_BN, emphasis_B1 in self._bands():
            live_BN = weight_BN[:, live_N].double() * emphasis_B1
            target_BN = whitened_target(live_BN, self.live_moments, self.chol, self.damping)
            codes_BN, _ = zsic(target_BN, self.chol, step, block_step=self.block_step)
            row_B = self._row_scales(codes_BN * scale_N, live_BN) / emphasis_B1[:, 0]
            codes_AN.append(narrow(insert_columns(codes_BN, live_N)))
            row_scale_A.append(row_B)
            dequantized_BN = insert_columns(codes_BN * scale_N * row_B[:, None], live_N)
            parts = output_error(weight_BN, dequantized_BN, self.moments)
            error, energy = error + parts[0], energy + parts[1]
        place_A = self.order_A.argsort()
        codes_AN, row_scale_A = torch.cat(codes_AN)[place_A], torch.cat(row_scale_A)[place_A]
        return codes_AN, row_scale_A, max(error, 0.0) / energy if energy else 0.0

    def _row_scales(self, scaled_BN: Tensor, live_BN: Tensor) -> Tensor:
        """The least-squares scale of every row, 0 where all codes are; 1 without rescalers."""
        if not self.rescale:
            return torch.ones_like(scaled_BN[:, 0])
        linear_B = (scaled_BN * self.live_moments.linear_term(live_BN)).sum(1)
        power_B = (times(scaled_BN, self.live_moments.layer_cov) * scaled_BN).sum(1)
        return torch.where(power_B > 0, linear_B / power_B.clamp(min=1e-300), 0.0)

    def _bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows_B in self.order_A.split(ROWS_PER_BAND):
            yield self.weight_AN[rows_B], self.emphasis_A1[rows_B]
