import pytest
import torch

from watersic_hf.checkpoint import layer_charge
from watersic_hf.core import Moments, quantize_tall, quantize_weight, relative_output_error
from watersic_hf.testing import random_layer


@pytest.fixture
def tall():
    weight_AN, cov_NN = random_layer(3000, 48, seed=0)
    return weight_AN.float(), Moments(cov=cov_NN, tokens=5000)


@pytest.mark.parametrize("important", [False, True])
def test_bands_have_the_error_of_the_whole_weight(tall, monkeypatch, important):
    weight_AN, moments = tall
    monkeypatch.setattr("watersic_hf.core.tall.ROWS_PER_BAND", 700)
    importance_A = torch.linspace(0.2, 3, 3000) if important else None
    request = {"bits": 4.0, "charge": layer_charge, "row_importance_A": importance_A}

    whole = quantize_weight(weight_AN, moments, **request)
    bands = quantize_tall(weight_AN, moments, sample_rows=600, **request)

    assert bands.bits == layer_charge(bands.codes_AN, 3000) == pytest.approx(4.0, rel=5e-3)
    # 6 dB a bit
    assert bands.error == pytest.approx(whole.error * 4 ** (whole.bits - bands.bits), rel=0.02)
    assert bands.error == pytest.approx(
        relative_output_error(weight_AN, bands.dequantize(), moments), rel=1e-6
    )
    if important:
        errors_A = (bands.dequantize() - weight_AN).square().mean(1)
        assert errors_A[:500].mean() > 3 * errors_A[-500:].mean()


def test_weight_with_few_rows_is_quantized_as_a_whole(tall):
    weight_AN, moments = tall

    plain = quantize_weight(weight_AN, moments, bits=3.0, charge=layer_charge)
    found = quantize_tall(weight_AN, moments, bits=3.0, charge=layer_charge)

    assert torch.equal(found.codes_AN, plain.codes_AN)
