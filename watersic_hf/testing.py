"""Synthetic layers, codes and comparisons for tests and benchmarks.

Shapes: A = out_features (rows), N = in_features (columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from watersic_hf.codec import Path
from watersic_hf.codec.trellis import quantizers, value_of


def random_layer(
    rows: int,
    cols: int,
    *,
    seed: int,
    input_spread: float = 0.7,
    weight_spread: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """Return a Gaussian weight and an input covariance that resemble those of transformers.

    The inputs are a few shared directions of decaying strength plus independent noise. Their
    columns differ in scale.

    Args:
        rows: A.
        cols: N.
        seed: seed of the random generator.
        input_spread: standard deviation of the log scale of the input columns.
        weight_spread: standard deviation of the log scale of the weight's rows and columns; 0 makes
            its entries independent and identically distributed.

    Returns:
        weight_AN and cov_NN, float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions = max(1, cols // 2)
    strength_K = torch.arange(1, directions + 1, dtype=torch.float64) ** -0.5
    factors_NK = normal(cols, directions) * strength_K
    scale_N = (input_spread * normal(cols)).exp()
    cov_NN = (factors_NK @ factors_NK.T + 0.2 * torch.eye(cols, dtype=torch.float64)) * scale_N
    cov_NN = cov_NN * scale_N[:, None]
    weight_AN = normal(rows, cols) * (weight_spread * normal(rows, 1)).exp()
    weight_AN = weight_AN * (weight_spread * normal(cols)).exp() / cols**0.5
    return weight_AN, cov_NN


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Check that two tensors agree up to `tolerance`, relative to the RMS of `expected`.

    Raises:
        AssertionError: the shapes differ, or the RMS of the difference exceeds `tolerance` times
            the RMS of `expected`.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    ratio = float(difference / expected.double().square().mean().sqrt().clamp(min=1e-300))
    if not ratio <= tolerance:
        raise AssertionError(
            f"RMS of the difference is {ratio:.3g} of the expected RMS, not <= {tolerance:g}"
        )


def uneven_codes(rows: int, columns: int, *, spread: float = 2.0, seed: int = 0) -> Tensor:
    """Return int32 codes whose columns differ in scale; some columns are zero, two codes are huge.

    Args:
        rows: A.
        columns: N.
        spread: standard deviation of the log2 scale of the columns.
        seed: seed of the random generator.
    """
    generator = torch.Generator().manual_seed(seed)
    scale_N = torch.exp2(spread * torch.randn(columns, generator=generator))
    found_AN = (torch.randn(rows, columns, generator=generator) * scale_N).round().int()
    found_AN[:, ::7] = 0
    found_AN[0, -1], found_AN[-1, 0] = 7049, -100_000
    return found_AN


def trellis_values(
    rows: int, columns: int, *, path_rows: int, spread: float = 1.0
) -> tuple[Tensor, Path]:
    """Return values of a trellis whose codes are `uneven_codes`, and their path."""
    generator = torch.Generator().manual_seed(rows + columns)
    row_class_A = torch.randint(0, 20, (rows,), generator=generator)
    order_A = row_class_A.argsort(stable=True)
    codes_AN = uneven_codes(rows, columns, spread=spread)[order_A].int().numpy()
    values_AN = torch.empty(rows, columns, dtype=torch.int32)
    values_AN[order_A] = torch.from_numpy(value_of(codes_AN, quantizers(codes_AN, path_rows)))
    return values_AN, Path(row_class_A, path_rows)
