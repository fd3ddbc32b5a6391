import logging

import pytest
import torch

from watersic_hf.core.moments import CalibrationError, Moments
from watersic_hf.core.whiten import (
    Whitening,
    damped_cholesky,
    damping_for,
    damping_shift,
    live_columns,
    whitened_target,
)
from watersic_hf.testing import assert_close, random_layer


def test_columns_far_below_the_median_are_dead():
    power_N = torch.tensor([1e6, 1.0, 2.0, 0.9e-3, 1.1e-3, 0.0, 1.0, 3.0])
    live = [True, True, True, False, True, False, True, True]
    assert live_columns(power_N).tolist() == live
    assert live_columns(power_N.diag()).tolist() == live


def test_zero_columns_are_dead_even_if_most_are_zero():
    assert live_columns(torch.tensor([0.0, 0.0, 0.0, 1.0])).tolist() == [False, False, False, True]


def test_factor_is_that_of_the_damped_moment():
    _, cov_NN = random_layer(1, 20, seed=0)
    chol_NN, damping = damped_cholesky(cov_NN, 1e-2, tokens=0, name="layer")
    shift = 1e-2 * cov_NN.diagonal().mean()
    assert damping == 1e-2
    assert_close(chol_NN @ chol_NN.T, cov_NN + shift * torch.eye(20).double(), tolerance=1e-14)
    chol_N, _ = damped_cholesky(cov_NN.diagonal(), 1e-2, tokens=0, name="layer")
    assert_close(chol_N.square(), cov_NN.diagonal() + shift, tolerance=1e-14)


def test_failed_factorization_is_retried_with_more_damping_and_logged(caplog):
    # eigenvalues 1.005 and -0.005; the mean of the diagonal is 0.5
    cov_NN = torch.tensor([[0.5, 0.505], [0.505, 0.5]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        _, damping = damped_cholesky(cov_NN, 1e-3, tokens=9, name="block.3.q_proj")
    assert damping == pytest.approx(0.1)
    assert [record.getMessage() for record in caplog.records] == [
        "block.3.q_proj: the input covariance is not positive definite with damping 0.001; "
        "trying 0.01.",
        "block.3.q_proj: the input covariance is not positive definite with damping 0.01; "
        "trying 0.1.",
    ]


def test_indefinite_moment_raises_with_the_layer():
    cov_NN = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"q_proj: .*\(2 x 2\).*damping 0\.1; 7 calibration"):
        damped_cholesky(cov_NN, 1e-4, tokens=7, name="q_proj")


@pytest.mark.parametrize("with_residual", [False, True])
def test_equal_streams_give_the_target_without_drift(with_residual):
    weight_AN, cov_NN = random_layer(30, 20, seed=0)
    residual_AN = 0.01 * random_layer(30, 20, seed=1)[0] if with_residual else None
    chol_NN, damping = damped_cholesky(cov_NN, 1e-4, tokens=0, name="layer")
    plain = Moments(cov=cov_NN, tokens=0, residual_AN=residual_AN)
    drift = Moments(
        cov=cov_NN,
        tokens=0,
        drifted_cov_NN=cov_NN,
        cross_cov_NN=cov_NN,
        residual_AN=residual_AN,
    )

    plain_AN = whitened_target(weight_AN, plain, chol_NN, damping)

    assert_close(whitened_target(weight_AN, drift, chol_NN, damping), plain_AN, tolerance=1e-10)


def test_diagonal_moment_gives_the_target_of_its_matrix():
    weight_AN, cov_NN = random_layer(30, 20, seed=0)
    power_N, residual_AN = cov_NN.diagonal(), 0.01 * random_layer(30, 20, seed=1)[0]
    targets = []
    for cov in (power_N, power_N.diag()):
        chol, damping = damped_cholesky(cov, 1e-4, tokens=0, name="layer")
        moments = Moments(cov=cov, tokens=0, residual_AN=residual_AN)
        targets.append(whitened_target(weight_AN, moments, chol, damping))
    assert_close(*targets, tolerance=1e-14)


def test_columns_of_the_target_are_contiguous():
    weight_AN, cov_NN = random_layer(30, 20, seed=0)
    chol_NN, damping = damped_cholesky(cov_NN, 1e-4, tokens=0, name="layer")
    drift = Moments(cov=cov_NN, tokens=0, drifted_cov_NN=cov_NN, cross_cov_NN=cov_NN)
    for moments in (Moments(cov=cov_NN, tokens=0), drift):
        assert whitened_target(weight_AN, moments, chol_NN, damping).T.is_contiguous()


def drifting_streams(tokens=4000, columns=12, rows=5):
    g = torch.Generator().manual_seed(3)
    x_TN = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=g, dtype=torch.float64) / 6
    noise = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    drifted_TN = x_TN + x_TN @ mixing + 0.3 * noise
    residual_TA = drifted_TN[:, :rows] * 0.5 + torch.randn(
        tokens, rows, generator=g, dtype=torch.float64
    )
    return x_TN, drifted_TN, residual_TA


@pytest.mark.parametrize("with_residual", [False, True])
def test_target_is_the_least_squares_weight_on_the_drifted_input(with_residual):
    x_TN, drifted_TN, residual_TA = drifting_streams()
    weight_AN = torch.randn(5, 12, dtype=torch.float64)
    T = len(x_TN)
    moments = Moments(
        cov=x_TN.T @ x_TN / T,
        drifted_cov_NN=drifted_TN.T @ drifted_TN / T,
        cross_cov_NN=x_TN.T @ drifted_TN / T,
        residual_AN=residual_TA.T @ drifted_TN / T if with_residual else None,
        tokens=T,
    )

    chol_NN, damping = damped_cholesky(moments.layer_cov, 1e-12, tokens=T, name="layer")
    target_AN = whitened_target(weight_AN, moments, chol_NN, damping)
    found_AN = torch.linalg.solve_triangular(chol_NN, target_AN, upper=False, left=False)

    # the same problem, token by token
    wanted_TA = x_TN @ weight_AN.T + (residual_TA if with_residual else 0)
    expected_AN = torch.linalg.lstsq(drifted_TN, wanted_TA).solution.T
    assert_close(found_AN, expected_AN, tolerance=1e-9)


def test_fraction_of_the_drift_moves_the_target_in_proportion():
    x_TN, drifted_TN, residual_TA = drifting_streams()
    T = len(x_TN)
    moments = Moments(
        cov=x_TN.T @ x_TN / T,
        drifted_cov_NN=drifted_TN.T @ drifted_TN / T,
        cross_cov_NN=x_TN.T @ drifted_TN / T,
        residual_AN=residual_TA.T @ drifted_TN / T,
        tokens=T,
    )
    weight_AN = torch.randn(5, 12, dtype=torch.float64)

    linear = [moments.with_drift(fraction).linear_term(weight_AN) for fraction in (0.0, 0.25, 1.0)]

    assert_close(linear[0], weight_AN @ moments.drifted_cov_NN, tolerance=1e-12)
    assert_close(linear[1], 0.75 * linear[0] + 0.25 * linear[2], tolerance=1e-12)
    assert_close(linear[2], moments.linear_term(weight_AN), tolerance=1e-12)


def test_mixed_moments_are_the_weighted_mean_of_all_fields():
    x_TN, drifted_TN, residual_TA = drifting_streams()
    T = len(x_TN)

    def of(weight_T1):
        return Moments(
            cov=x_TN.T @ (weight_T1 * x_TN) / T,
            drifted_cov_NN=drifted_TN.T @ (weight_T1 * drifted_TN) / T,
            cross_cov_NN=x_TN.T @ (weight_T1 * drifted_TN) / T,
            residual_AN=residual_TA.T @ (weight_T1 * drifted_TN) / T,
            tokens=T,
        )

    weight_T1 = torch.rand(T, 1, dtype=torch.float64)
    mixed, direct = of(1.0).mix(of(weight_T1), 0.3), of(0.7 + 0.3 * weight_T1)

    for field in ("cov", "drifted_cov_NN", "cross_cov_NN", "residual_AN"):
        assert_close(getattr(mixed, field), getattr(direct, field), tolerance=1e-12)


def test_dead_columns_are_left_out_of_the_whitening():
    weight_AN, cov_NN = random_layer(6, 8, seed=1)
    cov_NN[3] = cov_NN[:, 3] = 0
    x_TN = torch.randn(5, 8)

    whitening = Whitening.of(Moments(cov=cov_NN, tokens=9), 1e-3, name="layer")

    live = [0, 1, 2, 4, 5, 6, 7]
    alone = Whitening.of(Moments(cov=cov_NN[live][:, live], tokens=9), 1e-3, name="layer")
    variance_N = whitening.variances(weight_AN)
    assert float(variance_N[3]) == 0
    assert_close(variance_N[live], alone.variances(weight_AN[:, live]), tolerance=1e-12)
    assert_close(whitening.leverages(x_TN), alone.leverages(x_TN[:, live]), tolerance=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_leverage_is_the_quadratic_form_of_the_damped_inverse(diagonal):
    x_TN = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    x_TN[0] *= 100
    cov = x_TN.square().mean(0) if diagonal else x_TN.T @ x_TN / 40
    moments = Moments(cov=cov, tokens=40)
    cov_NN = torch.diag(cov) if diagonal else cov
    damped_NN = cov_NN + 0.1 * cov_NN.diagonal().mean() * torch.eye(8, dtype=torch.float64)

    leverage_T = Whitening.of(moments, 0.1, name="layer").leverages(x_TN)

    solved_NT = torch.linalg.solve(damped_NN, x_TN.T)
    assert_close(leverage_T, (x_TN.T * solved_NT).sum(0) / 8, tolerance=1e-6)


def test_mean_leverage_without_damping_is_one():
    x_TN = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments(cov=x_TN.T @ x_TN / 40, tokens=40)

    leverage_T = Whitening.of(moments, 1e-12, name="layer").leverages(x_TN)

    assert float(leverage_T.mean()) == pytest.approx(1)


def test_damping_decreases_with_tokens_to_the_minimum():
    power_N = torch.ones(1000)

    assert damping_for(power_N, 1000) == pytest.approx(4)
    assert damping_for(torch.diag(power_N), 100_000) == pytest.approx(0.04)
    assert damping_for(power_N, 100_000_000) == 1e-4
    assert damping_for(power_N, 0) == 1e-4


def test_massive_column_does_not_raise_the_damping_of_the_others():
    power_N = torch.ones(1000)
    plain = damping_shift(power_N, damping_for(power_N, 100_000))
    power_N[3] = 1e4

    massive = damping_shift(power_N, damping_for(power_N, 100_000))

    assert float(massive) == pytest.approx(float(plain), rel=1e-3)
