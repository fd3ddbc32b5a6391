"""Every benchmark runs, on a case small enough for a test."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_has_a_test():
    tested = Path(__file__).read_text(encoding="utf-8")

    assert all(f'load("{script.stem}")' in tested for script in FOLDER.glob("*.py"))


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


def test_the_throughput_benchmark_names_its_rivals(capsys):
    load("codec_throughput").main(["--rows", "70", "--cols", "130", "--repeat", "1"])

    printed = capsys.readouterr().out
    for name in ("class entropy", "encode", "decode", "verify", "zlib -6", "bz2 -9"):
        assert name in printed


def test_more_bits_are_closer_to_the_original(llama_folder, tmp_path):
    options = ["--samples", "4", "--sequence-length", "64", "--windows", "2"]

    rows = load("perplexity").main(
        ["--model", str(llama_folder), "--bits", "3", "6", *options, "--json", str(tmp_path / "r")]
    )

    assert rows[0]["KL bits/token"] > rows[1]["KL bits/token"] > 0
    assert all(row["stored"] == pytest.approx(row["asked"], rel=0.01) for row in rows)
    assert (tmp_path / "r").is_file()
