import pytest
from transformers import LlamaConfig, MixtralConfig

from watersic_hf import WaterSICConfig
from watersic_hf.integration import plan as module
from watersic_hf.integration.plan import Rates, measure_rates, plan

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
RATES = Rates(machine="test", forward=1e-14, moments=1e-14, weight=1e-8, product=1e-12)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    LlamaConfig(**LLAMA_70B).save_pretrained(tmp_path)
    monkeypatch.setattr(module, "measure_rates", lambda dtype, device, lattice: RATES)
    return str(tmp_path)


def test_a_70b_model_is_planned_from_its_configuration(folder):
    config = WaterSICConfig(bits=3.0, dataset="pydoc")

    found = plan(folder, config)

    assert (found.blocks, found.layers, found.weights) == (80, 560, 68_451_041_280)
    # the model is 141 GB
    assert 20e9 < sum(found.memory.values()) < 90e9
    weights, dense = 68_451_041_280 * 3 / 8, 2 * (2 * 128256 * 8192 + 161 * 8192)
    assert found.disk["the quantized model"] == pytest.approx(weights + dense)
    states = 2 * 2 * 128 * 2048 * 8192 * 2
    assert found.disk["hidden states, before and behind a block"] == states


def test_processes_share_the_time_and_not_the_memory(folder):
    config = WaterSICConfig(bits=3.0, dataset="pydoc")

    one, four = plan(folder, config), plan(folder, config, processes=4)

    assert sum(four.seconds.values()) < 0.6 * sum(one.seconds.values())
    assert four.memory["a block, dense and quantized"] == one.memory["a block, dense and quantized"]


def test_plan_counts_active_experts_only(folder, tmp_path):
    sizes = {k: v for k, v in LLAMA_70B.items() if k != "architectures"} | {
        "num_hidden_layers": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    }
    MixtralConfig(**sizes, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path / "moe")

    found = plan(str(tmp_path / "moe"), WaterSICConfig(bits=3.0, dataset="pydoc"))

    expert = 3 * 8192 * 28672
    attention = 8192 * (2 * 8192 + 2 * 1024)
    assert found.layers == 2 * (4 + 2 * 16)
    assert found.weights == 2 * (attention + 16 * expert)
    assert found.memory["all that reaches the experts of a block"] == 2 * 128 * 2048 * 8192 * 2
    used = 2 * (attention + 2 * expert + 16 * 8192 + 2 * 8192)
    passes = 2.5 * 2 * 128 * 2048
    assert found.seconds["both models, block by block"] == pytest.approx(1e-14 * passes * used)


def test_disabled_settings_add_no_cost(folder):
    simple = {"drift": 0, "residual": False, "allocation": "uniform", "row_importance": False}

    full = plan(folder, WaterSICConfig(bits=3.0, dataset="pydoc"))
    plain = plan(folder, WaterSICConfig(bits=3.0, dataset="pydoc", **simple))

    assert (
        plain.disk["hidden states, before and behind a block"]
        < 0.6 * full.disk["hidden states, before and behind a block"]
    )
    assert sum(plain.memory.values()) < sum(full.memory.values())


def test_plan_counts_quantized_head_with_its_own_bits(folder):
    dense = plan(folder, WaterSICConfig(bits=3.0))
    found = plan(folder, WaterSICConfig(bits=3.0, quantize_head=4.0))

    table = 128256 * 8192
    saved = dense.disk["the quantized model"] - found.disk["the quantized model"]
    assert saved == pytest.approx(table * (16 - 4) / 8, rel=1e-6)
    assert sum(found.seconds.values()) > sum(dense.seconds.values())


def test_without_data_there_are_no_hidden_states_and_nothing_runs(folder):
    found = plan(folder, WaterSICConfig(bits=3.0))

    assert found.tokens == found.disk["hidden states, before and behind a block"] == 0
    assert [what for what, seconds in found.seconds.items() if seconds] == ["quantizing"]


def test_rates_are_measured(monkeypatch):
    import torch

    monkeypatch.setattr(module, "SIZES", (64, 128))

    rates = measure_rates(torch.bfloat16, "cpu", "scalar")

    assert rates.layer(128, 128) > 0
    assert min(rates.forward, rates.moments) > 0
