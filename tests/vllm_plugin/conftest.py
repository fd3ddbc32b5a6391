"""Tiny models with the parts that engines treat differently, quantized by the command line."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from watersic_hf.cli import main

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT2_SIZES = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 320}
BOTH_TABLES = ["--set", "quantize_embeddings=true", "--set", "quantize_head=true"]


def models():
    """The dense models, and the options of ``watersic quantize`` for each."""
    untied = {**SIZES, "tie_word_embeddings": False}
    experts = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        # biases of q, k and v; an untied head; a dense layer in a module with packed ones
        "llama": (
            LlamaForCausalLM(LlamaConfig(**untied, attention_bias=True)),
            [*BOTH_TABLES, "--skip", "layers.0.self_attn.k_proj"],
        ),
        # a table that is packed and tied; one head of keys and values for two processes
        "tied": (
            LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1})),
            ["--set", "quantize_embeddings=true"],
        ),
        # q, k, v and gate, up are joined in the files
        "phi3": (Phi3ForCausalLM(Phi3Config(**untied, pad_token_id=0)), []),
        "moe": (
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**untied, **experts, head_dim=64)),
            BOTH_TABLES,
        ),
        # Conv1D
        "gpt2": (
            GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=1)),
            ["--set", "quantize_embeddings=true"],
        ),
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Folders of the quantized models, by name."""
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    found = {}
    for name, (model, options) in models().items():
        for key, parameter in model.named_parameters():
            # larger than at initialization, so that the outputs are far from uniform
            if parameter.ndim > 1:
                parameter.data *= 3
            elif key.endswith("bias"):
                parameter.data.normal_(0, 0.3)
        dense, found[name] = root / f"{name}-dense", root / name
        model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        command = ["quantize", str(dense), str(found[name]), "--bits", "4", "--dataset", "none"]
        assert main([*command, *options, "--no-check"]) == 0
    found["finetuned"] = root / "finetuned"
    command = ["finetune", str(found["tied"]), str(found["finetuned"]), "--dataset", "pydoc"]
    options = ["--samples", "8", "--sequence-length", "32", "--epochs", "1"]
    assert main([*command, "--teacher", str(root / "tied-dense"), *options]) == 0
    return found
