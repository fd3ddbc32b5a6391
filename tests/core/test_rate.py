import math

import pytest
import torch

from watersic_hf.core.rate import paper_rate, pooled_entropy, search_step


def test_entropy_of_known_histograms():
    assert pooled_entropy(torch.tensor([[0, 0], [0, 0]])) == 0
    assert pooled_entropy(torch.tensor([[-1, 1], [1, -1]], dtype=torch.int8)) == 1
    assert pooled_entropy(torch.arange(256)) == pytest.approx(8)
    assert pooled_entropy(torch.tensor([1, 1, 1, 5])) == pytest.approx(2 - 0.75 * math.log2(3))
    assert pooled_entropy(torch.empty(0, 3, dtype=torch.int8)) == 0


def test_entropy_does_not_depend_on_the_span_of_the_codes():
    codes = torch.tensor([-128, 127, 127, 0], dtype=torch.int8)
    far = torch.tensor([-(2**31), 2**31 - 1, 2**31 - 1, 0], dtype=torch.int32)
    assert pooled_entropy(codes) == pooled_entropy(far) == 1.5


def test_dead_columns_cost_their_index_and_no_entropy():
    g = torch.Generator().manual_seed(0)
    live_AN = torch.randint(-2, 2, (64, 24), generator=g)
    codes_AN = torch.zeros(64, 32, dtype=torch.int64)
    live_N = torch.arange(32) < 24
    codes_AN[:, live_N] = live_AN
    H = pooled_entropy(live_AN)
    assert paper_rate(live_AN) == pytest.approx(H + 16 / 64 + 16 / 24)
    wanted = (H * 24 + 16 + 16 * 24 / 64 + 16 * 8 / 64) / 32
    assert paper_rate(codes_AN, live_N) == pytest.approx(wanted)


class Counted:
    def __init__(self, bits_at):
        self.bits_at = bits_at
        self.steps = []

    def __call__(self, step):
        self.steps.append(step)
        return self.bits_at(step)


def soft(step):
    """Fall by one bit per octave at high rate, and fade out at low rate."""
    return 0.5 * math.log2(1 + step**-2)


@pytest.mark.parametrize("target", [0.05, 0.3, 1.0, 3.0, 8.0, 16.0])
@pytest.mark.parametrize("start", [1e-3, 0.3, 1.0, 20.0])
def test_search_reaches_a_smooth_target_from_any_start(target, start):
    bits_at = Counted(soft)
    step = search_step(bits_at, target, start=start, tolerance=1e-3 * target)
    assert soft(step) == pytest.approx(target, rel=1e-3)
    assert step in bits_at.steps


def test_search_needs_two_evaluations_on_a_line():
    bits_at = Counted(lambda step: 3 - math.log2(step))
    step = search_step(bits_at, 5.0, start=1.0, tolerance=1e-6)
    assert step == pytest.approx(0.25)
    assert len(bits_at.steps) == 2


@pytest.mark.parametrize("start", [1.0, 100.0])
def test_search_leaves_a_plateau(start):
    # coarser than 0.1 everything is zero and only the fixed costs are left
    def bits_at(step):
        return 0.2 + max(0.0, -math.log2(step / 0.1))

    step = search_step(bits_at, 0.9, start=start, tolerance=0.005)
    assert bits_at(step) == pytest.approx(0.9, abs=0.005)


def test_search_returns_the_nearer_side_of_a_jump():
    bits_at = Counted(lambda step: 2.0 if step < 0.7 else 0.5)
    step = search_step(bits_at, 1.6, start=10.0, tolerance=0.01)
    assert step < 0.7
    assert len(bits_at.steps) <= 12


def test_search_tolerates_noise():
    g = torch.Generator().manual_seed(0)
    noisy = Counted(lambda step: soft(step) + 0.02 * float(torch.randn(1, generator=g)))
    step = search_step(noisy, 2.0, start=1.0, tolerance=0.001)
    assert soft(step) == pytest.approx(2.0, abs=0.08)
    assert len(noisy.steps) <= 12


@pytest.mark.parametrize("bits", [0.0, 1.0, 100.0])
def test_search_on_a_constant_stops_after_the_allowed_evaluations(bits):
    bits_at = Counted(lambda step: bits)
    step = search_step(bits_at, 3.0, start=1.0, tolerance=0.01, evaluations=7)
    assert len(bits_at.steps) <= 7
    assert step in bits_at.steps


def test_search_with_one_evaluation_returns_the_start():
    step = search_step(soft, 9.0, start=1.0, tolerance=1e-9, evaluations=1)
    assert step == 1.0


def test_search_never_goes_below_the_finest_step():
    for start in (1e-6, 1.0):
        bits_at = Counted(soft)
        step = search_step(bits_at, 9.0, start=start, tolerance=1e-3, finest=0.01)
        assert step == min(bits_at.steps) == pytest.approx(0.01)
