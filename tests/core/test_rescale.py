import pytest
import torch

from watersic_hf.core.rescale import rescale
from watersic_hf.core.waterfill import spacings, step_for_rate
from watersic_hf.core.zsic import zsic
from watersic_hf.testing import assert_close, random_layer


def problem(rows=60, cols=40, *, rate=1.0, diagonal=False, seed=0):
    weight_AN, cov = random_layer(rows, cols, seed=seed)
    chol = torch.linalg.cholesky(cov)
    if diagonal:
        cov = cov.diagonal().clone()
        chol = cov.sqrt()
    step = float(step_for_rate(weight_AN, chol, rate))
    linear_AN = weight_AN * cov if diagonal else weight_AN @ cov
    target_AN = weight_AN * chol if diagonal else weight_AN @ chol
    codes_AN, shrinkage_N = zsic(target_AN, chol, step)
    energy = float((linear_AN * weight_AN).sum())
    given = {"cov": cov, "linear_AN": linear_AN, "energy": energy}
    return (codes_AN, spacings(chol, step), shrinkage_N), given


def objective(codes_AN, spacing_N, row_A, gain_N, *, cov, linear_AN, energy):
    weight_AN = codes_AN * (spacing_N * gain_N) * row_A[:, None]
    seen_AN = weight_AN * cov if cov.ndim == 1 else weight_AN @ cov
    return float(energy - 2 * (linear_AN * weight_AN).sum() + (seen_AN * weight_AN).sum())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rate", [-1.5, 0.0, 1.0, 3.0, 10.0])
def test_rescaling_never_increases_the_objective(rate, diagonal):
    for seed in range(3):
        coded, given = problem(rate=rate, diagonal=diagonal, seed=seed)
        codes_AN, spacing_N, shrinkage_N = coded

        row_A, gain_N = rescale(*coded, **given)

        before = objective(codes_AN, spacing_N, torch.ones(60).double(), shrinkage_N, **given)
        after = objective(codes_AN, spacing_N, row_A, gain_N, **given)
        assert after <= before * (1 + 1e-6)


def test_rescaling_lowers_the_objective_at_low_rate():
    coded, given = problem(rate=0.0)
    before = objective(*coded[:2], torch.ones(60).double(), coded[2], **given)
    after = objective(*coded[:2], *rescale(*coded, **given), **given)
    assert after < 0.98 * before


def test_row_scales_have_mean_one():
    coded, given = problem()
    row_A, _ = rescale(*coded, **given)
    assert float(row_A.abs().mean()) == pytest.approx(1, rel=1e-12)


def test_scales_do_not_depend_on_the_units_of_the_weight():
    coded, given = problem()
    codes_AN, spacing_N, shrinkage_N = coded
    row_A, gain_N = rescale(*coded, **given)
    tiny = {**given, "linear_AN": 1e-6 * given["linear_AN"], "energy": 1e-12 * given["energy"]}

    tiny_row_A, tiny_gain_N = rescale(codes_AN, 1e-6 * spacing_N, shrinkage_N, **tiny)

    assert_close(tiny_row_A, row_A, tolerance=1e-9)
    assert_close(tiny_gain_N, gain_N, tolerance=1e-9)


def test_diagonal_moment_gives_the_scales_of_its_matrix():
    coded, given = problem(diagonal=True)
    row_A, gain_N = rescale(*coded, **given)
    full_row_A, full_gain_N = rescale(*coded, **{**given, "cov": given["cov"].diag()})
    assert_close(row_A, full_row_A, tolerance=1e-10)
    assert_close(gain_N, full_gain_N, tolerance=1e-10)


@pytest.mark.parametrize("diagonal", [False, True])
def test_shift_is_added_to_the_diagonal_of_the_moment(diagonal):
    coded, given = problem(diagonal=diagonal)
    shift = 0.3 * float(given["cov"].mean() if diagonal else given["cov"].diagonal().mean())
    shifted = given["cov"] + (shift if diagonal else shift * torch.eye(40))

    found = rescale(*coded, **given, shift=shift)
    wanted = rescale(*coded, **given | {"cov": shifted})

    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, tolerance=1e-7)


def test_rows_and_columns_without_codes_get_scale_zero():
    (codes_AN, spacing_N, shrinkage_N), given = problem()
    codes_AN, shrinkage_N = codes_AN.clone(), shrinkage_N.clone()
    codes_AN[3] = 0
    codes_AN[:, 5] = 0
    shrinkage_N[5] = 0

    row_A, gain_N = rescale(codes_AN, spacing_N, shrinkage_N, **given)

    assert float(row_A[3]) == 0
    assert float(gain_N[5]) == 0
    assert bool(torch.isfinite(row_A).all() and torch.isfinite(gain_N).all())


def test_slightly_indefinite_moment_gives_finite_scales():
    coded, given = problem()
    cov_NN = given["cov"] - 1.0 * torch.eye(40) * torch.linalg.eigvalsh(given["cov"])[5]
    row_A, gain_N = rescale(*coded, **{**given, "cov": cov_NN})
    assert bool(torch.isfinite(row_A).all() and torch.isfinite(gain_N).all())
