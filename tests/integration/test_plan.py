import pytest
from transformers import LlamaConfig, MixtralConfig

from watersic_hf import WaterSICConfig
from watersic_hf.integration import plan as module
from watersic_hf.integration import rates as rates_module
from watersic_hf.integration.plan import plan
from watersic_hf.integration.rates import Rates, measure_rates
from watersic_hf.streams import precision

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
    # on any machine, the plan of one that computes in bfloat16
    monkeypatch.setattr(precision, "_has_units", lambda dtype: True)
    set_machine(monkeypatch, memory=1e12, disk=1e13)
    return str(tmp_path)


@pytest.fixture
def short(folder, tmp_path):
    """Two blocks of the model, which take the same memory."""
    LlamaConfig(**LLAMA_70B | {"num_hidden_layers": 2}).save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


def set_machine(monkeypatch, *, memory, disk):
    monkeypatch.setattr(module, "free_memory", lambda: int(memory))
    monkeypatch.setattr(module, "_free_disk", lambda folder: int(disk))


def test_a_70b_model_is_planned_from_its_configuration(folder):
    config = WaterSICConfig(bits=3.0, dataset="pydoc")

    found = plan(folder, config)

    assert (found.blocks, found.layers, found.weights) == (80, 560, 68_451_041_280)
    # the model is 141 GB
    assert 20e9 < sum(found.memory.values()) < 32e9
    weights, dense = 68_451_041_280 * 3 / 8, 2 * (2 * 128256 * 8192 + 161 * 8192)
    assert found.disk["the quantized model"] == pytest.approx(weights + dense)
    states = 2 * 2 * 128 * 2048 * 8192 * 2
    assert found.disk["hidden states, before and behind a block"] == states


def test_processes_share_the_time_and_not_the_memory(short):
    config = WaterSICConfig(bits=3.0, dataset="pydoc")

    one, four = plan(short, config), plan(short, config, processes=4)

    assert sum(four.seconds.values()) < 0.6 * sum(one.seconds.values())
    assert four.memory["a block, dense and quantized"] == one.memory["a block, dense and quantized"]


def test_plan_counts_active_experts_only(short, tmp_path):
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


def test_disabled_settings_add_no_cost(short):
    simple = {"drift": 0, "residual": False, "allocation": "uniform", "row_importance": False}

    full = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc"))
    plain = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc", **simple))

    assert (
        plain.disk["hidden states, before and behind a block"]
        < 0.6 * full.disk["hidden states, before and behind a block"]
    )
    assert sum(plain.memory.values()) < sum(full.memory.values())


def test_plan_counts_quantized_head_with_its_own_bits(short):
    dense = plan(short, WaterSICConfig(bits=3.0))
    found = plan(short, WaterSICConfig(bits=3.0, quantize_head=4.0))

    table = 128256 * 8192
    saved = dense.disk["the quantized model"] - found.disk["the quantized model"]
    assert saved == pytest.approx(table * (16 - 4) / 8, rel=1e-6)
    assert sum(found.seconds.values()) > sum(dense.seconds.values())


def test_without_data_there_are_no_hidden_states_and_nothing_runs(short):
    found = plan(short, WaterSICConfig(bits=3.0))

    assert found.tokens == found.disk["hidden states, before and behind a block"] == 0
    assert [what for what, seconds in found.seconds.items() if seconds] == ["quantizing"]


def test_layer_with_the_largest_input_is_the_largest_part_of_a_70b_model(short):
    found = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc"))

    # measured for this shape: 2.86 squares of its inputs (`tests/core/test_wide.py`)
    work = found.memory["a layer at work with its moments, or a batch, or the head"]
    assert work == pytest.approx(2.86 * 8 * 28672**2, rel=0.05)


def test_a_run_that_fits_needs_no_proposal(short):
    found = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc"))

    assert found.fits
    assert found.proposal is None


@pytest.mark.parametrize(
    ("memory", "disk", "processes", "options"),
    [
        # batches of 8 windows are not what takes the memory
        (64e9, 1e13, 4, "--processes 2"),
        (1e12, 20e9, 1, "--samples 64"),
        (24e9, 1e13, 1, "--dataset none"),
    ],
)
def test_settings_that_fit_the_machine_are_proposed(
    short, monkeypatch, memory, disk, processes, options
):
    set_machine(monkeypatch, memory=memory, disk=disk)

    found = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc"), processes=processes)

    assert not found.fits
    assert found.proposal.options == options
    # the command line accepts them, and the run fits
    settings = {"dataset": "pydoc"} | found.proposal.settings
    again = plan(short, WaterSICConfig(bits=3.0, **settings), processes=found.proposal.processes)
    assert again.fits
    assert sum(again.memory.values()) == pytest.approx(found.proposal.memory, rel=0.01)


def test_nothing_is_proposed_if_nothing_fits(short, monkeypatch):
    set_machine(monkeypatch, memory=1e9, disk=1e13)

    found = plan(short, WaterSICConfig(bits=3.0, dataset="pydoc"))

    assert not found.fits
    assert found.proposal is None


def test_smaller_batches_are_proposed(tmp_path, short, monkeypatch):
    sizes = LLAMA_70B | {"hidden_size": 1024, "intermediate_size": 3584, "vocab_size": 8192}
    sizes |= {"num_attention_heads": 8, "num_hidden_layers": 2}
    LlamaConfig(**sizes).save_pretrained(tmp_path / "small")
    asked = {"bits": 3.0, "dataset": "pydoc", "batch_size": 64}
    small = str(tmp_path / "small")
    resident = plan(small, WaterSICConfig(**asked)).memory["Python and libraries"]
    set_machine(monkeypatch, memory=resident + 1.9e9, disk=1e13)

    found = plan(small, WaterSICConfig(**asked))

    assert set(found.proposal.settings) == {"batch_size"}
    assert found.proposal.settings["batch_size"] < 64


def test_rates_are_measured(monkeypatch):
    import torch

    monkeypatch.setattr(rates_module, "QUICK_SIZES", (64, 128))

    rates = measure_rates(torch.bfloat16, "cpu", "scalar", quick=True)

    assert rates.layer(128, 128) > 0
    assert min(rates.forward, rates.moments) > 0
