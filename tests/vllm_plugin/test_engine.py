"""vLLM runs quantized models: the same tokens as transformers; damage is refused at the start."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

vllm = pytest.importorskip("vllm")
ENGINE = Path(__file__).with_name("engine.py")
PROMPTS = [[5, 80, 17, 200], [0, 33, 34, 35, 36, 37, 38], [101], [250, 3, 3, 9, 12, 300]]

TWO = {"tensor_parallel_size": 2}
# two ranks on one NUMA node
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

#: Model, residency, and options of the engine.
RUNS = {
    "llama": ("llama", "dense", {}),
    "llama-packed-two": ("llama", "packed", TWO),
    "llama-packed-compiled": ("llama", "packed", {"enforce_eager": False}),
    "tied-packed-two": ("tied", "packed", TWO),
    "tied-stored": ("tied", "stored", {}),
    "phi3-dense-two": ("phi3", "dense", TWO),
    "phi3-packed-two": ("phi3", "packed", TWO),
    "moe-packed": ("moe", "packed", {}),
    "moe-dense-two": ("moe", "dense", TWO),
    "gpt2-packed": ("gpt2", "packed", {}),
    "finetuned-entropy": ("finetuned", "entropy", {}),
    "llama-packed-adapter": ("llama", "packed", {"enable_lora": True, "max_lora_rank": 8}),
}


def start_engines(cases, folder):
    """Run the cases in a process that knows nothing of this one; return their results."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(ENGINE), str(folder / "cases.json"), str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results").read_text())


def case_of(folder, residency, options):
    extra = {"additional_config": {"watersic": {"residency": residency}}}
    return {
        "model": str(folder),
        "prompts": PROMPTS,
        "options": {**extra, **options},
        "environment": TWO_RANKS if TWO.keys() & options.keys() else {},
    }


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """A LoRA adapter of the model ``llama`` that changes its tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    adapted.save_pretrained(folder)
    return folder


def assert_as_transformers(model, outputs):
    """Check that every token is the most likely one for transformers, as likely as for vLLM."""
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = output["tokens"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        log_TV = logits_TV.float().log_softmax(-1)
        assert log_TV.argmax(-1).tolist() == tokens
        log_T = log_TV[torch.arange(len(tokens)), tokens]
        # float32, other orders of summation
        assert torch.allclose(log_T, torch.tensor(output["log_probabilities"]), atol=1e-4)


def flip(tensors, name):
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8)[-9] ^= 1


def cut(tensors, name, size):
    tensors[name] = tensors[name][:size].clone()


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


Q, O, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "mlp.down_proj"

#: What is done to the tensors of a model, and what the error names.
DAMAGE = {
    "payload": (lambda t: flip(t, f"{Q}.weight"), Q),
    "scale": (lambda t: flip(t, f"{O}.row_scale"), O),
    "short-payload": (lambda t: cut(t, f"{Q}.weight", 500), Q),
    "short-scale": (lambda t: cut(t, f"{O}.col_scale", 100), O),
    "no-payload": (lambda t: t.pop(f"{Q}.weight"), Q),
    "no-scale": (lambda t: t.pop(f"{Q}.row_scale"), Q),
    "no-norm": (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "input_layernorm"),
    "no-bias": (lambda t: t.pop(f"{Q}.bias"), f"{Q}.bias"),
    "swapped": (lambda t: swap(t, f"{Q}.weight", f"{O}.weight"), "self_attn"),
    "table": (lambda t: flip(t, "model.embed_tokens.weight"), "embed_tokens"),
}


def damaged_cases(folders, root):
    """Cases whose engines refuse to start, or to load again."""
    cases = {}
    for number, (name, (damage, _)) in enumerate(DAMAGE.items()):
        folder = root / name
        shutil.copytree(folders["llama"], folder)
        tensors = load_file(folder / "model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        cases[name] = case_of(
            folder, "packed" if number % 2 else "dense", TWO if not number else {}
        )
    newer = root / "newer"
    shutil.copytree(folders["llama"], newer)
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    cases["newer"] = case_of(newer, "dense", {})
    cases["reload"] = case_of(folders["llama"], "dense", {}) | {"call": "reload"}
    return cases


@pytest.fixture(scope="module")
def results(folders, adapter, tmp_path_factory):
    """What every engine says, by the name of its case."""
    cases = {name: case_of(folders[model], *rest) for name, (model, *rest) in RUNS.items()}
    cases["llama-packed-adapter"]["lora"] = str(adapter)
    root = tmp_path_factory.mktemp("engines")
    return start_engines(cases | damaged_cases(folders, root), root)


@pytest.mark.parametrize("name", RUNS)
def test_tokens_are_those_of_transformers(name, results, folders, adapter):
    assert "error" not in results[name], results[name]["error"]
    model = AutoModelForCausalLM.from_pretrained(folders[RUNS[name][0]], dtype=torch.float32)

    if name.endswith("-adapter"):
        model = PeftModel.from_pretrained(model, adapter)

    assert_as_transformers(model.eval(), results[name]["outputs"])


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_at_the_start(name, results):
    error = results[name]["error"]

    # in the front end, vLLM wraps it
    message = re.search(r"(CheckpointError: |Value error, )(.*)", error)
    assert message is not None, error
    assert DAMAGE[name][1] in message[2]


def test_a_newer_format_is_refused(results):
    assert "update watersic-hf" in results["newer"]["error"]


def test_new_weights_for_a_running_engine_are_refused(results):
    assert "Start the engine again" in results["reload"]["error"]


def test_the_benchmark_runs(folders, tmp_path):
    benchmark = Path(__file__).parents[2] / "benchmarks/serving.py"
    options = ["--residencies", "packed", "--turns", "1", "--tokens", "4"]
    command = [sys.executable, str(benchmark), str(folders["gpt2"]), *options]
    # little memory to fill with zeros, and no compilation, which takes longer than all else
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}

    subprocess.run(
        [*command, "--json", str(tmp_path / "rows")], env=os.environ | settings, check=True
    )

    (row,) = json.loads((tmp_path / "rows").read_text())
    assert row["tokens/s, 8"] > 0
