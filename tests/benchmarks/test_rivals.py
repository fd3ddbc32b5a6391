"""Other quantizers: what they share, and the folders and records that they leave."""

import argparse
import json
import sys

import pytest
import torch
from rivals import bnb, contract, gptq_format, llamacpp, windows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def run_rival(load):
    return load("run_rival")


def fake_quantize(job):
    """Stand in for a package: four bits per weight and a float32 scale per layer."""
    job.settings, job.version = "fake", "0"
    job.each_layer(
        lambda weight: weight.float() + 1,
        lambda moved: (moved, [torch.zeros(moved.numel() // 2, dtype=torch.uint8), moved[:1, :1]]),
    )


def test_run_writes_a_dense_folder_and_a_record(run_rival, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bnb, "quantize", fake_quantize)

    result = run_rival.main(["bnb", "--model", str(llama_folder), "--out", str(tmp_path)])

    assert tuple(json.loads((tmp_path / "rival.json").read_text())) == contract.RECORD
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


def test_windows_are_written_and_read(run_rival, llama_folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "windows.safetensors"
    text.write_text("All methods see the same tokens. " * 200)
    options = ["--samples", "3", "--sequence-length", "16", "--text", str(text)]

    run_rival.main(["windows", "--model", str(llama_folder), "--out", str(out), *options])

    found = windows.read_windows(out)
    assert found.shape == (3, 16)
    assert found.dtype == torch.int64


def test_read_windows_rejects_other_files(tmp_path):
    save_file({"tokens": torch.zeros(3, dtype=torch.int64)}, tmp_path / "w")

    with pytest.raises(SystemExit, match="needs one int64 tensor `windows`"):
        windows.read_windows(tmp_path / "w")


def test_missing_package_is_named(run_rival, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.setitem(sys.modules, "hqq", None)

    with pytest.raises(SystemExit, match=r"the package `hqq.*` is not installed here"):
        run_rival.main(["hqq", "--bits", "3", "--model", str(llama_folder), "--out", str(tmp_path)])


def test_weights_that_are_not_finite_are_rejected(run_rival, llama_folder, tmp_path, monkeypatch):
    def broken(job):
        job.weights = {name: weight.float() / 0 for name, weight in job.weights.items()}

    monkeypatch.setattr(bnb, "quantize", broken)

    with pytest.raises(ValueError, match="not finite"):
        run_rival.main(["bnb", "--model", str(llama_folder), "--out", str(tmp_path / "out")])


def test_weights_that_were_quantized_before_are_detected():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(64, 192, generator=generator) for name in ("once", "twice")}
    step = 6 / 15
    weights["twice"] = (weights["twice"] / step).round().clamp(-8, 7) * step
    job = contract.Job(argparse.Namespace(), weights)

    job.each_layer(
        lambda weight: (weight / step).round().clamp(-8, 7) * step,
        lambda dense: (dense, [torch.zeros(dense.numel() // 2, dtype=torch.uint8)]),
    )

    assert job.reproduced() == 0.5


def test_nbytes_counts_nested_tensors_only():
    stored = {"codes": torch.zeros(3, dtype=torch.uint8), "meta": {"scale": (torch.zeros(2), 64)}}

    assert contract.nbytes(contract.flat(stored)) == 3 + 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_folder_is_dequantized(bits, tmp_path):
    N, A, group = 128, 32, 64
    codes_NA = torch.randint(0, 2**bits, (N, A))
    zeros_GA = torch.randint(0, 2**bits, (N // group, A))
    scales_GA = torch.rand(N // group, A).half()
    stem = "model.layers.0.mlp.up_proj."
    tensors = {
        "qweight": pack(codes_NA, bits),
        "qzeros": pack(zeros_GA.T, bits).T.contiguous(),
        "scales": scales_GA,
        "g_idx": torch.arange(N, dtype=torch.int32) // group,
    }
    save_file({stem + key: tensor for key, tensor in tensors.items()}, tmp_path / "m.safetensors")
    options = argparse.Namespace(bits=bits, group=group)
    job = contract.Job(options, {stem + "weight": torch.zeros(A, N)})

    gptq_format.read_gptq(job, tmp_path, first_zero=1)

    group_N = torch.arange(N) // group
    expected = (codes_NA - zeros_GA[group_N] - 1) * scales_GA.float()[group_N]
    assert torch.equal(job.weights[stem + "weight"], expected.T)
    # codes, then for every group a scale of 16 bits and a zero, then an index for every input
    assert 8 * job.bytes == N * A * bits + N // group * A * (16 + bits) + 32 * N


def pack(values, bits):
    """Pack rows of integers into int32 words, lowest bit first."""
    stream = (values[:, None] >> torch.arange(bits)[None, :, None]) & 1
    words = stream.reshape(-1, 32, values.shape[1]) << torch.arange(32)[None, :, None]
    return words.sum(1).to(torch.uint32).view(torch.int32)


def test_importance_is_the_mean_square_of_an_input(llama_folder):
    weights = contract.linear_weights(llama_folder)
    tokens_BT = torch.randint(0, 320, (3, 16))
    options = argparse.Namespace(model=llama_folder)

    squares = llamacpp.mean_squares(contract.Job(options, weights, tokens_BT))

    assert {name: len(s) for name, s in squares.items()} == {
        name: weight.shape[1] for name, weight in weights.items()
    }
    # the norm in front of q leaves rows of about unit mean square, its weight is one
    assert squares["model.layers.0.self_attn.q_proj.weight"].mean() == pytest.approx(1, abs=0.1)


def test_rows_are_folded_to_multiples_of_256_columns():
    assert [llamacpp.folding(n) for n in (256, 576, 640, 1536)] == [1, 4, 2, 1]


@pytest.mark.parametrize("fold", [[], ["--fold"]])
def test_llama_quantize_gets_all_layers_and_importances(run_rival, llama_folder, tmp_path, fold):
    gguf = pytest.importorskip("gguf")
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\ncp "$2" {tmp_path}/matrix && cp "$3" "$4"\n')
    tool.chmod(0o755)
    file = tmp_path / "windows"
    save_file({"windows": torch.randint(0, 320, (2, 16))}, file)
    options = ["--type", "Q2_K", "--tools", str(tmp_path), "--windows", str(file), *fold]

    result = run_rival.main(
        ["llamacpp", "--model", str(llama_folder), "--out", str(tmp_path / "out"), *options]
    )

    # the stand-in copies its input, so the folder holds the original in bfloat16
    assert result["bits"] == 32
    assert result["reproduced"] == 1
    assert result["calibration"] == "2 windows of 16 tokens"
    before = contract.linear_weights(llama_folder)
    after = contract.linear_weights(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    entries = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "matrix").tensors}
    assert len(entries) == 2 * len(before)
    length = 256 if fold else 64
    assert entries["blk.1.attn_k.weight.in_sum2"].data.shape == (1, length)
