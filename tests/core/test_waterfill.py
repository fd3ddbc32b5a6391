import math

import pytest
import torch

from watersic_hf.core.rate import pooled_entropy
from watersic_hf.core.waterfill import (
    SHAPING_LOSS,
    shannon_rate,
    spacings,
    step_for_budget,
    step_for_rate,
    whitened_variance,
)


def gaussian(rows=4096, cols=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight_AN = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    root_NN = torch.randn(cols, cols, generator=g, dtype=torch.float64) / 8
    eye_NN = torch.eye(cols, dtype=torch.float64)
    return weight_AN, torch.linalg.cholesky(root_NN @ root_NN.T + 0.1 * eye_NN)


def test_shaping_loss_is_a_quarter_bit():
    assert pytest.approx(0.2546, abs=1e-4) == SHAPING_LOSS


@pytest.mark.parametrize("rate", [3.0, 4.0])
def test_column_costs_the_requested_rate_plus_the_shaping_loss(rate):
    weight_AN, chol_NN = gaussian()

    step = step_for_rate(weight_AN, chol_NN, rate)

    codes_AN = (weight_AN * chol_NN.diagonal() / step).round().int()
    spent = sum(pooled_entropy(codes_AN[:, i]) for i in range(64)) / 64
    assert spent == pytest.approx(rate + SHAPING_LOSS, abs=0.02)


def test_every_bit_halves_the_step():
    weight_AN, chol_NN = gaussian(rows=100)
    ratio = step_for_rate(weight_AN, chol_NN, 1.0) / step_for_rate(weight_AN, chol_NN, 2.0)
    assert float(ratio) == pytest.approx(2, rel=1e-14)


def test_spacings_give_all_columns_the_same_whitened_step():
    _, chol_NN = gaussian(rows=1)
    assert torch.allclose(spacings(chol_NN, 0.3) * chol_NN.diagonal(), torch.tensor(0.3).double())


def test_zero_columns_do_not_change_the_step():
    weight_AN, chol_NN = gaussian(rows=100)
    wide_AN = torch.cat([weight_AN, torch.zeros(100, 3)], 1)
    wide_N = torch.cat([chol_NN.diagonal(), torch.ones(3)])
    wanted = float(step_for_rate(weight_AN, chol_NN.diagonal(), 2.0))
    assert float(step_for_rate(wide_AN, wide_N, 2.0)) == pytest.approx(wanted, rel=1e-14)


def test_budget_and_rate_give_the_same_step_if_all_columns_are_above_water():
    weight_AN, chol_NN = gaussian()
    wanted = float(step_for_rate(weight_AN, chol_NN, 6.0))
    assert float(step_for_budget(weight_AN, chol_NN, 6.0)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0, 4.0])
def test_budget_is_spent_by_the_columns_above_water(rate):
    weight_AN, chol_NN = gaussian()
    weight_AN = weight_AN * torch.logspace(-9, 0, 64, dtype=torch.float64)

    step = step_for_budget(weight_AN, chol_NN, rate)

    over_N = whitened_variance(weight_AN, chol_NN) / (step**2 / 12)
    assert float((0.5 * over_N.log2()).clamp(min=0).mean()) == pytest.approx(rate, rel=1e-9)


def test_shannon_rate_of_equal_components():
    assert shannon_rate(torch.full((5,), 3.0), 3.0 / 16) == pytest.approx(2.0)


def test_shannon_rate_inverts_the_waterfilling():
    variance_N = torch.logspace(-4, 2, 50, dtype=torch.float64)
    for level in (1e-6, 1e-2, 1.0, 90.0):
        distortion = float(variance_N.clamp(max=level).mean())
        rate = float((0.5 * (variance_N / level).log2()).clamp(min=0).mean())
        assert shannon_rate(variance_N, distortion) == pytest.approx(rate, rel=1e-9)


def test_shannon_rate_of_large_and_zero_distortion():
    variance_N = torch.tensor([0.0, 1.0, 2.0])
    assert shannon_rate(variance_N, 1.0) == 0.0
    assert shannon_rate(variance_N, 5.0) == 0.0
    assert shannon_rate(variance_N, 0.0) == math.inf
