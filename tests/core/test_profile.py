import math

import pytest
import torch

from watersic_hf.core import SHAPING_LOSS, column_deviations, column_profile
from watersic_hf.core.profile import DEEPEST, GROUPS
from watersic_hf.core.rate import column_entropies, pooled_entropy


def test_column_entropy_is_the_entropy_of_its_histogram():
    g = torch.Generator().manual_seed(0)
    spread_N = torch.linspace(0.1, 40, 300)
    codes_AN = (torch.randn(50, 300, generator=g) * spread_N).round().to(torch.int16)

    entropy_N = column_entropies(codes_AN)

    wanted = [pooled_entropy(codes_AN[:, n]) for n in range(300)]
    assert entropy_N.tolist() == pytest.approx(wanted, abs=1e-12)


def test_huge_codes_count_as_one_value():
    codes_AN = torch.tensor([[0, 2**30], [1, -(2**30)], [0, 0], [1, 5]])

    assert column_entropies(codes_AN).tolist() == [1.0, 2.0]


def test_entropy_is_waterfilling_height_plus_shaping_loss():
    g = torch.Generator().manual_seed(0)
    deviation_N = torch.logspace(0.3, 1.3, 64, dtype=torch.float64)
    weight_AN = torch.randn(20_000, 64, generator=g, dtype=torch.float64) * deviation_N
    codes_AN = weight_AN.round().to(torch.int16)

    profile = column_profile(codes_AN, deviation_N)

    assert len(profile.waterfilling) == len(profile.entropies) == GROUPS
    assert list(profile.waterfilling) == sorted(profile.waterfilling, reverse=True)
    for height, entropy in zip(profile.waterfilling, profile.entropies, strict=True):
        # at high rate, up to the bias of an entropy from 20 000 samples
        assert entropy == pytest.approx(height + SHAPING_LOSS, abs=0.03)
    assert sum(profile.histogram) == 64


def test_deviation_does_not_depend_on_the_balance_of_scales():
    g = torch.Generator().manual_seed(0)
    weight_AN = torch.randn(40, 6, generator=g)
    row_scale_A = torch.rand(40, generator=g) + 0.5
    spacing_N = torch.rand(6, generator=g) + 0.1

    first = column_deviations(weight_AN, row_scale_A, spacing_N)
    second = column_deviations(weight_AN, 4 * row_scale_A, spacing_N / 4)

    in_steps_AN = weight_AN / row_scale_A[:, None] / spacing_N
    torch.testing.assert_close(first, in_steps_AN.square().mean(0).sqrt())
    torch.testing.assert_close(first, second)


def test_dead_rows_and_columns_have_the_lowest_height():
    spacing_N = torch.tensor([1.0, 0.0, 1.0])
    row_scale_A = torch.tensor([1.0, 0.0])

    deviation_N = column_deviations(torch.ones(2, 3), row_scale_A, spacing_N)
    profile = column_profile(torch.zeros(2, 3, dtype=torch.int8), deviation_N)

    assert deviation_N.tolist() == pytest.approx([math.sqrt(0.5), 0, math.sqrt(0.5)])
    assert profile.waterfilling[-1] == DEEPEST
    assert profile.entropies == (0, 0, 0)
    assert profile.histogram == (3,)
