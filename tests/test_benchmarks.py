"""Every benchmark runs, on a case small enough for a test."""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from watersic_hf.core import LayerSettings, Moments
from watersic_hf.testing import random_layer

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_has_a_test():
    tests = Path(__file__).parent.rglob("test_*.py")
    tested = "".join(test.read_text(encoding="utf-8") for test in tests)

    for script in FOLDER.glob("*.py"):
        run_here, run_alone = f'load("{script.stem}")', f'"benchmarks/{script.name}"'
        assert run_here in tested or run_alone in tested, script.name


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_measured_of_a_model_that_stays_on_the_disk(tmp_path):
    arguments = ["--blocks", "2", "--hidden-size", "704", "--folder", str(tmp_path)]

    (row,) = load("streaming_memory").main(arguments)

    assert row["layers"] == 14
    assert row["peak MB"] == pytest.approx(row["interpreter MB"] + row["beyond MB"], abs=1)


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
               "--windows", "2", "--text", str(text), "pydoc"]  # fmt: skip

    compare.main(
        ["run", *options, "--method", "full", "plain", "--bits", "3", "5", "--samples", "8",
         "--seeds", "0", "1"]
    )  # fmt: skip
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


def test_the_bits_that_reach_a_divergence_are_interpolated():
    matching_bits = load("compare").matching_bits
    curve = [(4.0, 0.01), (2.0, 1.0), (3.0, 0.1)]

    assert matching_bits(curve, 0.1) == pytest.approx(3)
    assert matching_bits(curve, 10**-1.5) == pytest.approx(3.5)
    assert matching_bits(curve, 2.0) is None
    assert matching_bits(curve, 0.001) is None


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


@pytest.fixture
def rivals():
    return load("rivals")


def fake_rival(job):
    """Stands in for a package: four bits a weight and a scale for every layer."""
    job.settings, job.version = "fake", "0"
    job.each_layer(
        lambda weight: weight.float() + 1,
        lambda moved: (moved, [torch.zeros(moved.numel() // 2, dtype=torch.uint8), moved[:1, :1]]),
    )


def test_a_rival_leaves_a_dense_folder_and_its_record(rivals, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "bnb", fake_rival)
    fake_rival.__name__ = "bnb"

    result = rivals.main(["bnb", "--model", str(llama_folder), "--out", str(tmp_path)])

    assert tuple(json.loads((tmp_path / "rival.json").read_text())) == rivals.RECORD
    assert result["weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)
    assert result["bytes"] == result["weights"] // 2 + 14 * 4
    assert result["bits"] == pytest.approx(4 + 14 * 32 / result["weights"])
    assert result["calibration"] is None
    assert result["reproduced"] == 0
    before = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    moved = {name for name in before if (after[name].float() - before[name]).mean() > 0.9}
    assert moved == {name for name in before if "_proj" in name}
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())


def test_rivals_share_one_file_of_windows(rivals, llama_folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "windows.safetensors"
    text.write_text("All rivals see the same tokens. " * 200)
    options = ["--samples", "3", "--sequence-length", "16", "--text", str(text)]

    rivals.main(["windows", "--model", str(llama_folder), "--out", str(out), *options])

    windows = rivals.read_windows(out)
    assert windows.shape == (3, 16)
    assert windows.dtype == torch.int64


def test_a_file_without_windows_is_refused(rivals, tmp_path):
    save_file({"tokens": torch.zeros(3, dtype=torch.int64)}, tmp_path / "w")

    with pytest.raises(SystemExit, match="needs one int64 tensor `windows`"):
        rivals.read_windows(tmp_path / "w")


def test_a_rival_that_is_not_installed_is_named(rivals, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.setitem(sys.modules, "hqq", None)

    with pytest.raises(SystemExit, match=r"the package `hqq.*` is not installed here"):
        rivals.main(["hqq", "--bits", "3", "--model", str(llama_folder), "--out", str(tmp_path)])


def test_a_broken_conversion_is_not_written(rivals, llama_folder, tmp_path, monkeypatch):
    def broken(job):
        job.weights = {name: weight.float() / 0 for name, weight in job.weights.items()}

    broken.__name__ = "bnb"
    monkeypatch.setattr(rivals, "bnb", broken)

    with pytest.raises(ValueError, match="not finite"):
        rivals.main(["bnb", "--model", str(llama_folder), "--out", str(tmp_path / "out")])


def test_weights_that_meet_their_own_grid_again_are_counted(rivals):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(64, 192, generator=generator) for name in ("once", "twice")}
    step = 6 / 15
    weights["twice"] = (weights["twice"] / step).round().clamp(-8, 7) * step
    job = rivals.Job(argparse.Namespace(), weights)

    job.each_layer(
        lambda weight: (weight / step).round().clamp(-8, 7) * step,
        lambda dense: (dense, [torch.zeros(dense.numel() // 2, dtype=torch.uint8)]),
    )

    assert job.reproduced() == 0.5


def test_nested_tensors_are_counted_and_settings_are_not(rivals):
    stored = {"codes": torch.zeros(3, dtype=torch.uint8), "meta": {"scale": (torch.zeros(2), 64)}}

    assert rivals.nbytes(rivals.flat(stored)) == 3 + 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_folder_in_the_format_of_gptq_is_read_back(rivals, bits, tmp_path):
    N, A, group = 128, 32, 64
    codes_NA = torch.randint(0, 2**bits, (N, A))
    zeros_GA = torch.randint(0, 2**bits, (N // group, A))
    scales_GA = torch.rand(N // group, A).half()
    stem = "model.layers.0.mlp.up_proj."
    tensors = {
        "qweight": pack(codes_NA, bits), "qzeros": pack(zeros_GA.T, bits).T.contiguous(),
        "scales": scales_GA, "g_idx": torch.arange(N, dtype=torch.int32) // group,
    }  # fmt: skip
    save_file({stem + key: tensor for key, tensor in tensors.items()}, tmp_path / "m.safetensors")
    options = argparse.Namespace(bits=bits, group=group)
    job = rivals.Job(options, {stem + "weight": torch.zeros(A, N)})

    rivals.read_gptq(job, tmp_path, first_zero=1)

    group_N = torch.arange(N) // group
    expected = (codes_NA - zeros_GA[group_N] - 1) * scales_GA.float()[group_N]
    assert torch.equal(job.weights[stem + "weight"], expected.T)
    # codes, then for every group a scale of 16 bits and a zero, then an index for every input
    assert 8 * job.bytes == N * A * bits + N // group * A * (16 + bits) + 32 * N


def pack(values, bits):
    """Rows of integers to int32 words, lowest bit first."""
    stream = (values[:, None] >> torch.arange(bits)[None, :, None]) & 1
    words = stream.reshape(-1, 32, values.shape[1]) << torch.arange(32)[None, :, None]
    return words.sum(1).to(torch.uint32).view(torch.int32)


def test_the_importance_of_an_input_is_its_mean_square(rivals, llama_folder):
    weights = rivals.linear_weights(llama_folder)
    windows = torch.randint(0, 320, (3, 16))
    options = argparse.Namespace(model=llama_folder)

    squares = rivals.mean_squares(rivals.Job(options, weights, windows))

    assert {name: len(s) for name, s in squares.items()} == {
        name: weight.shape[1] for name, weight in weights.items()
    }
    # the norm in front of q leaves rows of about unit mean square, its weight is one
    assert squares["model.layers.0.self_attn.q_proj.weight"].mean() == pytest.approx(1, abs=0.1)


def test_rows_are_folded_to_multiples_of_256_columns(rivals):
    assert [rivals.folding(n) for n in (256, 576, 640, 1536)] == [1, 4, 2, 1]


@pytest.mark.parametrize("fold", [[], ["--fold"]])
def test_llama_cpp_is_handed_every_layer_and_its_importances(rivals, llama_folder, tmp_path, fold):
    gguf = pytest.importorskip("gguf")
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\ncp "$2" {tmp_path}/matrix && cp "$3" "$4"\n')
    tool.chmod(0o755)
    windows = tmp_path / "windows"
    save_file({"windows": torch.randint(0, 320, (2, 16))}, windows)
    options = ["--type", "Q2_K", "--tools", str(tmp_path), "--windows", str(windows), *fold]

    result = rivals.main(
        ["llamacpp", "--model", str(llama_folder), "--out", str(tmp_path / "out"), *options]
    )

    # the tool of this test copies, so that the folder holds the original in bfloat16
    assert result["bits"] == 32
    assert result["reproduced"] == 1
    assert result["calibration"] == "2 windows of 16 tokens"
    before = rivals.linear_weights(llama_folder)
    after = rivals.linear_weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    entries = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "matrix").tensors}
    assert len(entries) == 2 * len(before)
    length = 256 if fold else 64
    assert entries["blk.1.attn_k.weight.in_sum2"].data.shape == (1, length)


def test_the_kernels_benchmark_checks_a_product_before_it_would_time_it(capsys):
    speed = load("kernels_speed")

    rows = speed.main(["--dry-run", "--tokens", "1"])

    assert [row["form"] for row in rows] == ["packed", "entropy"]
    assert all(3 < row["bits held"] < 5 for row in rows)
    assert all(row["us"] == "right, not timed" for row in rows)
    assert "| small small 192 x 320 | 1 | entropy |" in capsys.readouterr().out
    wrong = speed.measure(lambda x: 2 * x[:, :3], 1, 1e-2, torch.eye(3, 4), 1, copied=1.0)
    assert wrong["us"].startswith("WRONG: ")
    assert "times bf16" not in wrong


def test_one_script_runs_all_that_needs_a_gpu(quantized_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (FOLDER.parent, FOLDER.parent / "kernels")))
    )

    rows = load("on_gpu").main([str(quantized_folder), "--out", str(tmp_path), "--dry-run"])

    residencies = [row["residency"] for row in rows if "residency" in row]
    assert residencies == ["dense", "packed", "entropy"]
    assert [row["M"] for row in rows if "M" in row] == [1, 1, 70, 70]
    assert "kernels: done, zsic: done, generation: done" in capfd.readouterr().out
    assert load("generation").COLUMNS[0] == "residency"
