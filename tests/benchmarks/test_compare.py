"""The comparison of methods, its baselines and its plot."""

import json
import shutil

import pytest

from watersic_hf.core import LayerSettings, Moments
from watersic_hf.testing import random_layer


def test_baselines_reach_the_requested_bits(load):
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


def test_compare_runs_methods_shows_a_table_and_a_plot(load, llama_folder, tmp_path, capsys):
    compare = load("compare")
    rows = tmp_path / "rows.json"
    text = tmp_path / "other.txt"
    text.write_text(" ".join(str(n) for n in range(2000)))
    options = [
        "--model",
        str(llama_folder),
        "--json",
        str(rows),
        "--sequence-length",
        "64",
        "--windows",
        "2",
        "--text",
        str(text),
        "pydoc",
    ]

    compare.main(
        [
            "run",
            *options,
            "--method",
            "full",
            "plain",
            "--bits",
            "3",
            "5",
            "--samples",
            "8",
            "--seeds",
            "0",
            "1",
        ]
    )
    compare.main(["run", *options, "--method", "finetuned", "--bits", "3", "--samples", "8"])
    compare.main(["show", str(rows), "--plot", str(tmp_path / "plot.svg")])

    found = json.loads(rows.read_text())
    assert len(found) == 9
    assert all(row["bits"] == pytest.approx(row["asked"], rel=0.01) for row in found)
    assert {key for key in found[0] if key.startswith("KL")} == {"KL other", "KL pydoc"}
    printed = capsys.readouterr().out
    assert "| full |" in printed
    assert "| full at, pydoc |" in printed
    assert "±" in printed
    # a line for each method, of KL and of perplexity
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 6


def test_bits_for_equal_kl_are_interpolated(load):
    matching_bits = load("compare").matching_bits
    curve = [(4.0, 0.01), (2.0, 1.0), (3.0, 0.1)]

    assert matching_bits(curve, 0.1) == pytest.approx(3)
    assert matching_bits(curve, 10**-1.5) == pytest.approx(3.5)
    assert matching_bits(curve, 2.0) is None
    assert matching_bits(curve, 0.001) is None


def test_compare_judges_folders_of_other_quantizers(load, llama_folder, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(llama_folder, folder)
    record = {"rival": "none", "settings": "dense", "bits": 16.0, "seconds": 1.0}
    (folder / "rival.json").write_text(json.dumps(record))

    (row,) = load("compare").main(
        [
            "judge",
            str(folder),
            "--model",
            str(llama_folder),
            "--json",
            str(tmp_path / "rows.json"),
            "--sequence-length",
            "64",
            "--windows",
            "2",
        ]
    )

    assert row["KL pydoc"] == pytest.approx(0, abs=1e-6)
    assert row["method"] == "none"


def test_plot_has_a_row_of_panels_per_model(load):
    rows = [
        {"model": model, "method": "full", "bits": bits, "KL text": kl, "ppl text": 20 + kl}
        for model in ("a", "b")
        for bits, kl in ((2.0, 1.0), (3.0, 0.25), (4.0, 100.0))
    ]

    drawn = load("rate_plot").plot(rows, "text")

    assert drawn.count("<polyline") == 4
    assert "b: KL text (log) against stored bits" in drawn
    # the KL of 100 is cut off: a panel ends at 128 times its least value
    assert drawn.count("<circle") == 10
