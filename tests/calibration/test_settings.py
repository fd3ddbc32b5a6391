import pytest

from watersic_hf.calibration import CalibrationSettings
from watersic_hf.calibration.settings import drift_share


def test_the_share_of_the_drift_grows_with_the_tokens_to_the_whole():
    assert drift_share(1000, 8000) == pytest.approx(0.5)
    assert drift_share(1000, 10_000_000) > 0.99
    assert drift_share(1000, 10) < 0.01


@pytest.mark.parametrize(
    ("changes", "two"),
    [
        ({}, True),
        ({"drift": 0.0}, False),
        ({"drift": 0.0, "residual": True}, False),
        ({"drift": 0.3}, True),
        ({"drift": 0.0, "attention": 0.5}, True),
        ({"drift": 0.0, "mixing": True}, True),
    ],
)
def test_the_original_model_runs_only_where_something_needs_it(changes, two):
    assert CalibrationSettings(**changes).two_streams == two
