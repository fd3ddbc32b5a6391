import pytest

from watersic_hf.quantization.budget import Budget


def test_saved_bits_are_spread_evenly_over_the_remaining_weights():
    budget = Budget({"a": (100, 3.0), "b": (200, 3.0), "c": (100, 3.0)})

    assert budget.bits_for("a") == 3.0
    budget.spend("a", 2.4)

    # 60 bits are saved, for 300 weights
    assert budget.bits_for("b") == pytest.approx(3.2)
    assert budget.bits_for("c") == pytest.approx(3.2)


def test_total_meets_the_target_in_any_order_of_layers():
    sizes = {"a": (100, 3.0), "b": (900, 3.0), "c": (300, 2.0), "d": (500, 3.0)}
    target = sum(n * bits for n, bits in sizes.values())

    for order in ("abcd", "dcba", "cadb"):
        budget, spent = Budget(sizes), 0.0
        for layer, off in zip(order, (0.3, -0.2, 0.1, 0.0), strict=True):
            bits = budget.bits_for(layer) + off
            budget.spend(layer, bits)
            spent += sizes[layer][0] * bits
        assert spent == pytest.approx(target)


def test_each_layer_has_its_own_target():
    budget = Budget({"a": (100, 2.0), "b": (100, 4.0)})

    assert budget.bits_for("b") == 4.0


def test_correction_is_limited_to_half_of_the_target():
    budget = Budget({"a": (1000, 3.0), "b": (10, 3.0)})
    budget.spend("a", 3.5)

    assert budget.bits_for("b") == 1.5
