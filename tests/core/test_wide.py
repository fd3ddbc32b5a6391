import subprocess
import sys

import pytest
import torch

from watersic_hf.core import (
    CalibrationError,
    LayerSettings,
    MomentAccumulator,
    ProjectedAccumulator,
    inplace,
    is_wide,
    projected,
    quantize_weight,
    quantize_wide,
    wide,
)
from watersic_hf.core.rate import paper_rate

ROWS, COLUMNS, TOKENS = 48, 96, 1500


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(inplace, "PANEL", 40)
    monkeypatch.setattr(projected, "ROWS_PER_BLOCK", 20)
    monkeypatch.setattr(wide, "ROWS_PER_BLOCK", 20)


def charge(codes_AN, rows, path=None):
    return paper_rate(codes_AN)


def inputs(*, dead=False):
    """A weight, its inputs in two streams, and the error of the residual stream."""
    g = torch.Generator().manual_seed(0)
    weight_AN = torch.randn(ROWS, COLUMNS, generator=g)
    x_TN = torch.randn(TOKENS, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g)
    if dead:
        x_TN[:, ::7] *= 1e-6
    drifted_TN = x_TN + 0.1 * x_TN.std(0) * torch.randn(TOKENS, COLUMNS, generator=g)
    return weight_AN, x_TN, drifted_TN, 5 * torch.randn(TOKENS, ROWS, generator=g)


def both_moments(drift, residual, *, dead=False):
    """A weight, and its moments in both forms."""
    weight_AN, x_TN, drifted_TN, residual_TA = inputs(dead=dead)
    streams = (x_TN,) if drift is None else (x_TN, drifted_TN)
    residual_TA = residual_TA if residual else None
    square = MomentAccumulator(
        COLUMNS, drift=drift is not None, rows_of_residual=ROWS if residual else None
    )
    small = ProjectedAccumulator(weight_AN, drift=drift, residual=residual)
    for part in (slice(0, 400), slice(400, None)):
        given = [stream[part] for stream in streams]
        error = None if residual_TA is None else residual_TA[part]
        square.add(*given, residual_TA=error)
        output_TA = None if drift is None else x_TN[part] @ weight_AN.T
        small.add(*given, output_TA=output_TA, residual_TA=error)
    return weight_AN, square.result().with_drift(drift or 0), small.result()


@pytest.mark.parametrize(
    ("drift", "residual"), [(None, False), (0.0, True), (0.5, False), (0.5, True), (1.0, True)]
)
def test_projected_moments_are_products_of_the_square_ones(drift, residual):
    weight_AN, square, small = both_moments(drift, residual)

    wide_AN = weight_AN.double()
    # outputs are computed in float32
    tight = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(small.cov_KK, square.layer_cov, rtol=1e-12, atol=0)
    torch.testing.assert_close(small.linear_AK, square.linear_term(wide_AN), **tight)
    energy_A = ((wide_AN @ square.cov) * wide_AN).sum(1)
    torch.testing.assert_close(small.energy_A, energy_A, rtol=1e-5, atol=0)
    assert small.tokens == square.tokens == TOKENS


@pytest.mark.parametrize(("drift", "residual"), [(None, False), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("dead", [False, True])
def test_wide_weight_is_quantized_as_any_other(drift, residual, dead):
    weight_AN, square, small = both_moments(drift, residual, dead=dead)
    before = small.cov_KK.clone()
    options = {"bits": 3.0, "charge": charge, "row_importance_A": torch.rand(ROWS) + 0.1}

    expected = quantize_weight(weight_AN, square, **options)
    found = quantize_wide(weight_AN, small, **options)

    assert torch.equal(found.live_N, expected.live_N)
    assert bool(found.live_N.all()) is not dead
    assert torch.equal(found.codes_AN, expected.codes_AN)
    assert found.step == pytest.approx(expected.step, rel=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-5)
    torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=1e-4, atol=1e-5)
    assert torch.equal(small.cov_KK, before)


def test_columns_of_zero_weights_have_no_codes():
    weight_AN, _, small = both_moments(0.5, True)
    weight_AN[:, 11] = 0

    found = quantize_wide(weight_AN, small, bits=3.0, charge=charge)

    assert not bool(found.live_N[11])
    assert not bool(found.codes_AN[:, 11].any())
    assert 0 < found.error < 0.1


def test_zero_input_and_zero_weight_are_quantized_as_without_data():
    weight_AN = torch.randn(ROWS, COLUMNS)
    for scale, zero_input in ((0.0, True), (1.0, False)):
        sums = ProjectedAccumulator(weight_AN, drift=None, residual=False)
        sums.add(scale * torch.randn(TOKENS, COLUMNS))
        moments = sums.result()

        given = weight_AN if zero_input else torch.zeros_like(weight_AN)
        found = quantize_wide(given, moments, bits=3.0, charge=charge)

        assert bool(found.codes_AN.any()) is zero_input
        assert found.error == 0


def test_indefinite_moment_raises_with_the_layer():
    weight_AN, _, small = both_moments(None, False)
    small.cov_KK[3, 3] = -1e6
    small.cov_KK[4, 4] = 1e6

    with pytest.raises(CalibrationError, match=r"^layer: the input covariance"):
        quantize_wide(
            weight_AN,
            small,
            bits=3.0,
            charge=charge,
            settings=LayerSettings(damping=1e-9),
            name="layer",
        )


def test_moments_can_be_used_only_once():
    weight_AN, _, small = both_moments(None, False)
    quantize_wide(weight_AN, small, bits=3.0, charge=charge)

    with pytest.raises(CalibrationError, match=r"^weight: its moments were used before"):
        quantize_wide(weight_AN, small, bits=3.0, charge=charge)


def test_layers_are_wide_if_the_products_are_smaller_than_the_moments():
    assert is_wide(8192, 28672)
    assert is_wide(576, 1536)
    assert is_wide(28672, 28672)
    assert not is_wide(4096, 4096)
    assert not is_wide(2 * 28672, 28672)


PEAK = """
import torch
from watersic_hf.checkpoint.report import peak_bytes, resident_bytes
from watersic_hf.core import ProjectedAccumulator, inplace, projected, quantize_wide, rescale, wide
from watersic_hf.streams.memory import return_large_tensors

return_large_tensors()
columns = 4032
rows = 8192 * columns // 28672
inplace.PANEL = columns // 28
projected.ROWS_PER_BLOCK = wide.ROWS_PER_BLOCK = rows // 8
rescale.ROWS_PER_BLOCK = rows // 4

def charge(codes_AN, rows, path):
    return 3.0 if bool(codes_AN.any()) else 0.1

g = torch.Generator().manual_seed(0)
weight_AN = torch.randn(rows, columns, generator=g).bfloat16()
x_TN = torch.randn(512, columns, generator=g).bfloat16()
residual_TA = torch.randn(512, rows, generator=g)
for used in (256, columns):
    # the first round loads libraries
    if used == columns:
        before = resident_bytes()
    sums = ProjectedAccumulator(weight_AN[:, :used], drift=0.5, residual=True)
    output_TA = x_TN[:, :used] @ weight_AN[:, :used].T
    sums.add(x_TN[:, :used], x_TN[:, :used], output_TA=output_TA, residual_TA=residual_TA)
    moments = sums.result()
    del sums
    quantize_wide(weight_AN[:, :used], moments, bits=3.0, charge=charge)
print((peak_bytes() - before) / (8 * columns**2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_square_matrices_are_in_memory_at_most():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)

    # of the shape 8192 x 28672: two squares, the linear term (0.29), the residual in float32
    # (0.14), blocks of rows and codes (0.35)
    assert float(done.stdout) < 3.0
