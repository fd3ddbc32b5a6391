import math

import numpy as np
import pytest
import torch

from watersic_hf import codec


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "cols", "nu", "margin"),
    [
        (192, 576, None, 0.05),
        (576, 576, None, 0.03),
        (1536, 576, None, 0.025),
        (1024, 1024, None, 0.02),
        (2048, 1024, None, 0.017),
        # tails that the library's Gaussian mixtures only approximate
        (192, 576, 5, 0.056),
        (576, 576, 5, 0.037),
        (2048, 1024, 5, 0.023),
    ],
)
def test_payload_size_is_close_to_the_class_entropy(layer_codes, rows, cols, nu, margin, bits):
    codes_AN, _ = layer_codes(rows, cols, bits, nu=nu)

    stored = 8 * codec.encode(codes_AN).numel() / codes_AN.numel()

    statistics = codec.code_statistics(codes_AN)
    assert stored <= statistics.class_entropy + margin
    assert stored < statistics.pooled_entropy - 0.05


def log2_normal(x):
    return (-x * x / 2 - math.log(2 * math.pi) / 2) / math.log(2)


def log2_student(x, nu=5):
    width = math.sqrt((nu - 2) / nu)
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(nu * math.pi) / 2
    tail = np.log1p((x / width) ** 2 / nu)
    return (constant - math.log(width) - (nu + 1) / 2 * tail) / math.log(2)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize(
    ("rows", "cols", "nu", "margin"),
    [(576, 576, None, 0.035), (2048, 1024, None, 0.02), (2048, 1024, 5, 0.03)],
)
def test_size_at_high_rate_is_close_to_that_with_known_scales(
    layer_codes, rows, cols, nu, margin, bits
):
    # a histogram of so many values underestimates the entropy, so this compares with the truth
    codes_AN, scale_AN = layer_codes(rows, cols, bits, nu=nu)
    log2_density = log2_normal if nu is None else log2_student

    stored = 8 * codec.encode(codes_AN).numel() / codes_AN.numel()

    ideal = np.mean(np.log2(scale_AN) - log2_density(codes_AN.numpy() / scale_AN))
    assert ideal - 0.005 < stored <= ideal + margin


@pytest.mark.parametrize(("rows", "cols"), [(192, 576), (576, 576), (300, 4097), (1024, 1100)])
@pytest.mark.parametrize("bits", [0.3, 1, 3, 8])
def test_predicted_size_matches_the_payload(layer_codes, rows, cols, bits):
    codes_AN, _ = layer_codes(rows, cols, bits, nu=5)

    predicted = codec.payload_bits(codes_AN)

    assert predicted == pytest.approx(8 * codec.encode(codes_AN).numel(), rel=0.002)


def test_sample_of_rows_predicts_the_size_of_all(layer_codes):
    codes_AN, _ = layer_codes(2048, 512, 3)

    predicted = codec.payload_bits(codes_AN[::8], rows=2048)

    # 256 rows tell the mean of the row scales to 0.3 / 16 bit
    assert predicted == pytest.approx(8 * codec.encode(codes_AN).numel(), rel=0.02)


def test_empty_matrix_costs_its_header():
    for shape in ((0, 0), (0, 7), (7, 0)):
        codes_AN = torch.zeros(shape, dtype=torch.int32)

        predicted = codec.payload_bits(codes_AN)

        assert predicted == pytest.approx(8 * codec.encode(codes_AN).numel(), abs=32)


def test_zeros_cost_almost_nothing():
    codes_AN = torch.zeros(1024, 1024, dtype=torch.int32)

    assert 8 * codec.encode(codes_AN).numel() / codes_AN.numel() < 0.013


def test_few_huge_codes_cost_an_escape_each(layer_codes):
    codes_AN, _ = layer_codes(1024, 1024, 3)
    before = codec.encode(codes_AN).numel()
    codes_AN.view(-1)[::10007] = 5000

    after = codec.encode(codes_AN).numel()

    assert 8 * (after - before) < 105 * 64


def test_statistics_of_a_known_matrix():
    codes_AN = torch.tensor([[0, 1], [0, 1]]).repeat(500, 1)
    codes_AN[0, 0] = -9000

    statistics = codec.code_statistics(codes_AN)

    assert statistics.max_abs == 9000
    assert statistics.pooled_entropy == pytest.approx(1.0, abs=0.01)
    assert statistics.class_entropy < 0.02
    assert (statistics.row_classes, statistics.col_classes) == (2, 2)
