"""Quantization block by block from the disk: the same bytes, in any number of attempts."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from watersic_hf import CheckpointError, WaterSICConfig
from watersic_hf.checkpoint import average_bits, average_error, read_report
from watersic_hf.cli import main
from watersic_hf.integration import quantize_to_folder
from watersic_hf.integration.folder import UNFINISHED, save_quantized
from watersic_hf.quantization import Journal

SHARDS = "60KB"


def config(**changes):
    g = torch.Generator().manual_seed(0)
    settings = {
        "bits": 4.0,
        "dataset": torch.randint(0, 320, (6, 48), generator=g),
        "samples": 6,
        "sequence_length": 48,
        "batch_size": 2,
    }
    return WaterSICConfig(**settings | changes)


def contents(folder):
    """All files by name; of the report only what is not a time, and not the page that shows it."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.*") if file.suffix != ".html"}
    rows = [json.loads(line) for line in found.pop("watersic_report.jsonl").splitlines()]
    return found | {"report": [{**row, "seconds": 0} for row in rows if "run" not in row]}


@pytest.fixture(scope="module")
def original(make_llama, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    make_llama(num_hidden_layers=3, intermediate_size=96).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(original, tmp_path_factory):
    """What comes out when nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "q"
    quantize_to_folder(str(original), folder, config(), max_shard_size=SHARDS)
    return folder


@pytest.fixture(scope="module")
def interrupted(original, tmp_path_factory):
    """A run that ended after the first of three blocks and some layers of the second."""
    folder = tmp_path_factory.mktemp("interrupted") / "q"
    keep, kept = Journal.put_layer, []

    def stop(self, packed, report):
        keep(self, packed, report)
        kept.append(report.name)
        if len(kept) == 10:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Journal, "put_layer", stop)
        quantize_to_folder(str(original), folder, config(), max_shard_size=SHARDS)
    assert len(kept) == 10
    return folder


@pytest.fixture
def unfinished(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "q")
    return tmp_path / "q"


def test_streamed_run_matches_in_memory_bytes(original, whole, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config())
    save_quantized(
        model, tmp_path / "q", tokenizer=str(original), base=str(original), max_shard_size=SHARDS
    )

    assert contents(whole) == contents(tmp_path / "q")
    assert len(list(whole.glob("*.safetensors"))) > 1
    assert not (whole / UNFINISHED).exists()


@pytest.mark.parametrize("changes", [{}, {"dataset": None}])
def test_streamed_conv1d_and_zero_rows_match_in_memory_bytes(tmp_path, changes):
    torch.manual_seed(0)
    settings = {
        "zero_rows": {r"h\.1\.mlp\.c_fc": [3, 5]},
        "modules_to_not_convert": [r"h\.0\.attn"],
        **changes,
    }
    gpt2 = GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    dense = GPT2LMHeadModel(gpt2)
    nn.init.normal_(dense.transformer.h[1].mlp.c_fc.bias)
    dense.save_pretrained(tmp_path / "m")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "m", quantization_config=config(**settings))
    model.save_pretrained(tmp_path / "a" / "q")

    quantize_to_folder(str(tmp_path / "m"), tmp_path / "b" / "q", config(**settings))

    bias = model.transformer.h[1].mlp.c_fc.bias
    assert (bias == 0).nonzero().flatten().tolist() == [3, 5]
    found = contents(tmp_path / "b" / "q")
    for name, content in contents(tmp_path / "a" / "q").items():
        assert found[name] == content, name


def tiny(kind):
    """A tiny model of some architecture."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
    }
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes))
    if kind == "untied":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if kind == "bert":
        # with a linear layer behind the blocks
        return BertForMaskedLM(BertConfig(**sizes))
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=320,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
            )
        )
    ends = {
        f"{part}_{size}": value
        for part in ("encoder", "decoder")
        for size, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 2))
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=320, d_model=32, **ends))


@pytest.mark.parametrize("kind", ["mixtral", "bert", "bart"])
def test_streamed_data_free_run_matches_on_load_bytes(kind, tmp_path):
    dense = tiny(kind)
    dense.save_pretrained(tmp_path / "dense")
    settings = WaterSICConfig(bits=5.0)
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=settings)
    base = str(tmp_path / "dense")
    save_quantized(model, tmp_path / "a" / "q", tokenizer=base, base=base)

    quantize_to_folder(base, tmp_path / "b" / "q", settings)

    assert contents(tmp_path / "b" / "q") == contents(tmp_path / "a" / "q")


@pytest.mark.parametrize("kind", ["untied", "bart", "t5"])
def test_streamed_run_matches_in_memory_bytes_on_other_architectures(kind, tmp_path):
    dense = tiny(kind)
    dense.save_pretrained(tmp_path / "dense")
    g = torch.Generator().manual_seed(1)
    windows = [torch.randint(0, 320, (n,), generator=g) for n in (32, 32, 32, 20, 20)]
    tables = kind == "untied"
    settings = config(bits=5.0, dataset=windows, quantize_embeddings=tables, quantize_head=tables)
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=settings)
    base = str(tmp_path / "dense")
    save_quantized(model, tmp_path / "a" / "q", tokenizer=base, base=base)

    quantize_to_folder(base, tmp_path / "b" / "q", settings)

    assert contents(tmp_path / "b" / "q") == contents(tmp_path / "a" / "q")


#: Runs by what they are like, and how many layers are quantized before and after a break in them.
RUNS = {
    "calibrated": ({}, 10, 11),
    "encoder": ({}, 3, 29),
    "end of the encoder": ({}, 13, 19),
    "decoder": ({}, 23, 9),
    "tables": ({"quantize_embeddings": True}, 21, 1),
    "data-free": ({"dataset": None, "quantize_embeddings": True}, 10, 12),
    "data-free tables": ({"dataset": None, "quantize_embeddings": True}, 22, 0),
}


@pytest.mark.parametrize("run", RUNS)
def test_run_resumes_after_the_last_finished_layer(original, tmp_path, run, monkeypatch):
    changes, before, after = RUNS[run]
    settings, folder = config(**changes), tmp_path / "b" / "q"
    model_class = AutoModelForCausalLM
    if "coder" in run:
        original, model_class = tmp_path / "dense", BartForConditionalGeneration
        tiny("bart").save_pretrained(original)
    model = model_class.from_pretrained(original, quantization_config=settings)
    options = {"tokenizer": str(original), "base": str(original), "max_shard_size": SHARDS}
    save_quantized(model, tmp_path / "a" / "q", **options)
    quantized, keep = [], Journal.put_layer

    def stop(self, packed, report):
        keep(self, packed, report)
        quantized.append(report.name)
        if len(quantized) == before:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_to_folder(str(original), folder, settings, max_shard_size=SHARDS)
    quantize_to_folder(str(original), folder, settings, max_shard_size=SHARDS)

    assert len(quantized) == before + after
    assert contents(folder) == contents(tmp_path / "a" / "q")


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        ([], 10),
        (["--set=quantize_embeddings=true"], 5),
        (["--dataset=none", "--set=quantize_embeddings=true"], 5),
    ],
    ids=["calibrated", "tables", "data-free"],
)
def test_repeatedly_killed_run_ends_with_the_same_bytes(original, tmp_path, options, kills):
    arguments = [
        "quantize",
        str(original),
        str(tmp_path / "killed" / "q"),
        "--samples=4",
        "--sequence-length=32",
        "--batch-size=2",
        "--bits=4",
        *options,
    ]
    context = multiprocessing.get_context("forkserver")
    # a process is there in no time
    context.set_forkserver_preload(["watersic_hf.cli", "watersic_hf.integration.folder"])

    def start(folder):
        arguments[2] = str(folder)
        process = context.Process(target=main, args=(arguments,))
        process.start()
        return process

    begin = time.monotonic()
    start(tmp_path / "whole" / "q").join()
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    killed = 0
    folder = tmp_path / "killed" / "q"
    while killed < kills:
        process = start(folder)
        process.join(moments.uniform(0, seconds / 2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        if process.exitcode == 0:
            assert contents(folder) == contents(tmp_path / "whole" / "q")
            shutil.rmtree(folder)
    finishing = start(folder)
    finishing.join()

    assert finishing.exitcode == 0
    assert contents(folder) == contents(tmp_path / "whole" / "q")
    assert not (folder / UNFINISHED).exists()


def test_a_model_that_is_quantized_already_is_refused(quantized_folder, tmp_path):
    with pytest.raises(ValueError, match="quantized already, with watersic, and dense weights"):
        quantize_to_folder(str(quantized_folder), tmp_path / "q", config())


def test_a_full_disk_loses_nothing(original, whole, unfinished):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a file of hidden states is larger, a layer's is not
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"states-working-00002.*cannot be written"):
            quantize_to_folder(str(original), unfinished, config(), max_shard_size=SHARDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    quantize_to_folder(str(original), unfinished, config(), max_shard_size=SHARDS)

    assert contents(unfinished) == contents(whole)


@pytest.mark.parametrize(
    "pattern", ["layer-*q_proj*", "block-00000*", "states-working*", "sensit*"]
)
def test_a_flipped_byte_is_found_and_the_file_named(original, unfinished, pattern):
    file = next((unfinished / UNFINISHED).glob(f"{pattern}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"{file.name}.*checksum"):
        quantize_to_folder(str(original), unfinished, config(), max_shard_size=SHARDS)

    assert file.is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3.0}, r"with other settings \(bits \(4.0 instead of 3.0\)\)"),
        ({"samples": 5}, r"settings \(samples \(6 instead of 5\)\) and windows"),
    ],
)
def test_a_changed_setting_is_an_error_that_names_it(original, unfinished, changes, message):
    with pytest.raises(CheckpointError, match=message):
        quantize_to_folder(str(original), unfinished, config(**changes))


def test_a_changed_model_is_an_error(original, unfinished, tmp_path):
    shutil.copytree(original, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    with pytest.raises(CheckpointError, match="with other model, and cannot be resumed"):
        quantize_to_folder(str(tmp_path / "other"), unfinished, config())


def test_batches_are_halved_when_memory_runs_out(
    original, whole, tmp_path, monkeypatch, watersic_log
):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def short_of_memory(self, hidden_states, *args, **kwargs):
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", short_of_memory)
    quantize_to_folder(str(original), tmp_path / "q", config(batch_size=4), max_shard_size=SHARDS)

    assert "Out of memory; continuing with batches of 2" in watersic_log.text
    assert contents(tmp_path / "q") == contents(whole)


def test_processes_share_a_run_and_one_resumes_when_another_dies(
    original, whole, tokenizer, tmp_path
):
    torch.save(config().dataset, tmp_path / "windows.pt")
    folder = tmp_path / "q"
    program = (
        "import sys, torch; from watersic_hf import WaterSICConfig; "
        "from watersic_hf.streams.processes import process_group; "
        "from watersic_hf.integration import quantize_to_folder\n"
        f"windows = torch.load({str(tmp_path / 'windows.pt')!r})\n"
        "with process_group():\n"
        f"    quantize_to_folder({str(original)!r}, {str(folder)!r}, WaterSICConfig(bits=4.0, "
        f"dataset=windows, samples=6, sequence_length=48, batch_size=2), max_shard_size={SHARDS!r})"
    )
    (tmp_path / "program.py").write_text(program)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(tmp_path / "program.py"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(launch, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / UNFINISHED / "block-00000.safetensors").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, errors = launcher.communicate()

    quantize_to_folder(str(original), folder, config(), max_shard_size=SHARDS)

    assert launcher.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    shared, alone = (read_report(f) for f in (folder, whole))
    assert {r.name for r in shared} == {r.name for r in alone}
    assert average_bits(shared) == pytest.approx(average_bits(alone), rel=0.002)
    assert average_error(shared) == pytest.approx(average_error(alone), rel=0.1)
