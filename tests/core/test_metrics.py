import pytest
import torch

from watersic_hf.core import MomentAccumulator, Moments, gap_to_bound, relative_output_error
from watersic_hf.testing import assert_close, random_layer


def tokens(seed, columns=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(500, columns, generator=g, dtype=torch.float64)


def test_error_is_the_relative_error_of_the_outputs():
    x_TN, drifted_TN = tokens(0), tokens(0) + 0.1 * tokens(1)
    weight_AN = random_layer(7, 12, seed=0)[0]
    guess_AN = weight_AN + 0.1 * random_layer(7, 12, seed=1)[0]
    plain, drift = MomentAccumulator(12), MomentAccumulator(12, drift=True)
    plain.add(x_TN)
    drift.add(x_TN, drifted_TN)

    errors = [relative_output_error(weight_AN, guess_AN, sums.result()) for sums in (plain, drift)]

    output_TA = x_TN @ weight_AN.T
    for seen_TN, error in zip((x_TN, drifted_TN), errors, strict=True):
        wanted = (output_TA - seen_TN @ guess_AN.T).square().sum() / output_TA.square().sum()
        assert error == pytest.approx(float(wanted), rel=1e-10)


def test_error_with_a_diagonal_equals_error_with_its_matrix():
    weight_AN, cov_NN = random_layer(7, 12, seed=0)
    power_N = cov_NN.diagonal()
    errors = [
        relative_output_error(weight_AN, weight_AN.round(decimals=1), Moments(cov=cov, tokens=0))
        for cov in (power_N, power_N.diag())
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


def test_zero_weight_has_error_one_and_zero_output_error_zero():
    weight_AN, cov_NN = random_layer(7, 12, seed=0)
    moments = Moments(cov=cov_NN, tokens=0)
    assert relative_output_error(weight_AN, 0 * weight_AN, moments) == pytest.approx(1)
    assert relative_output_error(0 * weight_AN, 0 * weight_AN, moments) == 0


def test_gap_is_relative_to_the_shannon_rate():
    assert gap_to_bound(2.25, torch.ones(4), 1 / 16) == pytest.approx(0.25)


def test_assert_close_compares_root_mean_squares():
    expected = torch.tensor([3.0, 4.0])
    assert_close(expected * 1.01, expected, tolerance=0.0101)
    with pytest.raises(AssertionError, match=r"RMS of the difference is 0\.01"):
        assert_close(expected * 1.01, expected, tolerance=0.0099)
    with pytest.raises(AssertionError, match="nan"):
        assert_close(expected * float("nan"), expected, tolerance=1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[:1], expected, tolerance=1.0)
