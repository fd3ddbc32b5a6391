"""Layers whose input is zero, and models in float64 and float16."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from watersic_hf import WaterSICConfig
from watersic_hf.streams import precision

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
TOKENS = torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(7))


def windows():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (48,), generator=g) for _ in range(4)]


def quantize(model, folder, *, with_data=True, **settings):
    """Save a model, quantize it, and return it as it is and as it is loaded again."""
    model.save_pretrained(folder / "dense")
    settings = {"bits": 4, "samples": 4, "sequence_length": 48} | settings
    config = WaterSICConfig(dataset=windows() if with_data else None, **settings)
    quantized = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    quantized.save_pretrained(folder / "quantized")
    return quantized.eval(), AutoModelForCausalLM.from_pretrained(folder / "quantized").eval()


def zero(model, *names):
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight.zero_()
    return model


@torch.no_grad()
def distance(model, other):
    found, wanted = (m(TOKENS).logits.double() for m in (model, other))
    assert bool(found.isfinite().all())
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def without_data(model):
    return {report.name for report in model.hf_quantizer.reports if report.tokens == 0}


#: Modules whose weights are zero, and the layers whose input is zero therefore.
PRUNED = {
    "layers": (
        [
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
        ],
        {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"},
    ),
    "a norm and an output": (
        ["model.layers.1.post_attention_layernorm", "model.layers.0.mlp.down_proj"],
        {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")},
    ),
    "the last norm": (["model.norm"], {"lm_head"}),
}


@pytest.mark.parametrize("part", PRUNED)
def test_a_pruned_model_is_quantized_and_says_which_inputs_are_zero(
    part, make_llama, tmp_path, caplog
):
    names, expected = PRUNED[part]
    dense = zero(make_llama(**SIZES, tie_word_embeddings=False), *names)

    model, loaded = quantize(dense, tmp_path, quantize_head=part == "the last norm")

    assert distance(model, dense) < 0.2
    assert distance(loaded, model) == 0
    assert without_data(model) == expected
    for name in expected:
        assert f"{name}: its input is zero for all calibration tokens" in caplog.text


def test_a_layer_behind_values_that_were_rounded_to_zero(make_llama, tmp_path):
    model, _ = quantize(
        make_llama(**SIZES), tmp_path, bits=2, layer_bits={r"layers\.0.*v_proj": 0.75}
    )

    assert bool(model(TOKENS).logits.isfinite().all())


def test_embedding_rows_that_are_zero_stay_zero(make_llama, tmp_path):
    dense = make_llama(**SIZES)
    with torch.no_grad():
        dense.model.embed_tokens.weight[3:10] = 0

    model, loaded = quantize(dense, tmp_path, with_data=False, quantize_embeddings=True)

    assert not bool(model.model.embed_tokens(torch.arange(3, 10)).any())
    assert distance(loaded, model) == 0


def test_an_embedding_of_zeros(make_llama, tmp_path):
    dense = zero(make_llama(**SIZES), "model.embed_tokens")

    model, _ = quantize(dense, tmp_path, quantize_embeddings=True)

    assert distance(model, dense) == 0


def make_mixtral(**changes):
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES | changes, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    # the other implementations of transformers do not know float64
    model.set_experts_implementation("eager")
    return model


def test_experts_whose_tokens_are_zero(tmp_path):
    dense = zero(make_mixtral(), "model.layers.1.post_attention_layernorm")

    model, loaded = quantize(dense, tmp_path)

    assert distance(model, dense) < 0.2
    assert distance(loaded, model) == 0
    assert {n for n in without_data(model) if "layers.1.mlp.experts" in n} == without_data(model)
    assert len(without_data(model)) == 6


def test_not_a_number_stays_an_error(make_llama, tmp_path):
    dense = make_llama(**SIZES)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+_proj: .* NaN|not finite"):
        quantize(dense, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("experts", "with_data"), [(False, True), (True, True), (False, False)])
def test_float64_and_float16(experts, dtype, with_data, make_llama, tmp_path):
    make = make_mixtral if experts else make_llama
    dense = make(**SIZES | {"num_hidden_layers": 1}).to(dtype)

    model, loaded = quantize(
        dense, tmp_path, with_data=with_data, quantize_head=True, quantize_embeddings=True
    )

    assert distance(model, dense) < 0.3
    assert distance(loaded, model) == 0
    assert {p.dtype for p in loaded.dequantize().parameters()} == {dtype}


def test_activations_beyond_float16_are_an_error_that_names_the_layer(
    make_llama, tmp_path, monkeypatch
):
    # a processor that computes in float16
    monkeypatch.setattr(precision, "_has_units", lambda dtype: True)
    dense = make_llama(**SIZES)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.mul_(3e4)
        dense.model.layers[0].mlp.gate_proj.weight.mul_(3e4)

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: .*NaN or infinite"):
        quantize(dense.half(), tmp_path)
