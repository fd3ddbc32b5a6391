"""Quantize one weight: the whole method as one sequence of calls.

Shapes: A = out_features (rows), N = in_features (columns).
Units:  bits are per weight of the layer, including dead columns; steps are in whitened units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.core.metrics import relative_output_error
from watersic_hf.core.moments import CalibrationError, Moments, not_finite, times
from watersic_hf.core.projected import ProjectedMoments
from watersic_hf.core.rate import (
    Charge,
    CodedLayer,
    LayerSearch,
    WhitenedLayer,
    insert_columns,
)
from watersic_hf.core.rescale import rescale
from watersic_hf.core.trellis import Path, PathSearch, Trellis, row_path, row_power
from watersic_hf.core.waterfill import spacings, step_for_budget, step_for_rate
from watersic_hf.core.whiten import (
    LEAST_DAMPING,
    damped_cholesky,
    damping_for,
    damping_shift,
    live_columns,
    whitened_target,
)
from watersic_hf.core.zsic import BlockStep, zsic_block

#: Fraction of the rows that the rate search uses, if that is more than `search_rows`.
SEARCH_FRACTION = 0.1
#: Largest fraction of the rows with which a search that starts near its end is worth a sample.
SMALL_SAMPLE = 0.2
#: What a weight can be rounded to; see `LayerSettings`.
LATTICES = ("scalar", "trellis")
#: Shannon rate of the coarsest useful step, which is taken if no step can meet the budget.
COARSEST_RATE = 0.25


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings for the quantization of a layer, apart from its rate."""

    damping: float | None = None
    """Value that is added to the diagonal of the input covariance, relative to the mean of the
    diagonal; None: the value of `damping_for`, which depends on the number of tokens."""
    lattice: str = "scalar"
    """What the weights are rounded to: ``scalar``, or ``trellis`` for a search through the trellis
    of `watersic_hf.core.trellis`."""
    rescale: bool = True
    """Whether to fit row and column scales to the finished codes."""
    search_rows: int = 256
    """Number of rows that the rate search uses, or a tenth of all rows if that is more."""

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise ValueError(f"LayerSettings: damping is {self.damping}; it must be positive.")
        if self.lattice not in LATTICES:
            raise ValueError(f"LayerSettings: lattice is {self.lattice!r}; use one of {LATTICES}.")
        if self.search_rows < 1:
            raise ValueError(f"LayerSettings: search_rows is {self.search_rows}; use at least 1.")


DEFAULT_SETTINGS = LayerSettings()


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    r"""A quantized weight, :math:`\hat W = \diag(\text{row\_scale}) Z \diag(\text{col\_scale})`."""

    codes_AN: Tensor
    """Codes Z, or the values of a trellis, in the smallest of int8, int16 and int32 that holds
    them; 0 in dead columns."""
    path: Path | None = None
    """Order in which the trellis visits the rows; None for codes."""
    row_scale_A: Tensor
    """Row scales t, float64, with mean absolute value 1 before the row importances are divided
    out; 0 for rows whose codes are all zero."""
    col_scale_N: Tensor
    """Column scales alpha g (spacing times rescaled gain), float64; 0 in dead columns."""
    step: float
    """Lattice step c, whitened units."""
    spacing_N: Tensor
    """Lattice spacing alpha of every column, weight units, float64; 0 in dead columns."""
    shrinkage_N: Tensor
    """Gain gamma of every column in the recursion, float64; 0 in dead columns."""
    live_N: Tensor
    """Bool, True for the columns that have codes: their input carries signal and their weights are
    not all zero."""
    zero_input: bool
    """Whether the input of these columns is zero, so that identity moments were used."""
    damping: float
    """Damping that was used, after retries."""
    bits: float | None
    """Cost of the final codes by `charge`, bits per weight; None if the rate was given."""
    error: float
    """Mean square error of the output relative to the output; see `relative_output_error`."""
    octaves: float | None = None
    """Distance of the step from that for Gaussian columns, in octaves; None if no step was
    searched."""

    def dequantize(self) -> Tensor:
        """Return the dequantized weight, float64."""
        return self.codes_AN * self.col_scale_N * self.row_scale_A[:, None]


def quantize_weight(
    weight_AN: Tensor,
    moments: Moments,
    *,
    bits: float | None = None,
    rate: float | None = None,
    charge: Charge | None = None,
    row_importance_A: Tensor | None = None,
    settings: LayerSettings = DEFAULT_SETTINGS,
    generator: torch.Generator | None = None,
    block_step: BlockStep = zsic_block,
    search: PathSearch | None = None,
    octaves: float | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight to integer codes with one scale per row and per column.

    If the input is zero, any codes give the same output, and identity moments are used.

    Args:
        weight_AN: weight to quantize, any float dtype.
        moments: second moments of the layer's input, on the device of the weight.
        bits: stored bits per weight to spend; the step that meets them is searched with `charge`.
        rate: alternative to `bits`: Shannon rate R of `step_for_rate` in bits per weight.  The
            codes cost more than R.
        charge: function that returns the cost of codes, see `Charge`; required with `bits`.
        row_importance_A: positive weight of the squared error of each row; only ratios matter.  A
            row with importance w gets the step ``step / sqrt(w)``.  Default: all count the same.
        settings: damping, rescaling and search settings; default: `DEFAULT_SETTINGS`.
        generator: draws the sample of rows for the search; default: a generator with seed 0.
        block_step: function that quantizes a block of columns, see `zsic`; default: `zsic_block`.
        search: search through the trellis; required if that is the lattice of the settings.
        octaves: `QuantizedWeight.octaves` of a similar weight, where the search begins; default:
            at the step for Gaussian columns, on a sample of the rows.
        name: name of the layer, for messages.

    Raises:
        CalibrationError: the moments are not finite or not positive definite.
        ValueError: the weight is not a finite float matrix, or the arguments are inconsistent.
    """
    _check_request(bits, rate, charge, name)
    check_inputs(weight_AN, moments, name)
    # a column of weights that are all zero has codes of zero
    live_N = live_columns(moments.cov) & (weight_AN != 0).any(0)
    if not bool(live_N.any()):
        return _zero_weight(weight_AN, moments, live_N, charge, settings)
    emphasis_A1 = row_factors(weight_AN, row_importance_A, name)
    live_AN = weight_AN[:, live_N].double() * emphasis_A1
    measured = moments.select(live_N).scale_rows(emphasis_A1)
    live_moments = measured.or_identity()
    steps = block_step, search
    layer, damping = _whitened_layer(live_AN, live_moments, live_N, settings, *steps, name=name)
    sample = sample_rows(len(weight_AN), settings.search_rows, generator)
    run, octaves = run_at(
        layer, live_AN, bits, rate, charge=charge, sample=sample, octaves=octaves, name=name
    )
    spacing_N = spacings(layer.chol, run.step)
    # free the memory for the rescaler
    del layer
    row_scale_A, gain_N = _fit_scales(
        run, spacing_N, live_AN, live_moments, live_N=live_N, damping=damping, settings=settings
    )
    row_scale_A = row_scale_A / emphasis_A1[:, 0]
    col_scale_N = insert_columns(spacing_N * gain_N, live_N)
    dequantized_AN = run.codes_AN * col_scale_N * row_scale_A[:, None]
    return QuantizedWeight(
        codes_AN=run.codes_AN,
        path=run.path,
        row_scale_A=row_scale_A,
        col_scale_N=col_scale_N,
        step=run.step,
        spacing_N=insert_columns(spacing_N, live_N),
        shrinkage_N=insert_columns(run.shrinkage_N, live_N),
        live_N=live_N,
        zero_input=live_moments is not measured,
        damping=damping,
        bits=run.bits,
        error=relative_output_error(weight_AN, dequantized_AN, moments),
        octaves=octaves,
    )


def _whitened_layer(
    live_AN: Tensor,
    live_moments: Moments,
    live_N: Tensor,
    settings: LayerSettings,
    block_step: BlockStep,
    search: PathSearch | None,
    *,
    name: str,
) -> tuple[WhitenedLayer, float]:
    """Return the lattice problem of a weight without dead columns, and its damping."""
    cov = live_moments.layer_cov
    damping = settings.damping or damping_for(cov, live_moments.tokens)
    chol, damping = damped_cholesky(cov, damping, tokens=live_moments.tokens, name=name)
    target_AN = whitened_target(live_AN, live_moments, chol, damping)
    return lattice_layer(target_AN, chol, live_N, settings, block_step, search, name=name), damping


def lattice_layer(
    target_AN: Tensor,
    chol: Tensor,
    live_N: Tensor,
    settings: LayerSettings,
    block_step: BlockStep,
    search: PathSearch | None,
    *,
    name: str,
) -> WhitenedLayer:
    """Return the lattice problem of a target, with a trellis if the settings name one."""
    trellis = None
    if settings.lattice == "trellis":
        if search is None:
            raise ValueError(f"{name}: the lattice is a trellis, so `search` is needed.")
        trellis = Trellis(search=search, path=row_path(row_power(target_AN)))
    return WhitenedLayer(
        target_AN=target_AN, chol=chol, live_N=live_N, block_step=block_step, trellis=trellis
    )


def run_at(
    layer: WhitenedLayer,
    live_AN: Tensor,
    bits: float | None,
    rate: float | None,
    *,
    charge: Charge | None,
    sample: Tensor,
    octaves: float | None,
    name: str,
) -> tuple[CodedLayer, float | None]:
    """Return the codes at `rate`, or those that cost `bits`, and `QuantizedWeight.octaves`.

    With `octaves` given, the search starts there, and a sample of the rows is used only if that is
    much faster than all of them.  Of `live_AN` only the mean squares of the columns count.
    """
    if bits is None:
        step = layer.lattice_step(float(step_for_rate(live_AN, layer.chol, rate)))
        return layer.code(step), None
    start, coarsest = (
        layer.lattice_step(float(step_for_budget(live_AN, layer.chol, rate)))
        for rate in (max(bits - layer.loss, COARSEST_RATE), COARSEST_RATE)
    )
    sampled = octaves is None or len(sample) <= SMALL_SAMPLE * len(layer.target_AN)
    search = LayerSearch(layer, charge, sample.to(live_AN.device))
    first = start * 2.0 ** (octaves or 0.0)
    run = search.run(bits, start=first, coarsest=coarsest, sampled=sampled, name=name)
    return run, math.log2(run.step / start)


def _fit_scales(
    run: CodedLayer,
    spacing_N: Tensor,
    live_AN: Tensor,
    live_moments: Moments,
    *,
    live_N: Tensor,
    damping: float,
    settings: LayerSettings,
) -> tuple[Tensor, Tensor]:
    """Return the row scales t and column gains g; without rescaling, t = 1 and g = gamma.

    The fit uses damped moments, as the codes do: otherwise the scales would fit the noise of few
    tokens that the damping keeps out of the codes.
    """
    if not settings.rescale or not bool((run.codes_AN != 0).any()):
        return live_AN.new_ones(len(live_AN)), run.shrinkage_N
    # the paper uses its damping of 1e-4 for the factorization only, and fits scales without it
    excess = max(0.0, damping - LEAST_DAMPING)
    shift = float(damping_shift(live_moments.layer_cov, excess))
    energy = (times(live_AN, live_moments.cov) * live_AN).sum() + shift * live_AN.square().sum()
    return rescale(
        run.codes_AN[:, live_N],
        spacing_N,
        run.shrinkage_N,
        cov=live_moments.layer_cov,
        linear_AN=live_moments.linear_term(live_AN).add_(live_AN, alpha=shift),
        energy=float(energy),
        shift=shift,
    )


def row_factors(weight_AN: Tensor, row_importance_A: Tensor | None, name: str) -> Tensor:
    """Return the factor that each row is multiplied by, (A, 1), with root mean square 1."""
    rows = len(weight_AN)
    if row_importance_A is None:
        return torch.ones(rows, 1, dtype=torch.float64, device=weight_AN.device)
    importance_A = row_importance_A.to(weight_AN.device, torch.float64)
    usable = torch.isfinite(importance_A) & (importance_A > 0)
    if importance_A.shape != (rows,) or not bool(usable.all()):
        raise ValueError(
            f"{name}: the row importances have shape {tuple(importance_A.shape)} and "
            f"{int(usable.sum())} positive finite entries; one for each of {rows} rows is needed."
        )
    return (importance_A / importance_A.mean()).sqrt()[:, None]


def _zero_weight(
    weight_AN: Tensor,
    moments: Moments,
    live_N: Tensor,
    charge: Charge | None,
    settings: LayerSettings,
) -> QuantizedWeight:
    """Return the exact result for a weight that is zero in all columns that carry signal."""
    codes_AN = torch.zeros_like(weight_AN, dtype=torch.int8)
    zeros_N = torch.zeros_like(live_N, dtype=torch.float64)
    usable = moments.or_identity()
    path = None
    if settings.lattice == "trellis":
        path = row_path(torch.zeros(len(codes_AN)))
    return QuantizedWeight(
        codes_AN=codes_AN,
        path=path,
        row_scale_A=torch.ones_like(codes_AN[:, 0], dtype=torch.float64),
        col_scale_N=zeros_N,
        step=1.0,
        spacing_N=zeros_N,
        shrinkage_N=zeros_N,
        live_N=live_N,
        zero_input=usable is not moments,
        damping=settings.damping or damping_for(usable.layer_cov, usable.tokens),
        bits=None if charge is None else charge(codes_AN, len(codes_AN), path),
        error=0.0,
    )


def sample_rows(rows: int, least: int, generator: torch.Generator | None) -> Tensor:
    """Return the indices of a random sample of rows for the rate search."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    count = max(int(SEARCH_FRACTION * rows), min(rows, least))
    return torch.randperm(rows, generator=generator, device=generator.device)[:count]


def _check_request(
    bits: float | None, rate: float | None, charge: Charge | None, name: str
) -> None:
    if (bits is None) == (rate is None):
        raise ValueError(f"{name}: give either `bits` or `rate`; bits={bits}, rate={rate}.")
    if (bits is None) != (charge is None):
        raise ValueError(f"{name}: `bits` are searched with `charge`; give both or neither.")
    if bits is not None and not 0 < bits < math.inf:
        raise ValueError(f"{name}: bits is {bits}; it must be positive and finite.")
    if rate is not None and not math.isfinite(rate):
        raise ValueError(f"{name}: rate is {rate}; it must be finite.")


def check_inputs(weight_AN: Tensor, moments: Moments | ProjectedMoments, name: str) -> None:
    """Check that a weight and its moments are finite, on one device, and belong together.

    Raises:
        CalibrationError: the moments are not finite.
        ValueError: the weight is not finite, or the shapes or devices differ.
    """
    if weight_AN.ndim != 2 or not weight_AN.is_floating_point() or weight_AN.numel() == 0:
        raise ValueError(
            f"{name}: the weight has shape {tuple(weight_AN.shape)} and dtype {weight_AN.dtype}; a "
            f"non-empty float matrix is needed."
        )
    rows, columns = weight_AN.shape
    residual_AN = moments.residual_AN
    if moments.columns != columns or (residual_AN is not None and len(residual_AN) != rows):
        found = f"{moments.columns} columns"
        if residual_AN is not None:
            found += f" and {len(residual_AN)} residual rows"
        raise ValueError(f"{name}: the weight is {rows} x {columns}, but the moments have {found}.")
    for label, value in {"weight": weight_AN, **vars(moments)}.items():
        if not isinstance(value, Tensor):
            continue
        if value.device != weight_AN.device:
            raise ValueError(
                f"{name}: {label} is on {value.device}, but the weight is on {weight_AN.device}; "
                f"move them to one device."
            )
        bad = not_finite(value)
        if bad:
            kind, advice = (
                (ValueError, "Repair the checkpoint, or leave the layer dense.")
                if label == "weight"
                else (CalibrationError, "Collect the moments again, in bfloat16 or float32.")
            )
            raise kind(
                f"{name}: {bad} of {value.numel()} entries of {label} are not finite. {advice}"
            )
