"""Half precision on a processor that is slow in it: computed in float32, stored as it was."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from watersic_hf import WaterSICConfig
from watersic_hf.finetuning import FinetuneSettings
from watersic_hf.finetuning.folder import finetune_to_folder
from watersic_hf.integration import quantize_to_folder
from watersic_hf.streams import precision

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MODELS = {
    # with biases beside packed layers
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(**GPT2)),
    "mixtral": (
        MixtralForCausalLM,
        lambda: MixtralConfig(**SIZES, **HEADS, num_local_experts=4),
    ),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES, **HEADS)),
}


def config(**changes):
    tokens = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
    settings = {"bits": 4.0, "dataset": tokens, "samples": 6, "sequence_length": 48}
    return WaterSICConfig(**settings | {"batch_size": 2} | changes)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)


@pytest.fixture
def dense(request, tmp_path):
    """Folders of a model in bfloat16 and of the same weights in float32."""
    torch.manual_seed(0)
    model_class, sizes = MODELS[request.param]
    model = model_class(sizes()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    return tmp_path / "half", tmp_path / "whole"


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dense", MODELS, indirect=True)
def test_results_are_those_of_float32_in_the_dtypes_of_the_model(dense, slow, tmp_path):
    half, whole = dense
    tables = {"quantize_embeddings": True}
    quantize_to_folder(str(whole), tmp_path / "wanted", config(**tables))

    quantize_to_folder(str(half), tmp_path / "streamed", config(**tables))
    model = AutoModelForCausalLM.from_pretrained(half, quantization_config=config(**tables))

    assert model.dtype == torch.bfloat16
    assert not {t.dtype for t in model.parameters()} & {torch.float32}
    model.save_pretrained(tmp_path / "loaded")
    found, wanted = tensors(tmp_path / "streamed"), tensors(tmp_path / "wanted")
    loaded = tensors(tmp_path / "loaded")
    assert found.keys() == wanted.keys() == loaded.keys()
    for name, tensor in wanted.items():
        kind = torch.bfloat16 if tensor.dtype == torch.float32 else tensor.dtype
        assert found[name].dtype == loaded[name].dtype == kind, name
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
        assert torch.equal(found[name], loaded[name]), name
    tokens = torch.arange(12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_finetuning_keeps_the_dtypes(dense, slow, tmp_path, tokenizer):
    half, _ = dense
    tokenizer.save_pretrained(half)
    quantize_to_folder(str(half), tmp_path / "q", config(bits=3.0))

    finetune_to_folder(
        str(tmp_path / "q"),
        tmp_path / "tuned",
        str(half),
        samples=4,
        sequence_length=16,
        settings=FinetuneSettings(epochs=1, batch_size=1),
    )

    before, after = tensors(tmp_path / "q"), tensors(tmp_path / "tuned")
    assert {name: t.dtype for name, t in before.items()} == {n: t.dtype for n, t in after.items()}
