import pytest

from watersic_hf.quantization import CalibrationSettings


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
def test_the_original_model_runs_only_if_a_setting_needs_it(changes, two):
    assert CalibrationSettings(**changes).two_streams == two
