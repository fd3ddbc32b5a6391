"""What users do to a quantized model in memory: load states, cast, wrap, copy, resize."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

from watersic_hf import CheckpointError, WaterSICConfig
from watersic_hf.nn import packed_layers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "head_dim": 16,
}
TOKENS = torch.arange(3, 27)[None]


def quantize(folder, seed=0, *, tie_word_embeddings=True, **options):
    """A quantized model with experts and a quantized vocabulary matrix."""
    torch.manual_seed(seed)
    config = MixtralConfig(**SIZES, tie_word_embeddings=tie_word_embeddings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = {"bits": 4.0, "quantize_embeddings": True} | options
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=WaterSICConfig(**settings)
    ).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two quantized models of the same sizes; to be copied."""
    return [quantize(tmp_path_factory.mktemp(f"m{seed}"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model whose embedding and output head are quantized separately; to be copied."""
    options = {"tie_word_embeddings": False, "quantize_head": True}
    return quantize(tmp_path_factory.mktemp("untied"), **options)


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """The first of them, saved: its folder, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("saved")
    models[0].save_pretrained(folder)
    return folder, (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def by_load_model(model, other, folder):
    safetensors.torch.save_model(other, folder / "state.safetensors")
    safetensors.torch.load_model(model, folder / "state.safetensors")


LOADERS = {
    "state": lambda model, other, folder: model.load_state_dict(other.state_dict()),
    "assign": lambda model, other, folder: model.load_state_dict(other.state_dict(), assign=True),
    "load_model": by_load_model,
}


@pytest.mark.parametrize(
    ("load", "residency"), [("state", "packed"), ("assign", "dense"), ("load_model", "dense")]
)
def test_a_loaded_state_reaches_layers_experts_and_tied_vocabulary(
    models, load, residency, tmp_path
):
    model, other = map(copy.deepcopy, models)
    model.set_residency(residency)
    assert not torch.allclose(logits(model), logits(other), atol=1e-2)

    LOADERS[load](model, other, tmp_path)

    assert {layer.residency for _, layer in packed_layers(model)} == {residency}
    torch.testing.assert_close(logits(model), logits(other))
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_adapter(model):
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"]))
    tuned(TOKENS).logits.sum().backward()
    return tuned.unload()


CHANGES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "half and kbit": lambda model: prepare_model_for_kbit_training(model.to(torch.float16)),
    "adapter": with_adapter,
    "copies": lambda model: pickled(pickle.loads(pickle.dumps(model))),
    "residency": lambda model: (model.set_residency("packed"), model.to(torch.float16))[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_quantized_tensors_on_the_disk_do_not_depend_on_what_the_model_went_through(
    models, saved, change, tmp_path
):
    model = CHANGES[change](copy.deepcopy(models[0]))

    model.save_pretrained(tmp_path)

    expected = safetensors.torch.load(saved[1])
    found = safetensors.torch.load((tmp_path / "model.safetensors").read_bytes())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.dtype == torch.uint8 or name.endswith("_scale"):
            assert tensor.dtype == found[name].dtype
            assert torch.equal(tensor, found[name])
    dtype = found["model.norm.weight"].dtype
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(again).dtype == again.dtype == dtype
    assert {p.dtype for p in again.dequantize().parameters()} == {dtype}


def test_changed_scales_are_refused_when_saving(models, tmp_path):
    model = copy.deepcopy(models[0])
    layer = model.model.layers[0].self_attn.q_proj
    layer.row_scale.data = layer.row_scale.data * 1.1

    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj: .*changed in memory"):
        model.save_pretrained(tmp_path)

    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_in_other_precisions_run_in_every_residency(models, dtype, tmp_path):
    copy.deepcopy(models[0]).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(model)
    assert expected.dtype == model.dtype == dtype

    tolerance = 1e-5 if dtype == torch.float64 else 1e-2
    for residency in ("packed", "entropy", "stored", "dense"):
        model.set_residency(residency)
        torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residency", ["packed", "entropy"])
def test_autocast_gives_the_logits_of_the_dense_model(models, residency):
    model, dense = copy.deepcopy(models[0]), copy.deepcopy(models[0]).dequantize()
    model.set_residency(residency)

    with torch.autocast("cpu", torch.bfloat16):
        found, expected = logits(model), logits(dense)

    assert found.dtype == expected.dtype
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_trainer_trains_an_adapter_in_bfloat16(models, tmp_path):
    model = copy.deepcopy(models[0])
    model.set_residency("packed")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        bf16=True,
        use_cpu=True,
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    before = {name: p.clone() for name, p in tuned.named_parameters() if "lora_" in name}

    trained = Trainer(model=tuned, args=arguments, train_dataset=rows).train()

    assert 3 < trained.training_loss < 8
    assert any(not torch.equal(before[n], p) for n, p in tuned.named_parameters() if n in before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embedding", [True, False], ids=["embedding", "head"])
def test_a_quantized_vocabulary_matrix_is_not_resized(models, untied, tied, embedding):
    if tied and not embedding:
        pytest.skip("a tied head is the embedding")
    model = copy.deepcopy(models[0] if tied else untied)
    if not embedding:
        model.set_input_embeddings(nn.Embedding(96, 32))
    names = (["model.embed_tokens"] if embedding else []) + ["lm_head"]
    expected = logits(model)

    named = rf"^{', '.join(names)}: .*from 96 to 104 tokens.*`model\.dequantize"
    with pytest.raises(ValueError, match=named):
        model.resize_token_embeddings(104)
    with pytest.raises(ValueError, match="from 96 to 100 tokens"):
        model.resize_token_embeddings(pad_to_multiple_of=50)

    for same in ((), (96,), (90, 32)):
        assert model.resize_token_embeddings(*same) is model.get_input_embeddings()
    assert torch.equal(logits(model), expected)
    model.dequantize().resize_token_embeddings(104, mean_resizing=False)
    torch.testing.assert_close(logits(model)[..., :96], expected)


def test_a_dense_vocabulary_of_a_quantized_model_is_resized(tmp_path):
    model = quantize(tmp_path / "m", quantize_embeddings=False)
    expected = logits(model)

    model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(tmp_path / "q")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    torch.testing.assert_close(logits(again)[..., :96], expected)


def test_another_embedding_replaces_a_quantized_one_and_is_tied_to_the_head(models, tmp_path):
    model = copy.deepcopy(models[0])
    model.set_input_embeddings(nn.Embedding(96, 32))
    with pytest.raises(ValueError, match=r"^lm_head: .*tie_weights"):
        model.save_pretrained(tmp_path)

    model.tie_weights()

    hidden = torch.randn(2, 32)
    expected = hidden @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(model.lm_head(hidden), expected)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(model.dequantize()), expected)
