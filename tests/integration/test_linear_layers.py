"""Which modules are linear layers, whatever their class."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from watersic_hf import WaterSICConfig, WaterSICLinear
from watersic_hf.integration.linear_layers import as_linear, like, linear_layers, shape_of


class SameLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


def test_linear_layers_are_recognised_by_what_they_compute():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "conv1d": Conv1D(6, 4),
            "same": SameLinear(4, 6),
            "doubled": DoubledLinear(4, 6),
            "embedding": nn.Embedding(6, 4),
            # reads the weight of its out_proj without calling it
            "attention": nn.MultiheadAttention(4, 2),
            "packed": WaterSICLinear(4, 6),
        }
    )

    assert set(linear_layers(model)) == {"linear", "conv1d", "same"}


def test_conv1d_to_linear_and_back_shares_memory_and_values():
    conv1d, x = Conv1D(6, 4), torch.randn(2, 3, 4)
    conv1d.bias.data.normal_()

    linear = as_linear(conv1d)
    back = like(conv1d, linear)

    assert shape_of(conv1d) == (6, 4) == tuple(linear.weight.shape)
    assert linear.weight.data_ptr() == conv1d.weight.data_ptr()
    torch.testing.assert_close(linear(x), conv1d(x))
    assert type(back) is Conv1D
    assert torch.equal(back(x), conv1d(x))


CONFIGS = {
    "gpt2": GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_dequantizing_gives_back_layers_of_the_models_own_class(
    tmp_path, tokens, family, calibrated
):
    dense = AutoModelForCausalLM.from_config(CONFIGS[family])
    dense.save_pretrained(tmp_path / "dense")
    # one layer stays dense on purpose
    config = WaterSICConfig(
        6.0, dataset=tokens if calibrated else None, modules_to_not_convert=[r"h\.0\.mlp\..*"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(again(tokens).logits, expected)

    again.dequantize()
    again.save_pretrained(tmp_path / "undone")
    undone = AutoModelForCausalLM.from_pretrained(tmp_path / "undone")

    kinds = {name: type(module) for name, module in dense.named_modules()}
    assert {name: type(module) for name, module in undone.named_modules()} == kinds
    with torch.no_grad():
        torch.testing.assert_close(undone(tokens).logits, expected)


def test_what_stays_dense_is_written_down_with_its_reason(
    quantize, make_llama, tmp_path, watersic_log
):
    model = make_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)

    model = quantize(tmp_path, modules_to_not_convert=["v_proj", r"layers\.1\.mlp"])

    expected = {
        "model.embed_tokens": "embedding",
        "lm_head": "output head",
        "model.layers.*.self_attn.v_proj": "named in modules_to_not_convert",
        # those of the other block are quantized
        **{
            f"model.layers.1.mlp.{name}_proj": "named in modules_to_not_convert"
            for name in ("gate", "up", "down")
        },
    }
    assert model.config.quantization_config.left_dense == expected
    assert "model.layers.*.self_attn.v_proj (named in modules_to_not_convert)" in watersic_log.text


def test_layers_and_experts_that_stay_dense_have_reasons(tmp_path, tokens):
    from transformers import BertConfig, BertForMaskedLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    reasons = {}
    for model, dense in (
        (BertForMaskedLM(BertConfig(**sizes)), None),
        (Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)), [r"layers\.0\.mlp\.experts"]),
    ):
        config = WaterSICConfig(6.0, dataset=tokens, modules_to_not_convert=dense)
        load = type(model).from_pretrained
        model.save_pretrained(tmp_path / "dense")
        quantized = load(tmp_path / "dense", quantization_config=config)
        reasons |= quantized.config.quantization_config.left_dense

    assert reasons["cls.predictions.transform.dense"] == "no calibration data reaches it"
    assert reasons["model.layers.*.mlp.gate"] == "Qwen2MoeTopKRouter is no linear layer"
    assert reasons["model.layers.*.mlp.shared_expert_gate"] == "gate of a shared expert"
    assert reasons["model.layers.0.mlp.experts"] == "named in modules_to_not_convert"
    assert "model.layers.1.mlp.experts" not in reasons
    quantized.save_pretrained(tmp_path / "packed")
    again, info = load(tmp_path / "packed", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(input_ids=tokens).logits, quantized(input_ids=tokens).logits)
