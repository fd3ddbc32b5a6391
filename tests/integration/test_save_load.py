import copy
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)

from watersic_hf import WaterSICConfig, WaterSICLinear
from watersic_hf.checkpoint import read_headers
from watersic_hf.integration.names import stored_names


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def generated(model, tokens):
    return model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=1)


def stored(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dataset", [None, "pydoc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_model_is_the_saved_one_bit_for_bit(quantize, tmp_path, tokens, dataset, dtype):
    model = quantize(dataset=dataset, load={"dtype": dtype})
    model.save_pretrained(tmp_path)

    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert torch.equal(logits(model, tokens), logits(again, tokens))
    assert torch.equal(generated(model, tokens), generated(again, tokens))
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype


def test_saving_again_gives_the_same_bytes(quantized_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(quantized_folder).save_pretrained(tmp_path)

    assert stored(tmp_path) == stored(quantized_folder)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / name).read_text() == (quantized_folder / name).read_text()


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"variant": "w4"}])
def test_shards_and_variants_load(quantize, tmp_path, tokens, options):
    model = quantize()
    model.save_pretrained(tmp_path, **options)
    load = {"variant": options["variant"]} if "variant" in options else {}

    again = AutoModelForCausalLM.from_pretrained(tmp_path, **load)

    assert ("max_shard_size" in options) == (len(stored(tmp_path)) > 1)
    assert torch.equal(logits(model, tokens), logits(again, tokens))


def test_the_bytes_of_the_file_are_the_bytes_of_the_layers(quantized_folder):
    model = AutoModelForCausalLM.from_pretrained(
        quantized_folder, quantization_config=WaterSICConfig(runtime={"residency": "stored"})
    )
    headers = read_headers(quantized_folder.glob("*.safetensors"))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, WaterSICLinear)}
    stored_bits = sum(m.packed.stored_bits for m in layers.values())

    assert stored_bits == 8 * sum(
        h.nbytes for n, h in headers.items() if n.rpartition(".")[0] in layers
    )
    # the rotary frequencies are held and not stored
    extra = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == sum(h.nbytes for h in headers.values()) + extra


@pytest.mark.parametrize("residency", ["dense", "packed", "entropy"])
def test_the_residency_is_chosen_at_load_and_not_saved(
    quantized_folder, tmp_path, tokens, residency
):
    reference = AutoModelForCausalLM.from_pretrained(quantized_folder)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(
            quantized_folder, quantization_config=WaterSICConfig(runtime={"residency": residency})
        )
    model.save_pretrained(tmp_path)

    assert {m.residency for m in model.modules() if isinstance(m, WaterSICLinear)} == {residency}
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens))
    assert stored(tmp_path) == stored(quantized_folder)


def test_the_residency_can_be_changed_in_place(quantized_folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    before = logits(model, tokens)
    dense_bytes = model.get_memory_footprint()

    model.set_residency("stored")

    assert model.get_memory_footprint() < 0.7 * dense_bytes
    torch.testing.assert_close(logits(model, tokens), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_can_be_asked_for_at_load(quantized_folder, tokens, dtype):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder, dtype=dtype)

    layer = model.model.layers[0].mlp.up_proj
    assert layer.dense_weight.dtype == dtype
    assert layer.row_scale.dtype == torch.float16
    assert not any(p.requires_grad for n, p in layer.named_parameters())
    assert logits(model, tokens).dtype == dtype


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_nothing_on_one_device(quantized_folder, tokens, device_map):
    reference = AutoModelForCausalLM.from_pretrained(quantized_folder)

    model = AutoModelForCausalLM.from_pretrained(quantized_folder, device_map=device_map)

    assert torch.equal(logits(model, tokens), logits(reference, tokens))


def test_a_model_offloaded_to_disk_runs_and_saves(quantized_folder, tmp_path, tokens):
    reference = AutoModelForCausalLM.from_pretrained(quantized_folder)
    where = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }

    model = AutoModelForCausalLM.from_pretrained(
        quantized_folder, device_map=where, offload_folder=tmp_path / "offload"
    )

    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), logits(reference, tokens))


def test_the_headless_model_and_the_full_one_read_each_others_files(
    quantized_folder, tmp_path, tokens
):
    full = AutoModelForCausalLM.from_pretrained(quantized_folder)

    body = AutoModel.from_pretrained(quantized_folder)
    body.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, full.model(tokens).last_hidden_state)
    assert torch.equal(logits(again, tokens), logits(full, tokens))


def test_new_head_on_a_quantized_body_is_dense(quantized_folder):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(quantized_folder, num_labels=3)

    assert type(model.score) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, WaterSICLinear)


def test_a_state_dict_loads_without_files(quantized_folder, tokens):
    reference = AutoModelForCausalLM.from_pretrained(quantized_folder)

    model = type(reference).from_pretrained(
        None, config=AutoConfig.from_pretrained(quantized_folder), state_dict=reference.state_dict()
    )

    assert torch.equal(logits(model, tokens), logits(reference, tokens))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_dequantized_model_is_an_ordinary_one(quantized_folder, tmp_path, tokens, dtype):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    before = logits(model, tokens)

    model.dequantize(dtype) if dtype else model.dequantize()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert not any(isinstance(m, WaterSICLinear) for m in model.modules())
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (dtype or torch.float32)
    assert not getattr(again, "is_quantized", False)
    if dtype is None:
        assert torch.equal(logits(again, tokens), before)


def test_a_pipeline_generates(quantized_folder):
    run = pipeline("text-generation", model=str(quantized_folder))

    out = run("for i in", max_new_tokens=5, do_sample=False)

    assert out[0]["generated_text"].startswith("for i in")


def test_a_deep_copy_is_the_same_model(quantized_folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)

    clone = copy.deepcopy(model)

    assert torch.equal(logits(clone, tokens), logits(model, tokens))


def test_compiled_static_generation_gives_the_same_tokens(quantized_folder, tokens):
    from transformers import CompileConfig

    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    expected = generated(model, tokens)

    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True
    out = model.generate(
        tokens,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=1,
        cache_implementation="static",
        compile_config=compile_config,
    )

    assert torch.equal(out, expected)


def test_loading_warns_of_nothing(quantized_folder):
    code = (
        "import warnings, logging; warnings.simplefilter('error', UserWarning)\n"
        "import watersic_hf; from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(quantized_folder)!r})"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert not any(w in done.stderr for w in ("MISSING", "UNEXPECTED", "MISMATCH", "Warning"))


def test_without_the_package_the_file_is_refused(quantized_folder, tmp_path):
    # a process in which watersic_hf is not imported
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(quantized_folder)!r})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr.splitlines()[-1]


def test_the_quantized_folder_also_serves_its_tokenizer(quantized_folder, tmp_path):
    shutil.copytree(quantized_folder, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("x")["input_ids"]
    assert os.path.isfile(tmp_path / "copy" / "config.json")


def test_the_report_knows_the_names_that_files_have_for_layers(make_llama):
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    block = "model.layers.0"
    layers = [f"{block}.mlp.experts.packed.1.down", f"{block}.self_attn.q_proj"]

    names = stored_names(MixtralForCausalLM(config), layers)

    assert names == {
        layers[0]: f"{block}.block_sparse_moe.experts.packed.1.down",
        layers[1]: layers[1],
    }
    assert stored_names(make_llama(), layers) == {name: name for name in layers}
