"""Every benchmark runs, on a case small enough for a test."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_every_benchmark_has_a_test():
    tests = Path(__file__).parents[1].rglob("test_*.py")
    tested = "".join(test.read_text(encoding="utf-8") for test in tests)

    for script in (ROOT / "benchmarks").glob("*.py"):
        run_here, run_alone = f'load("{script.stem}")', f'"benchmarks/{script.name}"'
        assert run_here in tested or run_alone in tested, script.name


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_streaming_memory(load, tmp_path):
    arguments = ["--blocks", "2", "--hidden-size", "704", "--folder", str(tmp_path)]

    (row,) = load("streaming_memory").main(arguments)

    assert row["layers"] == 14
    assert row["peak MB"] == pytest.approx(row["interpreter MB"] + row["beyond MB"], abs=1)


def test_zsic_speed_gives_equal_codes_in_all_forms(load):
    (row,) = load("zsic_speed").main(["--size", "70"])

    assert row["equal"]
    assert row["speedup"] > 0


def test_rate_distortion_gap_is_the_shaping_loss_at_high_rate(load):
    (row,) = load("rate_distortion").main(["--rows", "512", "--cols", "48", "--rates", "4"])

    # finite histograms take a little off, feedback adds a little
    assert row["gap"] == pytest.approx(0.2546, abs=0.05)
    assert row["stored_gap"] > row["gap"]
    assert row["error"] < row["uniform_error"] < row["nearest_error"]
    assert row["classes"] < row["pooled"]


def test_codec_throughput_prints_all_compressors(load, capsys):
    load("codec_throughput").main(["--rows", "70", "--cols", "130", "--repeat", "1"])

    printed = capsys.readouterr().out
    for name in ("class entropy", "encode", "decode", "verify", "zlib -6", "bz2 -9"):
        assert name in printed


def test_perplexity_and_kl_improve_with_bits(load, llama_folder, tmp_path):
    options = ["--samples", "4", "--sequence-length", "64", "--windows", "2"]

    rows = load("perplexity").main(
        ["--model", str(llama_folder), "--bits", "3", "6", *options, "--json", str(tmp_path / "r")]
    )

    assert rows[0]["KL bits/token"] > rows[1]["KL bits/token"] > 0
    assert all(row["stored"] == pytest.approx(row["asked"], rel=0.01) for row in rows)
    assert (tmp_path / "r").is_file()


def test_kernels_speed_checks_products_before_timing(load, capsys):
    speed = load("kernels_speed")

    rows = speed.main(["--dry-run", "--tokens", "1"])

    forms = ["packed", "entropy", "packed, trellis", "entropy, trellis"]
    assert [row["form"] for row in rows] == forms
    assert all(3 < row["bits held"] < 5 for row in rows)
    assert all(row["us"] == "right, not timed" for row in rows)
    assert "| small small 192 x 320 | 1 | entropy |" in capsys.readouterr().out
    product = speed.Product(lambda x: 2 * x[:, :3], (), 1, 1e-2, torch.eye(3, 4))
    wrong = speed.measure(product, 1, copied=1.0)
    assert wrong["us"].startswith("WRONG: ")
    assert "times bf16" not in wrong


def test_kernel_time_predicts_from_the_committed_instructions(load, capsys):
    rows = load("kernel_time").main(["--shape", "256", "512", "--gpus", "H100"])

    assert [row["form"] for row in rows] == ["packed", "packed, trellis", "entropy"]
    assert all(row["us"] > 0 and 2.5 < row["bits held"] < 6 for row in rows)
    assert "| 256 x 512 | packed, trellis |" in capsys.readouterr().out


def test_cpu_products_are_compared_and_timed(load, capsys):
    pytest.importorskip("numba")
    speed = load("cpu_products")

    rows = speed.main(["--shapes", "130x70", "--tokens", "1", "9", "--repeats", "1"])

    lattices = ("scalar", "trellis, values", "trellis, codes")
    assert [row["lattice"] for row in rows] == [name for name in lattices for _ in range(2)]
    assert all(row["times bf16"] > 0 and row["times f32"] > 0 for row in rows)
    assert "| 130x70 | trellis, values | 9 | packed |" in capsys.readouterr().out


def test_on_gpu_dry_run_runs_all_parts(load, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))
    script = load("on_gpu")

    first = script.main(["first", "--out", str(tmp_path), "--dry-run"])
    second = script.main(["second", "--out", str(tmp_path), "--dry-run"])

    assert [row["M"] for row in first] == [1, 70] * 4
    residencies = [row["residency"] for row in second if "residency" in row]
    assert residencies == ["dense", "packed", "entropy"]
    out = capfd.readouterr().out
    assert "kernels: done" in out
    assert "zsic: done" in out
    assert "generation: done" in out


def test_parts_of_on_gpu_fit_into_the_time_of_their_command(load):
    script = load("on_gpu")

    for which, minutes in (("first", 8), ("second", 4)):
        assert sum(part.seconds for part in script.parts(which, False)) <= 60 * minutes


def test_a_part_that_fails_or_takes_too_long_keeps_its_rows(load, tmp_path):
    script = load("on_gpu")
    code = "import sys, time; open(sys.argv[-1], 'w').write('[1]'); {}"

    for action, ending in (
        ("sys.exit(3)", "failed with status 3"),
        ("time.sleep(60)", "after 5 s"),
    ):
        command = [sys.executable, "-c", code.format(action)]
        end, rows = script.run(script.Part("part", 5, command, rows=True), tmp_path)
        assert ending in end
        assert rows == [1]


def test_generation_of_a_folder(load, quantized_folder, capsys):
    rows = load("generation").main([str(quantized_folder), "--dry-run"])

    assert [row["residency"] for row in rows] == ["dense", "packed", "entropy"]


def test_output_hashes_are_reproducible(load, capsys, monkeypatch):
    script = load("output_hashes")
    # the other tests of the process keep their threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    found = []
    for _ in range(2):
        script.main(["--models", "llama", "--cases", "no_data"])
        found.append(capsys.readouterr().out.splitlines())

    assert found[0] == found[1]
    names = [line.split()[:4] for line in found[0]]
    assert ["llama", "no_data", "loaded", "model.safetensors"] in names
    assert ["llama", "no_data", "streamed", "watersic_report.jsonl"] in names
    assert all(len(line.split()[-1]) == 64 for line in found[0])
