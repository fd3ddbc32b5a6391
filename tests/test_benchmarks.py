"""Every benchmark runs, on a case small enough for a test."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from watersic_hf.core import LayerSettings, Moments
from watersic_hf.testing import random_layer

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


def test_all_baselines_round_a_layer_to_the_bits_they_are_asked_for(make_llama):
    baselines = load("baselines")
    weight_AN, cov_NN = random_layer(96, 64, seed=0)
    moments = Moments(cov=cov_NN, tokens=1000)
    errors = {}
    for name, method in baselines.METHODS.items():
        quantizer = baselines.BaselineQuantizer(
            {"layer": (weight_AN.numel(), 3.0)}, settings=LayerSettings(), seed=0
        )
        quantizer.method = method

        quantizer.quantize("layer", weight_AN, moments)

        (report,) = quantizer.reports
        errors[name] = report.error
        # 64 columns: a row's scale alone is a quarter of a bit
        asked = 3.0 if method.entropy_coded else 3.0 + 16 / 64
        assert report.bits == pytest.approx(asked, rel=0.02), name
    assert errors["gptq"] < errors["rtn"]
    assert errors["gptq-ec"] < errors["rtn-ec"]


def test_methods_are_compared_on_the_same_windows_and_drawn(llama_folder, tmp_path, capsys):
    compare = load("compare")
    rows = tmp_path / "rows.json"
    text = tmp_path / "other.txt"
    text.write_text(" ".join(str(n) for n in range(2000)))
    options = ["--model", str(llama_folder), "--json", str(rows), "--sequence-length", "64",
               "--windows", "2", "--text", str(text)]  # fmt: skip

    compare.main(
        ["run", *options, "--method", "full", "plain", "--bits", "3", "5", "--samples", "8",
         "--seeds", "0", "1"]
    )  # fmt: skip
    compare.main(["show", str(rows), "--plot", str(tmp_path / "plot.svg")])

    found = json.loads(rows.read_text())
    assert len(found) == 8
    assert all(row["bits"] == pytest.approx(row["asked"], rel=0.01) for row in found)
    assert {key for key in found[0] if key.startswith("KL")} == {"KL other", "KL pydoc"}
    printed = capsys.readouterr().out
    assert "| full |" in printed
    assert "±" in printed
    assert (tmp_path / "plot.svg").read_text().count("<circle") == 8


def test_folders_of_rivals_are_judged_like_all_others(llama_folder, tmp_path):
    rival = tmp_path / "rival"
    shutil.copytree(llama_folder, rival)
    record = {"rival": "none", "settings": "dense", "bits": 16.0, "seconds": 1.0}
    (rival / "rival.json").write_text(json.dumps(record))

    (row,) = load("compare").main(
        ["judge", str(rival), "--model", str(llama_folder), "--json", str(tmp_path / "rows.json"),
         "--sequence-length", "64", "--windows", "2"]
    )  # fmt: skip

    assert row["KL pydoc"] == pytest.approx(0, abs=1e-6)
    assert row["method"] == "none"
