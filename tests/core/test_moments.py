import pytest
import torch

from watersic_hf.core import CalibrationError, MomentAccumulator, Moments, not_finite
from watersic_hf.testing import assert_close


def streams(tokens=3000, columns=6, rows=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_TN = torch.randn(tokens, columns, generator=g) + 1
    drifted_TN = x_TN + 0.1 * torch.randn(tokens, columns, generator=g)
    return x_TN, drifted_TN, torch.randn(tokens, rows, generator=g)


def test_moments_are_uncentred_means_over_all_batches():
    x_TN, drifted_TN, residual_TA = streams()
    sums = MomentAccumulator(6, drift=True, rows_of_residual=4)
    for part in (slice(0, 1), slice(1, 1500), slice(1500, 3000)):
        sums.add(x_TN[part], drifted_TN[part], residual_TA=residual_TA[part])

    moments = sums.result()

    x, drifted, residual = x_TN.double(), drifted_TN.double(), residual_TA.double()
    # products of up to `TOKENS_PER_BLOCK` tokens are summed in float32
    assert_close(moments.cov, x.T @ x / 3000, tolerance=1e-6)
    assert_close(moments.drifted_cov_NN, drifted.T @ drifted / 3000, tolerance=1e-6)
    assert_close(moments.cross_cov_NN, x.T @ drifted / 3000, tolerance=1e-6)
    assert_close(moments.residual_AN, residual.T @ drifted / 3000, tolerance=1e-5)
    assert moments.tokens == 3000
    assert moments.cov.dtype == torch.float64


def test_panels_of_wide_moments_are_summed_and_mirrored():
    torch.manual_seed(0)
    x_TN, drifted_TN = torch.randn(2, 40, 600, dtype=torch.float64)
    weight_T = torch.rand(40)
    sums = MomentAccumulator(600, drift=True)

    for part in (slice(0, 30), slice(30, 40)):
        sums.add(x_TN[part], drifted_TN[part], weight_T=weight_T[part])
    moments = sums.result()

    weighted_TN = drifted_TN * weight_T[:, None]
    assert_close(moments.cov, x_TN.T @ (x_TN * weight_T[:, None]) / 40, tolerance=1e-13)
    assert_close(moments.drifted_cov_NN, drifted_TN.T @ weighted_TN / 40, tolerance=1e-13)
    assert_close(moments.cross_cov_NN, x_TN.T @ weighted_TN / 40, tolerance=1e-13)


def test_token_weights_multiply_the_products_of_both_streams():
    x_TN, drifted_TN, residual_TA = streams()
    weight_T = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    sums = MomentAccumulator(6, drift=True, rows_of_residual=4)

    sums.add(x_TN, drifted_TN, weight_T=weight_T, residual_TA=residual_TA)

    moments, root_T1 = sums.result(), weight_T.double().sqrt()[:, None]
    x, drifted, residual = x_TN * root_T1, drifted_TN * root_T1, residual_TA * root_T1
    assert_close(moments.cov, x.T @ x / 3000, tolerance=1e-6)
    assert_close(moments.drifted_cov_NN, drifted.T @ drifted / 3000, tolerance=1e-6)
    assert_close(moments.cross_cov_NN, x.T @ drifted / 3000, tolerance=1e-6)
    assert_close(moments.residual_AN, residual.T @ drifted / 3000, tolerance=1e-5)


def test_residual_moment_without_drift_uses_the_original_input():
    x_TN, _, residual_TA = streams()
    sums = MomentAccumulator(6, rows_of_residual=4)
    sums.add(x_TN, residual_TA=residual_TA)
    wanted_AN = residual_TA.double().T @ x_TN.double() / 3000
    moments = sums.result()
    assert_close(moments.residual_AN, wanted_AN, tolerance=1e-5)
    assert moments.drifted_cov_NN is None


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_fraction_of_the_drift_interpolates_the_original_input(fraction):
    x_TN, drifted_TN, residual_TA = (stream.double() for stream in streams())
    between_TN = drifted_TN.lerp(x_TN, fraction)
    found, wanted = (MomentAccumulator(6, drift=True, rows_of_residual=4) for _ in range(2))
    found.add(x_TN, drifted_TN, residual_TA=residual_TA)
    wanted.add(between_TN, drifted_TN, residual_TA=fraction * residual_TA)

    found, wanted = found.result().with_drift(fraction), wanted.result()

    for field in ("cov", "drifted_cov_NN", "cross_cov_NN", "residual_AN"):
        assert_close(getattr(found, field), getattr(wanted, field), tolerance=1e-12)


@pytest.mark.parametrize("wide", ["x", "drifted", "residual", "weight"])
def test_streams_of_different_dtypes_are_summed_in_the_widest(wide):
    x_TN = torch.randn(20, 4)
    tensors = {
        "x": x_TN,
        "drifted": x_TN + 0.1,
        "residual": torch.randn(20, 3),
        "weight": torch.rand(20),
    }
    tensors[wide] = tensors[wide].double()
    sums = MomentAccumulator(4, drift=True, rows_of_residual=3)

    sums.add(
        tensors["x"],
        tensors["drifted"],
        weight_T=tensors["weight"],
        residual_TA=tensors["residual"],
    )

    weighted_TN = tensors["drifted"].double() * tensors["weight"].double()[:, None]
    wanted_AN = tensors["residual"].double().T @ weighted_TN / 20
    assert torch.allclose(sums.result().residual_AN, wanted_AN, rtol=1e-12)


def test_result_can_be_called_only_once():
    sums = MomentAccumulator(6)
    sums.add(streams()[0])
    sums.result()

    with pytest.raises(CalibrationError, match="no token was added"):
        sums.result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_inputs_of_any_float_dtype_are_summed_to_float32_accuracy(dtype):
    x_TN = streams()[0].to(dtype)
    sums = MomentAccumulator(6)

    sums.add(x_TN.reshape(3, 1000, 6))

    wide_TN = x_TN.double()
    # products of bfloat16 are multiples of one power of two: float32 sums round half to even often
    assert_close(sums.result().cov, wide_TN.T @ wide_TN / 3000, tolerance=2e-6)


def test_matmul_precision_of_the_user_is_restored():
    before = torch.get_float32_matmul_precision()
    MomentAccumulator(6).add(streams(tokens=10)[0].bfloat16())
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_inputs_are_rejected_with_their_number(value):
    x_TN = streams(tokens=10)[0]
    x_TN[2:5, 1] = value
    with pytest.raises(CalibrationError, match="3 of 60 entries of x are NaN or infinite"):
        MomentAccumulator(6).add(x_TN)


def test_result_without_tokens_raises():
    sums = MomentAccumulator(6)
    sums.add(torch.empty(0, 6))
    with pytest.raises(CalibrationError, match="no token was added"):
        sums.result()


def test_missing_unexpected_or_mismatched_streams_raise():
    x_TN, drifted_TN, _ = streams(tokens=10)
    with pytest.raises(ValueError, match="drifted stream was not announced"):
        MomentAccumulator(6).add(x_TN, drifted_TN)
    with pytest.raises(ValueError, match="drifted stream is needed"):
        MomentAccumulator(6, drift=True).add(x_TN)
    with pytest.raises(ValueError, match="drifted has 9 tokens, but x has 10"):
        MomentAccumulator(6, drift=True).add(x_TN, drifted_TN[1:])
    with pytest.raises(ValueError, match="7 entries per token"):
        MomentAccumulator(7).add(x_TN)
    with pytest.raises(ValueError, match="float dtype"):
        MomentAccumulator(6).add(x_TN.int())
    with pytest.raises(ValueError, match="one for each of the 10 tokens"):
        MomentAccumulator(6).add(x_TN, weight_T=torch.ones(9))
    with pytest.raises(ValueError, match="non-negative"):
        MomentAccumulator(6).add(x_TN, weight_T=-torch.ones(10))


def test_moments_reject_mismatched_shapes():
    eye_NN = torch.eye(3)
    with pytest.raises(ValueError, match="square or a diagonal"):
        Moments(cov=torch.ones(2, 3), tokens=1)
    with pytest.raises(ValueError, match="belong together"):
        Moments(cov=eye_NN, tokens=1, drifted_cov_NN=eye_NN)
    with pytest.raises(ValueError, match="one size"):
        Moments(cov=eye_NN, tokens=1, drifted_cov_NN=eye_NN, cross_cov_NN=torch.eye(2))
    with pytest.raises(ValueError, match="one size"):
        Moments(cov=torch.ones(3), tokens=1, drifted_cov_NN=torch.ones(3), cross_cov_NN=eye_NN)
    with pytest.raises(ValueError, match="3 columns"):
        Moments(cov=eye_NN, tokens=1, residual_AN=torch.ones(5, 2))


def test_identity_moments_are_a_diagonal_without_tokens():
    moments = Moments.identity(5)
    assert moments.cov.tolist() == [1.0] * 5
    assert moments.tokens == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_not_finite_counts_nan_and_infinity(dtype):
    values = torch.randn(300, 70).to(dtype)
    assert not_finite(values) == not_finite(values[:0]) == 0
    for bad in ("nan", "inf", "-inf"):
        values[299, 69] = values[0, 0] = float(bad)
        assert not_finite(values) == not_finite(values.T) == 2
