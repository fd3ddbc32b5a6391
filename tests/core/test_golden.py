"""The authors' answers on small problems: same codes, same scales."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from watersic_hf.core import LayerSettings, Moments, quantize_weight
from watersic_hf.core.rate import paper_rate, pooled_entropy
from watersic_hf.testing import assert_close

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    return load(request.param.read_bytes())


@pytest.fixture
def quantized(golden):
    moments = Moments(
        cov=golden["cov"],
        tokens=0,
        drifted_cov_NN=golden.get("drifted_cov"),
        cross_cov_NN=golden.get("cross_cov"),
        residual_AN=golden.get("residual"),
    )
    return quantize_weight(
        golden["weight"], moments, rate=float(golden["rate_parameter"]),
        settings=LayerSettings(damping=1e-4),
    )  # fmt: skip


def test_all_five_files_are_here():
    assert len(GOLDEN) == 5


def test_codes_equal_the_authors_in_every_entry(golden, quantized):
    assert torch.equal(quantized.codes_AN.int(), golden["codes"])


def test_step_and_spacing_equal_the_authors(golden, quantized):
    assert quantized.step == pytest.approx(float(golden["step"]), rel=1e-9)
    assert_close(quantized.spacing_N, golden["spacing"], tolerance=1e-9)


def test_scales_and_weight_equal_the_authors(golden, quantized):
    # their shrinkage is rounded to float32 where it enters the recursion and the rescaler
    assert_close(quantized.shrinkage_N, golden["shrinkage"], tolerance=1e-6)
    assert_close(quantized.row_scale_A, golden["row_scale"], tolerance=1e-6)
    assert_close(quantized.col_scale_N, golden["spacing"] * golden["col_rescale"], tolerance=1e-6)
    assert_close(quantized.dequantize(), golden["dequantized"], tolerance=1e-6)


def test_entropy_and_rate_equal_the_authors(golden, quantized):
    # theirs are float32
    entropy = pooled_entropy(quantized.codes_AN)
    assert entropy == pytest.approx(float(golden["pooled_entropy"]), abs=1e-6)
    assert paper_rate(quantized.codes_AN) == pytest.approx(float(golden["rate"]), abs=1e-6)


def test_the_error_is_not_above_the_authors_loss(golden, quantized):
    weight_AN, found_AN = golden["weight"].double(), quantized.dequantize()
    cross_NN = golden.get("cross_cov", golden["cov"]).double()
    seen_NN = golden.get("drifted_cov", golden["cov"]).double()

    # their loss leaves the residual stream out
    loss = (weight_AN @ golden["cov"].double() * weight_AN).sum()
    loss += ((found_AN @ seen_NN - 2 * weight_AN @ cross_NN) * found_AN).sum()

    # theirs is float32
    assert float(loss) / weight_AN.numel() <= float(golden["loss"]) * (1 + 1e-5)


def test_no_damping_beyond_the_first_was_needed(quantized):
    assert quantized.damping == 1e-4
    assert bool(quantized.live_N.all())
