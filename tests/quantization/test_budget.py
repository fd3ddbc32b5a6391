import pytest

from watersic_hf.quantization.budget import Budget


def test_what_a_layer_leaves_over_goes_evenly_to_the_rest():
    budget = Budget({"a": (100, 3.0), "b": (200, 3.0), "c": (100, 3.0)})

    assert budget.bits_for("a") == 3.0
    budget.spend("a", 2.4)

    # 60 bits over, for 300 weights
    assert budget.bits_for("b") == pytest.approx(3.2)
    assert budget.bits_for("c") == pytest.approx(3.2)


def test_spending_what_is_asked_ends_at_the_target_whatever_the_order():
    sizes = {"a": (100, 3.0), "b": (900, 3.0), "c": (300, 2.0), "d": (500, 3.0)}
    target = sum(n * bits for n, bits in sizes.values())

    for order in ("abcd", "dcba", "cadb"):
        budget, spent = Budget(sizes), 0.0
        for layer, off in zip(order, (0.3, -0.2, 0.1, 0.0), strict=True):
            bits = budget.bits_for(layer) + off
            budget.spend(layer, bits)
            spent += sizes[layer][0] * bits
        assert spent == pytest.approx(target)


def test_a_layer_keeps_its_own_target():
    budget = Budget({"a": (100, 2.0), "b": (100, 4.0)})

    assert budget.bits_for("b") == 4.0


def test_one_layer_does_not_pay_for_all():
    budget = Budget({"a": (1000, 3.0), "b": (10, 3.0)})
    budget.spend("a", 3.5)

    assert budget.bits_for("b") == 1.5
