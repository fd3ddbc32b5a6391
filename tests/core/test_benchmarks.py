import importlib.util
from pathlib import Path

import pytest


def load(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_zsic_speed_finds_equal_codes_in_all_three_forms():
    (row,) = load("zsic_speed").main(["--size", "70"])
    assert row["equal"]
    assert row["speedup"] > 0


def test_the_gap_to_the_bound_is_the_shaping_loss_at_high_rate():
    (row,) = load("rate_distortion").main(["--rows", "512", "--cols", "48", "--rates", "4"])
    # finite histograms take a little off, feedback adds a little
    assert row["gap"] == pytest.approx(0.2546, abs=0.05)
    assert row["stored_gap"] > row["gap"]
    assert row["error"] < row["uniform_error"] < row["nearest_error"]
    assert row["classes"] < row["pooled"]
