"""Mixtures of experts between transformers and the disk; test_architectures has the rest."""

import contextlib
import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from watersic_hf import CheckpointError, WaterSICConfig
from watersic_hf.cli import main
from watersic_hf.integration import quantize_to_folder
from watersic_hf.nn import packed_layers, set_residency
from watersic_hf.quantization import Journal

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 128, (6, 48), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(original, tokens, tmp_path_factory):
    """Quantized with the whole model in memory."""
    folder = tmp_path_factory.mktemp("quantized")
    config = WaterSICConfig(5.0, dataset=tokens, batch_size=2)
    MixtralForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(folder)
    return folder


def test_experts_from_the_disk_and_after_an_interruption_are_the_same(
    original, quantized, tokens, tmp_path
):
    keep, kept = Journal.put_layer, []

    def stop(self, packed, report):
        keep(self, packed, report)
        kept.append(report.name)
        if report.name == "model.layers.1.mlp.experts.packed.1.gate_up":
            raise KeyboardInterrupt

    config = WaterSICConfig(5.0, dataset=tokens, batch_size=2)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Journal, "put_layer", stop)
        quantize_to_folder(str(original), tmp_path / "q", config)
    assert not (tmp_path / "q" / WEIGHTS).exists()
    quantize_to_folder(str(original), tmp_path / "q", config)

    assert len(kept) == 4 + 6 + 4 + 2
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (quantized / WEIGHTS).read_bytes()


def test_headless_and_full_models_load_each_others_experts(quantized, tokens, tmp_path):
    whole = MixtralForCausalLM.from_pretrained(quantized)
    body, info = MixtralModel.from_pretrained(quantized, output_loading_info=True)
    assert not info["missing_keys"]
    body.save_pretrained(tmp_path)

    again, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert info["missing_keys"] == {"lm_head.weight"}
    states = [m(input_ids=tokens).last_hidden_state for m in (whole.model, body, again.model)]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_missing_matrix_is_an_error_that_names_it(quantized, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.block_sparse_moe.experts.packed.2.down"
    tensors = load_file(quantized / WEIGHTS)
    del tensors[f"{name}.row_scale"]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())

    with pytest.raises(CheckpointError, match=r"experts\.packed\.2\.down\.row_scale"):
        MixtralForCausalLM.from_pretrained(tmp_path)


def test_inspect_knows_the_tokens_of_experts_and_why_the_router_is_dense(quantized, capsys):
    assert main(["inspect", "--json", str(quantized)]) == 0
    found = json.loads(capsys.readouterr().out)

    assert all(row["tokens"] > 0 and row["error"] is not None for row in found["layers"])
    reasons = {row["name"]: row["reason"] for row in found["dense"]}
    router = "model.layers.*.block_sparse_moe.gate.weight"
    assert reasons[router] == "MixtralTopKRouter is no linear layer"


def test_experts_with_stored_residency(quantized, tokens):
    model = MixtralForCausalLM.from_pretrained(
        quantized, quantization_config=WaterSICConfig(runtime={"residency": "entropy"})
    )
    kinds = {layer.residency for _, layer in packed_layers(model)}
    found = model(input_ids=tokens[:1, :8]).logits

    set_residency(model, "dense")

    assert kinds == {"entropy"}
    torch.testing.assert_close(found, model(input_ids=tokens[:1, :8]).logits)


def test_adapters_for_all_linear_layers_leave_experts_alone(quantized, tokens):
    peft = pytest.importorskip("peft")
    model = MixtralForCausalLM.from_pretrained(quantized)

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))

    adapted(input_ids=tokens).logits.square().mean().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    # PEFT takes Mixtral's router for one as well
    assert sum("self_attn" in name for name in grads) == 2 * 2 * 4
    assert not any("experts" in name for name in grads)
    assert all(bool(g.isfinite().all()) for g in grads.values())
