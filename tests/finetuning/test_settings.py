import pytest

from watersic_hf.finetuning import FinetuneSettings


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"clip": -1.0},
        {"final_learning_rate": 1.0},
        {"validation_share": 0.0},
        {"validation_share": 0.9},
    ],
)
def test_settings_out_of_range_are_named(changes):
    (name,) = changes

    with pytest.raises(ValueError, match=f"^{name} is "):
        FinetuneSettings(**changes)


def test_the_learning_rate_falls_from_the_first_to_the_final():
    settings = FinetuneSettings(learning_rate=1e-3, final_learning_rate=1e-4)

    rates = [settings.rate_at(step, 11) for step in range(12)]

    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)
    assert FinetuneSettings(learning_rate=1e-3).rate_at(7, 7) == pytest.approx(1e-5)
