import logging
import math
from dataclasses import fields, replace

import pytest
import torch

from watersic_hf.core import (
    CalibrationError,
    LayerSettings,
    MomentAccumulator,
    Moments,
    quantize_weight,
    relative_output_error,
)
from watersic_hf.core.rate import FINAL_TOLERANCE, paper_rate, pooled_entropy
from watersic_hf.testing import assert_close, random_layer


def charge(codes_AN, rows, path=None):
    """Charge magnitudes by their bit length, 16 bits per scale and a header of 64 bytes."""
    columns = codes_AN.shape[1]
    lengths = torch.frexp(codes_AN.double()).exponent
    # the leading bit is known and pays for the sign
    payload = pooled_entropy(lengths) + float(lengths.double().mean())
    return payload + 16 / rows + 16 / columns + 512 / (rows * columns)


def layer(rows=96, cols=64, *, seed=0):
    weight_AN, cov_NN = random_layer(rows, cols, seed=seed)
    return weight_AN, Moments(cov=cov_NN, tokens=1000)


def drifted_layer(rows=96, cols=64):
    weight_AN, cov_NN = random_layer(rows, cols, seed=0)
    g = torch.Generator().manual_seed(1)
    x_TN = torch.randn(4 * cols, cols, generator=g).double() @ torch.linalg.cholesky(cov_NN).T
    sums = MomentAccumulator(cols, drift=True, rows_of_residual=rows)
    noise_TN = 0.1 * torch.randn(x_TN.shape, generator=g) * x_TN.square().mean(0).sqrt()
    sums.add(x_TN, x_TN + noise_TN, residual_TA=-0.1 * noise_TN @ weight_AN.T)
    return weight_AN, sums.result()


def assert_finite(quantized):
    for field in fields(quantized):
        value = getattr(quantized, field.name)
        if isinstance(value, torch.Tensor):
            assert bool(torch.isfinite(value).all()), field.name
    assert quantized.error >= 0


@pytest.mark.parametrize("bits", [0.6, 1.0, 2.0, 3.0, 4.5, 8.0, 16.0])
def test_layer_costs_the_requested_bits(bits):
    weight_AN, moments = layer(1024, 192)
    quantized = quantize_weight(weight_AN, moments, bits=bits, charge=charge)
    assert quantized.bits == charge(quantized.codes_AN, 1024)
    # the budget compensates for what the search leaves
    assert quantized.bits == pytest.approx(bits, rel=FINAL_TOLERANCE)


@pytest.mark.parametrize("make", [layer, drifted_layer])
def test_error_decreases_with_bits(make):
    weight_AN, moments = make()
    errors = [
        quantize_weight(weight_AN, moments, bits=bits, charge=charge).error
        for bits in (1.0, 2.0, 3.0, 4.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_dequantize_multiplies_codes_and_scales():
    weight_AN, moments = layer()
    quantized = quantize_weight(weight_AN, moments, rate=6.0)
    wanted_AN = quantized.row_scale_A.diag() @ quantized.codes_AN.double()
    wanted_AN = wanted_AN @ quantized.col_scale_N.diag()
    assert_close(quantized.dequantize(), wanted_AN, tolerance=1e-14)
    assert_close(quantized.dequantize(), weight_AN, tolerance=0.1)


def test_scales_without_rescaling_are_spacing_times_shrinkage():
    weight_AN, moments = layer()
    settings = LayerSettings(rescale=False)
    plain = quantize_weight(weight_AN, moments, rate=1.0, settings=settings)
    assert plain.row_scale_A.tolist() == [1.0] * 96
    assert_close(plain.col_scale_N, plain.spacing_N * plain.shrinkage_N, tolerance=1e-15)
    assert quantize_weight(weight_AN, moments, rate=1.0).error < plain.error


def test_same_seed_gives_the_same_step():
    weight_AN, moments = layer(600, 64)
    settings = LayerSettings(search_rows=20)

    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return quantize_weight(
            weight_AN, moments, bits=2, charge=charge, settings=settings, generator=generator
        ).step

    assert run(None) == run(None) == run(0)
    assert run(3) == run(3) != run(0)


def test_search_uses_a_sample_and_charges_the_whole_layer():
    weight_AN, moments = layer(800, 32)
    calls = []

    def spy(codes_AN, rows, path=None):
        calls.append((len(codes_AN), rows, codes_AN.shape[1]))
        return charge(codes_AN, rows)

    quantize_weight(weight_AN, moments, bits=3, charge=spy, settings=LayerSettings(search_rows=10))

    sampled, full = {(80, 800, 32)}, {(800, 800, 32)}
    assert set(calls) == sampled | full
    assert calls.count((800, 800, 32)) <= 4


def test_budget_below_the_fixed_costs_warns_and_uses_the_coarsest_step(caplog):
    weight_AN, moments = layer(16, 16)
    with caplog.at_level(logging.WARNING):
        quantized = quantize_weight(weight_AN, moments, bits=2.0, charge=charge, name="model.tiny")
    (record,) = caplog.records
    assert "model.tiny: 2 bits per weight were requested" in record.getMessage()
    assert "alone cost 4" in record.getMessage()
    assert 0 < quantized.error < 1
    assert quantized.bits < 5.5


def test_drift_mode_has_less_error_than_ignoring_the_drift():
    weight_AN, moments = drifted_layer()
    unaware = Moments(cov=moments.cov, tokens=moments.tokens)
    aware = quantize_weight(weight_AN, moments, rate=3.0)
    blind = quantize_weight(weight_AN, unaware, rate=3.0)
    assert aware.error < relative_output_error(weight_AN, blind.dequantize(), moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_quantized_at_their_exact_values(dtype):
    weight_AN, moments = layer()
    narrow = quantize_weight(weight_AN.to(dtype), moments, rate=2.0)
    wide = quantize_weight(weight_AN.to(dtype).double(), moments, rate=2.0)
    assert torch.equal(narrow.codes_AN, wide.codes_AN)
    assert torch.equal(narrow.col_scale_N, wide.col_scale_N)


@pytest.mark.parametrize(("rate", "dtype"), [(2, torch.int8), (8, torch.int16), (20, torch.int32)])
def test_codes_have_the_smallest_dtype_that_holds_them(rate, dtype):
    assert quantize_weight(*layer(), rate=rate).codes_AN.dtype == dtype


def test_dead_and_zero_columns_have_zero_codes_and_scales():
    weight_AN, moments = layer()
    weight_AN[:, 3] = 0
    moments.cov[7] = 0
    moments.cov[:, 7] = 0
    wanted_N = torch.ones(64, dtype=torch.bool)
    wanted_N[[3, 7]] = False

    quantized = quantize_weight(weight_AN, moments, bits=3, charge=charge)

    assert torch.equal(quantized.live_N, wanted_N)
    assert not bool(quantized.codes_AN[:, ~wanted_N].any())
    assert not bool(quantized.col_scale_N[~wanted_N].any())
    assert_finite(quantized)
    assert quantized.bits == pytest.approx(3, rel=0.004)
    assert paper_rate(quantized.codes_AN, quantized.live_N) > 0
    assert quantized.error < 0.01


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (5, 127), (300, 5)])
@pytest.mark.parametrize("bits", [0.3, 3.0, 16.0])
def test_every_shape_gives_finite_results(shape, bits):
    weight_AN, moments = layer(*shape)
    assert_finite(quantize_weight(weight_AN, moments, bits=bits, charge=charge))
    assert_finite(quantize_weight(weight_AN, moments, rate=bits))


def test_a_single_token_gives_finite_results():
    weight_AN, _ = layer()
    sums = MomentAccumulator(64)
    sums.add(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    assert_finite(quantize_weight(weight_AN, sums.result(), rate=2.0))


@pytest.mark.parametrize("with_search", [False, True])
def test_zero_weight_has_zero_codes_and_no_error(with_search):
    request = {"bits": 3.0, "charge": charge} if with_search else {"rate": 3.0}
    quantized = quantize_weight(torch.zeros(8, 64), layer()[1], **request)
    assert not bool(quantized.codes_AN.any())
    assert not bool(quantized.dequantize().any())
    assert quantized.error == 0
    assert (quantized.bits is not None) == with_search
    assert_finite(quantized)


def test_step_that_rounds_everything_to_zero_gives_finite_scales():
    quantized = quantize_weight(*layer(), rate=-8.0)
    assert not bool(quantized.codes_AN.any())
    assert quantized.error == 1
    assert_finite(quantized)


def test_identity_covariance_needs_no_square_matrix():
    weight_AN = random_layer(16, 14336 // 64, seed=0)[0].repeat(1, 64).float()
    moments = Moments.identity(14336)
    quantized = quantize_weight(weight_AN, moments, bits=4.5, charge=charge)
    assert quantized.bits == pytest.approx(4.5, rel=0.01)
    difference = quantized.dequantize() - weight_AN
    wanted = float(difference.square().sum() / weight_AN.double().square().sum())
    assert quantized.error == pytest.approx(wanted, rel=1e-6)


def test_diagonal_moment_gives_the_same_codes_as_its_matrix():
    weight_AN, moments = layer()
    power_N = moments.cov.diagonal().clone()
    diagonal = quantize_weight(weight_AN, Moments(cov=power_N, tokens=1), rate=2.0)
    matrix = quantize_weight(weight_AN, Moments(cov=power_N.diag(), tokens=1), rate=2.0)
    assert torch.equal(diagonal.codes_AN, matrix.codes_AN)
    assert_close(diagonal.dequantize(), matrix.dequantize(), tolerance=1e-9)


@pytest.mark.parametrize("drift", [False, True])
def test_a_weight_with_zero_inputs_is_quantized_as_with_identity_moments(drift):
    weight_AN, moments = layer()
    zero_NN = torch.zeros_like(moments.cov)
    # with drift, what reaches the layer was rounded to zero in the quantized model only
    drifted = {"drifted_cov_NN": zero_NN, "cross_cov_NN": zero_NN} if drift else {}
    zero = Moments(cov=moments.cov if drift else zero_NN, tokens=100, **drifted)

    quantized = quantize_weight(weight_AN, zero, bits=3.0, charge=charge)

    wanted = quantize_weight(weight_AN, Moments.identity(64), bits=3.0, charge=charge)
    assert quantized.zero_input
    assert not wanted.zero_input
    assert torch.equal(quantized.codes_AN, wanted.codes_AN)
    assert torch.equal(quantized.dequantize(), wanted.dequantize())
    # all of the original output is lost, or there is none
    assert quantized.error == (1.0 if drift else 0.0)


def test_columns_with_zero_inputs_beside_columns_with_zero_weights():
    weight_AN, moments = layer()
    weight_AN[:, :32] = 0
    seen_N = torch.arange(64) < 32
    drifted_NN = moments.cov * (seen_N & seen_N[:, None])
    moments = replace(moments, drifted_cov_NN=drifted_NN, cross_cov_NN=moments.cov * seen_N)

    quantized = quantize_weight(weight_AN, moments, rate=3.0)

    assert quantized.zero_input
    assert_close(quantized.dequantize(), weight_AN, tolerance=0.2)


@pytest.mark.parametrize("drift", [False, True])
def test_a_zero_weight_with_zero_inputs_is_exact(drift):
    zero_NN = torch.zeros(64, 64, dtype=torch.float64)
    drifted = {"drifted_cov_NN": zero_NN, "cross_cov_NN": zero_NN} if drift else {}
    moments = Moments(cov=layer()[1].cov if drift else zero_NN, tokens=5, **drifted)

    quantized = quantize_weight(torch.zeros(48, 64), moments, bits=3.0, charge=charge)

    assert quantized.zero_input
    assert not bool(quantized.dequantize().any())
    assert math.isfinite(quantized.damping)


def test_nan_and_infinity_raise_with_layer_and_count():
    weight_AN, moments = layer()
    moments.cov[0, :2] = float("nan")
    with pytest.raises(CalibrationError, match="q: 2 of 4096 entries of cov are not finite"):
        quantize_weight(weight_AN, moments, rate=2.0, name="q")
    weight_AN[0, 0] = float("inf")
    with pytest.raises(ValueError, match="q: 1 of 6144 entries of weight are not finite"):
        quantize_weight(weight_AN, layer()[1], rate=2.0, name="q")


def test_indefinite_covariance_raises_with_layer_and_tokens():
    cov_NN = 2 * torch.ones(4, 4) - torch.eye(4)
    with pytest.raises(CalibrationError, match=r"v_proj: .* 9 calibration tokens cannot span 4"):
        quantize_weight(
            torch.randn(3, 4),
            Moments(cov=cov_NN, tokens=9),
            rate=2.0,
            name="v_proj",
            settings=LayerSettings(damping=1e-4),
        )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4), "non-empty float matrix"),
        (torch.ones(4, 64, dtype=torch.int32), "non-empty float matrix"),
        (torch.ones(0, 64), "non-empty float matrix"),
        (torch.ones(4, 63), "4 x 63, but the moments have 64 columns"),
    ],
)
def test_invalid_weights_are_rejected(weight, message):
    with pytest.raises(ValueError, match=f"k_proj: .*{message}"):
        quantize_weight(weight, layer()[1], rate=2.0, name="k_proj")


def test_residual_with_another_number_of_rows_is_rejected():
    moments = Moments(cov=torch.eye(4), tokens=1, residual_AN=torch.ones(3, 4))
    with pytest.raises(ValueError, match="have 4 columns and 3 residual rows"):
        quantize_weight(torch.ones(5, 4), moments, rate=2.0)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"bits": 3.0},
        {"rate": 3.0, "charge": charge},
        {"bits": 3.0, "rate": 3.0, "charge": charge},
        {"bits": 0.0, "charge": charge},
        {"bits": float("nan"), "charge": charge},
        {"rate": float("inf")},
    ],
)
def test_invalid_bits_or_rate_are_rejected(request_):
    with pytest.raises(ValueError, match="q_proj: "):
        quantize_weight(*layer(), **request_, name="q_proj")


def test_invalid_settings_are_rejected():
    with pytest.raises(ValueError, match=r"damping is -1\.0"):
        LayerSettings(damping=-1.0)
    with pytest.raises(ValueError, match="search_rows is 0"):
        LayerSettings(search_rows=0)


def test_important_rows_get_finer_steps_and_smaller_errors():
    weight_AN, cov_NN = random_layer(40, 24, seed=0)
    importance_A = torch.ones(40)
    importance_A[::2] = 16.0
    moments = Moments(cov=cov_NN, tokens=1_000_000)

    plain = quantize_weight(weight_AN, moments, rate=2.0)
    weighed = quantize_weight(weight_AN, moments, rate=2.0, row_importance_A=importance_A)

    def errors(quantized):
        difference_AN = quantized.dequantize() - weight_AN
        return ((difference_AN @ cov_NN) * difference_AN).sum(1)

    ratio_A = errors(weighed) / errors(plain)
    # steps in the ratio of 4, on both sides of one
    assert float(ratio_A[::2].mean()) < 0.7
    assert float(ratio_A[1::2].mean()) > 1.5
    assert float((importance_A * errors(weighed)).sum()) < float(
        (importance_A * errors(plain)).sum()
    )


def test_equal_row_importances_change_nothing():
    weight_AN, cov_NN = random_layer(20, 16, seed=0)
    moments = Moments(cov=cov_NN, tokens=1000)

    plain = quantize_weight(weight_AN, moments, rate=2.0)
    same = quantize_weight(weight_AN, moments, rate=2.0, row_importance_A=torch.full((20,), 7.0))

    assert torch.equal(plain.codes_AN, same.codes_AN)


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, float("nan")], [1.0]])
def test_invalid_row_importances_are_rejected(bad):
    weight_AN, cov_NN = random_layer(2, 4, seed=0)

    with pytest.raises(ValueError, match=r"layer: the row importances have shape"):
        quantize_weight(
            weight_AN,
            Moments(cov=cov_NN, tokens=9),
            rate=2.0,
            row_importance_A=torch.tensor(bad),
            name="layer",
        )
