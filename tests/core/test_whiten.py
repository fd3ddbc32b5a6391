import logging

import pytest
import torch

from watersic_hf.core.moments import CalibrationError, Moments
from watersic_hf.core.whiten import damped_cholesky, live_columns, whitened_target
from watersic_hf.testing import assert_close, random_layer


def test_dead_columns_are_those_far_below_the_median():
    power_N = torch.tensor([1e6, 1.0, 2.0, 0.9e-3, 1.1e-3, 0.0, 1.0, 3.0])
    live = [True, True, True, False, True, False, True, True]
    assert live_columns(power_N).tolist() == live
    assert live_columns(power_N.diag()).tolist() == live


def test_zero_columns_are_dead_even_when_they_are_most():
    assert live_columns(torch.tensor([0.0, 0.0, 0.0, 1.0])).tolist() == [False, False, False, True]


def test_the_factor_is_of_the_damped_moment():
    _, cov_NN = random_layer(1, 20, seed=0)
    chol_NN, damping = damped_cholesky(cov_NN, 1e-2, tokens=0, name="layer")
    shift = 1e-2 * cov_NN.diagonal().mean()
    assert damping == 1e-2
    assert_close(chol_NN @ chol_NN.T, cov_NN + shift * torch.eye(20).double(), tolerance=1e-14)
    chol_N, _ = damped_cholesky(cov_NN.diagonal(), 1e-2, tokens=0, name="layer")
    assert_close(chol_N.square(), cov_NN.diagonal() + shift, tolerance=1e-14)


def test_a_failed_factorization_is_damped_more_and_said_so(caplog):
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


def test_an_indefinite_moment_is_an_error_that_names_the_layer():
    cov_NN = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"q_proj: .*\(2 x 2\).*damping 0\.1; 7 calibration"):
        damped_cholesky(cov_NN, 1e-4, tokens=7, name="q_proj")


@pytest.mark.parametrize("with_residual", [False, True])
def test_drift_without_drift_gives_the_plain_target(with_residual):
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


def test_a_diagonal_moment_gives_the_target_of_its_matrix():
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
