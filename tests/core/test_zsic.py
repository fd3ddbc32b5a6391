import pytest
import torch

from watersic_hf.core.moments import Moments
from watersic_hf.core.waterfill import spacings, step_for_rate
from watersic_hf.core.whiten import damped_cholesky, whitened_target
from watersic_hf.core.zsic import BLOCK, zsic, zsic_block
from watersic_hf.testing import assert_close, random_layer

SIZES = [1, 5, 127, 300]


def problem(rows, cols, *, rate=2.0, seed=0):
    weight_AN, cov_NN = random_layer(rows, cols, seed=seed)
    chol_NN, damping = damped_cholesky(cov_NN, 1e-4, tokens=0, name="layer")
    target_AN = whitened_target(weight_AN, Moments(cov=cov_NN, tokens=0), chol_NN, damping)
    return target_AN, chol_NN, float(step_for_rate(weight_AN, chol_NN, rate))


def plain(target_AN, chol_NN, step):
    target_NA = target_AN.T.clone(memory_format=torch.contiguous_format)
    codes_NA = torch.full_like(target_NA, 0x7F7F7F7F, dtype=torch.int32)
    shrinkage_N = torch.full_like(target_NA[:, 0], float("nan"))
    zsic_block(target_NA, chol_NN, step, codes_NA, shrinkage_N)
    return codes_NA.T, shrinkage_N, target_NA.T


@pytest.mark.parametrize("cols", SIZES)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("rate", [-1.0, 3.0])
def test_blocked_codes_equal_the_plain_recursion(rows, cols, rate):
    target_AN, chol_NN, step = problem(rows, cols, rate=rate)

    codes_AN, shrinkage_N = zsic(target_AN, chol_NN, step)

    wanted_AN, wanted_N, _ = plain(target_AN, chol_NN, step)
    assert torch.equal(codes_AN, wanted_AN)
    assert torch.allclose(shrinkage_N, wanted_N, rtol=0, atol=1e-10)


def test_recursion_equals_the_paper_with_full_width_updates():
    target_AN, chol_NN, step = problem(40, 30, rate=1.0)
    left_AN, wanted_AN = target_AN.clone(), torch.zeros_like(target_AN)
    for i in reversed(range(30)):
        z_A = (left_AN[:, i] / step).round()
        if z_A @ z_A > 0:
            gain = z_A @ left_AN[:, i] / (step * (z_A @ z_A))
            left_AN -= gain * step / chol_NN[i, i] * torch.outer(z_A, chol_NN[i])
        wanted_AN[:, i] = z_A

    codes_AN, _ = zsic(target_AN, chol_NN, step)

    assert torch.equal(codes_AN, wanted_AN.int())


def test_fed_back_values_are_the_quantized_weight():
    target_AN, chol_NN, step = problem(40, 30)
    codes_AN, shrinkage_N, fed_back_AN = plain(target_AN, chol_NN, step)
    assert_close(fed_back_AN, codes_AN * (shrinkage_N * spacings(chol_NN, step)), tolerance=1e-12)


def test_diagonal_factor_gives_the_codes_of_its_matrix():
    target_AN, chol_NN, step = problem(50, 70)
    chol_N = chol_NN.diagonal().clone()

    codes_AN, shrinkage_N = zsic(target_AN, chol_N, step)

    wanted_AN, wanted_N, _ = plain(target_AN, chol_N.diag(), step)
    assert torch.equal(codes_AN, wanted_AN)
    assert torch.allclose(shrinkage_N, wanted_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_target_is_not_changed_in_any_layout(diagonal):
    target_AN, chol, step = problem(9, 70)
    chol = chol.diagonal().clone() if diagonal else chol
    row_major_AN, before_AN = target_AN.contiguous(), target_AN.clone()

    first = zsic(target_AN, chol, step)
    second = zsic(row_major_AN, chol, step)

    assert torch.equal(first[0], second[0])
    assert torch.equal(target_AN, before_AN)
    assert torch.equal(row_major_AN, before_AN)


def test_block_step_gets_every_column_once():
    target_AN, chol_NN, step = problem(7, 300)
    widths = []

    def spy(target_BA, chol_BB, step, codes_BA, shrinkage_B):
        widths.append(len(target_BA))
        zsic_block(target_BA, chol_BB, step, codes_BA, shrinkage_B)

    codes_AN, _ = zsic(target_AN, chol_NN, step, block_step=spy)

    assert sum(widths) == 300
    assert max(widths) <= BLOCK
    assert len([width for width in widths if width < BLOCK]) <= 1
    assert torch.equal(codes_AN, zsic(target_AN, chol_NN, step)[0])


def test_all_zero_columns_have_gain_zero():
    target_AN, chol_NN, step = problem(8, 12)
    codes_AN, shrinkage_N = zsic(target_AN, chol_NN, 1e6 * step)
    assert not bool(codes_AN.any())
    assert not bool(shrinkage_N.any())


def test_gains_are_between_zero_and_one_at_low_rate():
    target_AN, chol_NN, step = problem(2000, 60, rate=-0.5)
    codes_AN, shrinkage_N = zsic(target_AN, chol_NN, step)
    used_N = (codes_AN != 0).any(0)
    assert torch.equal(shrinkage_N > 0, used_N)
    assert float(shrinkage_N.max()) <= 1
    assert float(shrinkage_N[used_N].mean()) < 0.95


def test_all_columns_carry_the_same_whitened_distortion_at_high_rate():
    target_AN, chol_NN, step = problem(4000, 40, rate=5.0)

    codes_AN, shrinkage_N = zsic(target_AN, chol_NN, step)

    weight_AN = codes_AN * (shrinkage_N * spacings(chol_NN, step))
    distortion_N = (target_AN - weight_AN @ chol_NN).square().mean(0)
    # 4000 samples of a uniform square: standard error 1.4 %, extreme of 40 columns below 4 of them
    assert torch.allclose(distortion_N / (step**2 / 12), torch.ones(40).double(), atol=0.06)


def test_step_that_exceeds_int32_is_rejected():
    target_AN, chol_NN, step = problem(4, 4)
    with pytest.raises(ValueError, match="beyond 1073741824; use a lower rate"):
        zsic(target_AN, chol_NN, step * 1e-12)
