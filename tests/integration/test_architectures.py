"""One tiny random model of several families: calibrate, save, reload, compare."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from watersic_hf import WaterSICLinear

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}

#: Family -> (what differs from SIZES, quantized layers of a block).
FAMILIES = {
    "qwen3": (GROUPED, 7),
    "qwen2": ({"num_key_value_heads": 2}, 7),
    "mistral": (GROUPED | {"sliding_window": 8}, 7),
    "gemma2": (GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 16}, 7),
    "gemma3_text": (GROUPED | {"sliding_window": 8}, 7),
    "phi3": ({"num_key_value_heads": 2}, 4),
    "gpt_neox": ({}, 4),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, 6),
    "olmo2": ({"num_key_value_heads": 2}, 7),
    # the experts are no linear layers, and stay dense
    "mixtral": (GROUPED | {"num_local_experts": 2}, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_quantizes_saves_and_reloads(quantize, tmp_path, tokens, family):
    changes, layers_per_block = FAMILIES[family]
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | changes)).eval()
    dense.save_pretrained(tmp_path / "dense")

    model = quantize(tmp_path / "dense", dataset=tokens, bits=6.0)
    model.save_pretrained(tmp_path / "packed")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", output_loading_info=True
    )

    packed = [n for n, m in again.named_modules() if isinstance(m, WaterSICLinear)]
    assert len(packed) == 2 * layers_per_block
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found, expected = again(tokens).logits, dense(tokens).logits
        assert torch.equal(found, model(tokens).logits)
    # 6 bits, scales of 32 x 32 layers included, leave about 4 for the codes
    assert (found - expected).norm() < 0.25 * expected.norm()
    assert type(again.get_output_embeddings()) is nn.Linear
