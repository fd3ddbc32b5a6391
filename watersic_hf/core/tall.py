"""Quantize a weight with very many rows, such as a vocabulary matrix, in bounded memory.

Shapes: A = out_features (rows), N = in_features (columns), B = rows of one band.

The rows of a weight depend on each other only through what they have in common: the step and the
gains of the columns.  Both are determined on a sample of the rows; then every band of rows is
quantized independently.  The sample and the bands are random, because the rows of a vocabulary
matrix are ordered: frequent tokens come first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from watersic_hf.core.rate import FULL_RUNS, Charge, insert_columns, to_smallest_dtype
from watersic_hf.core.trellis import Path, PathSearch, Trellis, row_path, row_power
from watersic_hf.core.whiten import damped_cholesky, whitened_target
from watersic_hf.core.zsic import BlockStep, zsic, zsic_block

#: Number of rows that determine the step and the gains of the columns.
SAMPLE_ROWS = 8192
#: Number of rows that are quantized at a time.
ROWS_PER_BAND = 8192
#: Relative error of the bits at which the correction of the step stops.
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
    search: PathSearch | None = None,
    sample_rows: int = SAMPLE_ROWS,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight whose float64 copies would not fit into memory.

    Besides the weight and its codes, only one band of rows is held in memory.  A weight with at
    most twice `sample_rows` rows is passed to `quantize_weight`.

    Args:
        weight_AN, moments, bits, charge, row_importance_A, settings, generator, block_step, search,
        name: as for `quantize_weight`; the moments must not have a residual.
        sample_rows: number of rows that determine the step and the gains; default: `SAMPLE_ROWS`.

    Raises:
        CalibrationError: the moments are not finite or not positive definite.
        ValueError: the weight is not a finite float matrix, or the arguments are inconsistent.
    """
    rows = len(weight_AN)
    if row_importance_A is not None:
        row_importance_A = row_importance_A.to(weight_AN.device, torch.float64)
    quantize = functools.partial(
        quantize_weight,
        moments=moments,
        bits=bits,
        settings=settings,
        generator=generator,
        block_step=block_step,
        search=search,
        name=name,
    )
    if rows <= 2 * sample_rows:
        return quantize(weight_AN, charge=charge, row_importance_A=row_importance_A)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    order_A = torch.randperm(rows, generator=generator).to(weight_AN.device)
    sample = order_A[:sample_rows]

    def charge_all(codes_SN: Tensor, sampled: int, path: Path | None) -> float:
        return charge(codes_SN, round(rows * sampled / sample_rows), path)

    pilot = quantize(
        weight_AN[sample],
        charge=charge_all,
        row_importance_A=None if row_importance_A is None else row_importance_A[sample],
    )
    emphasis_A1 = torch.ones(rows, 1, dtype=torch.float64, device=weight_AN.device)
    if row_importance_A is not None:
        # as in the pilot, whose factors have root mean square 1 over the sample
        emphasis_A1 = (row_importance_A / row_importance_A[sample].mean()).sqrt()[:, None]
    bands = _Bands(
        _Rows(weight_AN=weight_AN, emphasis_A1=emphasis_A1, order_A=order_A),
        moments,
        pilot,
        rescale=settings.rescale,
        block_step=block_step,
        search=search if settings.lattice == "trellis" else None,
        name=name,
    )
    return _correct_step(bands, bits, charge)


def _correct_step(bands: _Bands, bits: float, charge: Charge) -> QuantizedWeight:
    """Quantize all rows, with the step of the pilot corrected until they cost `bits`."""
    pilot, step, spent = bands.pilot, bands.pilot.step, bits
    for _ in range(FULL_RUNS):
        # at high rate one bit is one octave of the step
        step *= 2.0 ** (spent - bits)
        codes_AN, row_scale_A, error = bands.run(step)
        spent = charge(codes_AN, len(codes_AN), bands.path)
        if abs(spent - bits) <= TOLERANCE * bits:
            break
    return replace(
        pilot,
        codes_AN=codes_AN,
        path=bands.path,
        row_scale_A=row_scale_A,
        col_scale_N=pilot.col_scale_N * (step / pilot.step),
        spacing_N=pilot.spacing_N * (step / pilot.step),
        step=step,
        bits=spent,
        error=error,
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of a weight, and the order in which they are quantized."""

    weight_AN: Tensor
    emphasis_A1: Tensor
    """Factor of every row, the square root of its importance."""
    order_A: Tensor
    """Permutation of the row indices."""

    def along(self, path: Path) -> _Rows:
        """Return the same rows in the order of a path."""
        return replace(self, order_A=path.order_A)

    def bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weight and the factors of one band after the other, in the given order."""
        for rows_B in self.order_A.split(ROWS_PER_BAND):
            yield self.weight_AN[rows_B], self.emphasis_A1[rows_B]


class _Bands:
    """Quantize a weight band by band, with the gains of the columns that a sample determined."""

    def __init__(
        self,
        rows: _Rows,
        moments: Moments,
        pilot: QuantizedWeight,
        *,
        rescale: bool,
        block_step: BlockStep,
        search: PathSearch | None,
        name: str,
    ) -> None:
        self.moments, self.pilot = moments, pilot
        self.live_moments = moments.select(pilot.live_N).or_identity()
        self.chol, self.damping = damped_cholesky(
            self.live_moments.layer_cov, pilot.damping, tokens=moments.tokens, name=name
        )
        self.rescale, self.block_step = rescale, block_step
        self.gain_N = (pilot.col_scale_N / pilot.spacing_N)[pilot.live_N]
        self.search, self.path, self.rows = search, None, rows
        if search is not None:
            self.path = row_path(self._row_power())
            self.rows = rows.along(self.path)

    def _targets(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the bands: weight, factors, live weights times factors, and their target."""
        for weight_BN, emphasis_B1 in self.rows.bands():
            live_BN = weight_BN[:, self.pilot.live_N].double() * emphasis_B1
            target_BN = whitened_target(live_BN, self.live_moments, self.chol, self.damping)
            yield weight_BN, emphasis_B1, live_BN, target_BN

    def _row_power(self) -> Tensor:
        """Return `row_power` of all rows; the columns are measured on the first band."""
        power_A, power_N = [], None
        for *_, target_BN in self._targets():
            power_N = target_BN.square().mean(0) if power_N is None else power_N
            power_A.append(row_power(target_BN, power_N))
        return torch.cat(power_A)[self.rows.order_A.argsort()]

    def _trellises(self) -> Iterator[Trellis | None]:
        """Yield what chooses the values of one band after the other."""
        for rows_B in self.rows.order_A.split(ROWS_PER_BAND):
            if self.search is None:
                yield None
            else:
                yield Trellis(search=self.search, path=self.path.select(rows_B))

    def run(self, step: float) -> tuple[Tensor, Tensor, float]:
        """Quantize all rows with one step; return codes, row scales and the relative error."""
        live_N = self.pilot.live_N
        scale_N = self.gain_N * self.pilot.spacing_N[live_N] * (step / self.pilot.step)
        codes_AN, row_scale_A, error, energy = [], [], 0.0, 0.0
        for band, trellis in zip(self._targets(), self._trellises(), strict=True):
            weight_BN, emphasis_B1, live_BN, target_BN = band
            codes_BN, _ = zsic(
                target_BN, self.chol, step, block_step=self.block_step, trellis=trellis
            )
            row_B = self._row_scales(codes_BN * scale_N, live_BN) / emphasis_B1[:, 0]
            codes_AN.append(to_smallest_dtype(insert_columns(codes_BN, live_N)))
            row_scale_A.append(row_B)
            dequantized_BN = insert_columns(codes_BN * scale_N * row_B[:, None], live_N)
            parts = output_error(weight_BN, dequantized_BN, self.moments)
            error, energy = error + parts[0], energy + parts[1]
        position_A = self.rows.order_A.argsort()
        codes_AN, row_scale_A = torch.cat(codes_AN)[position_A], torch.cat(row_scale_A)[position_A]
        return codes_AN, row_scale_A, max(error, 0.0) / energy if energy else 0.0

    def _row_scales(self, scaled_BN: Tensor, live_BN: Tensor) -> Tensor:
        """Return the least-squares scale of every row: 0 if its codes are 0, 1 if not rescaled."""
        if not self.rescale:
            return torch.ones_like(scaled_BN[:, 0])
        linear_B = (scaled_BN * self.live_moments.linear_term(live_BN)).sum(1)
        power_B = (times(scaled_BN, self.live_moments.layer_cov) * scaled_BN).sum(1)
        return torch.where(power_B > 0, linear_B / power_B.clamp(min=1e-300), 0.0)
