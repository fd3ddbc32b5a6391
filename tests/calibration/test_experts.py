import functools
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM

from watersic_hf import WaterSICConfig
from watersic_hf.calibration.experts import ExpertMoments
from watersic_hf.calibration.sensitivity import layer_sensitivities
from watersic_hf.checkpoint import experts_together, inspect_checkpoint
from watersic_hf.cli import main
from watersic_hf.core import Moments, Whitening, pool_fraction
from watersic_hf.nn import fused_experts, packed_layers, separate_dense
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.stream import block_stream

EXPERTS = "model.layers.0.mlp.experts"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def windows():
    return torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(windows):
    """A model with four experts, of which number 3 gets no tokens and number 2 gets three."""
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(**SIZES)).eval()
    router = model.model.layers[0].mlp.router
    scores = []
    handle = router.register_forward_hook(lambda module, args, output: scores.append(output[0]))
    with torch.no_grad():
        router.bias[3] = -1e4
        model(input_ids=windows)
        handle.remove()
        margin_T = scores[0][:, 2] - scores[0][:, :2].amin(1)
        router.bias[2] -= margin_T.sort(descending=True).values[2:4].mean()
    return model


def test_experts_with_no_or_few_tokens_are_quantized_and_reported(
    tmp_path, model, windows, watersic_log
):
    model.save_pretrained(tmp_path / "dense")

    config = WaterSICConfig(5.0, dataset=windows)
    quantized = GptOssForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)

    reports = {r.name: r for r in quantized.hf_quantizer.reports if r.name.startswith(EXPERTS)}
    tokens = [reports[f"{EXPERTS}.packed.{e}.down"].tokens for e in range(4)]
    assert tokens[2:] == [3, 0]
    assert sum(tokens) == 2 * windows.numel()
    assert reports[f"{EXPERTS}.packed.3.down"].pooled == 1
    assert reports[f"{EXPERTS}.packed.2.gate_up"].pooled == pool_fraction(32, 3) > 0.5
    assert reports[f"{EXPERTS}.packed.0.gate_up"].pooled < 0.5
    assert "2 of 4 experts see so few calibration tokens" in watersic_log.text
    assert "expert 3 sees 0, expert 2 sees 3" in watersic_log.text
    for name, layer in packed_layers(quantized):
        if name.startswith(EXPERTS):
            weight_AN = layer.dequantize().weight
            original = model.get_submodule(EXPERTS)
            *_, expert, matrix = name.split(".")
            expected_AN = getattr(original, f"{matrix}_proj")[int(expert)].T
            assert bool(weight_AN.isfinite().all())
            # at least 1 of the 3.6 bits is spent on the scales of so small a matrix
            assert (weight_AN - expected_AN).norm() < 0.6 * expected_AN.norm()
            assert reports[name].error < 0.1


def test_experts_with_few_tokens_get_fewer_bits(tmp_path, model, windows):
    model.save_pretrained(tmp_path / "dense")

    config = WaterSICConfig(5.0, dataset=windows)
    quantized = GptOssForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)

    reports = {r.name: r for r in quantized.hf_quantizer.reports}
    bits = [reports[f"{EXPERTS}.packed.{e}.gate_up"].asked for e in range(4)]
    assert max(bits[2:]) < min(bits[:2]) - 1


def test_expert_moments_match_routed_tokens_in_both_models(model, windows):
    block = model.model.layers[0]
    block.requires_grad_(False)
    separate_dense(block.mlp.experts, fused_experts(block.mlp.experts))
    stream = block_stream(model, [block], list(windows), batch_size=4)
    drifted = stream.copy()
    drifted.hidden = [1.5 * hidden for hidden in drifted.hidden]
    calls = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    hidden_TH, index_TK, _ = calls[0]
    x_SN = hidden_TH[(index_TK == 0).any(1)]

    moments = ExpertMoments.collect(
        BlockView(drifted, 0, block), BlockView(stream, 0, block), "mlp.experts"
    )
    first, last = (moments.of(0, matrix) for matrix in ("gate_up", "down"))
    unused = moments.of(3, "down")

    def mixed(own_SN, pool_TN, fraction):
        covs = (x.double().T @ x.double() / len(x) for x in (own_SN, pool_TN))
        return torch.lerp(*covs, fraction)

    tokens = len(x_SN)
    fraction = pool_fraction(32, tokens)
    assert 0.01 < fraction < 0.1
    torch.testing.assert_close(first.cov, mixed(x_SN, hidden_TH, fraction), rtol=1e-4, atol=1e-6)
    assert (first.own_tokens, first.pool_fraction) == (tokens, fraction)
    # the input follows a norm, but the output of the attention, added before it, is not scaled
    assert not torch.equal(first.cov, first.drifted_cov_NN)
    inner = functools.partial(block.mlp.experts.inner, 0)
    expected_NN = mixed(inner(x_SN), inner(hidden_TH), pool_fraction(48, tokens))
    torch.testing.assert_close(last.cov, expected_NN, rtol=1e-3, atol=1e-6)
    h_TN = block.mlp.experts.inner(3, hidden_TH)
    torch.testing.assert_close(unused.cov, mixed(h_TN, h_TN, 0.0), rtol=1e-3, atol=1e-6)
    assert (unused.own_tokens, unused.pool_fraction) == (0, 1)


def test_expert_sensitivity_predicts_divergence_of_noise(model, windows):
    model.requires_grad_(False)
    experts = model.model.layers[0].mlp.experts
    separate_dense(experts, fused_experts(experts))
    calls = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    reference = model(input_ids=windows).logits.log_softmax(-1)
    handle.remove()
    hidden_TH, index_TK, _ = calls[0]
    own, pool = (
        Moments(cov=h.T @ h / len(h), tokens=len(h))
        for h in (experts.inner(0, hidden_TH[t]).double() for t in ((index_TK == 0).any(1), ...))
    )
    moments = own.pooled(pool, pool_fraction(48, own.tokens))
    name = f"{EXPERTS}.packed.0.down"
    layer = experts.packed[0]["down"]

    found = layer_sensitivities(
        model,
        list(windows),
        [f"{EXPERTS}.packed.{e}.{m}" for e in range(4) for m in ("gate_up", "down")],
        tokens=8192,
        damping=1e-2,
        seed=0,
    )[name]

    size, trials, measured = 1e-3, 8, 0.0
    chol = Whitening.of(moments, 1e-2, name=name).chol
    weight_AN = layer.weight.clone()
    for _ in range(trials):
        noise_AN = size * torch.randn(weight_AN.shape, dtype=torch.float64)
        noise_AN = torch.linalg.solve_triangular(chol, noise_AN, upper=False, left=False)
        layer.weight.copy_(weight_AN + noise_AN)
        q = model(input_ids=windows).logits.log_softmax(-1)
        divergence = F.kl_div(q.double(), reference.double(), reduction="sum", log_target=True)
        measured += float(divergence) / windows.numel() / trials
    predicted = 0.5 * size**2 * 48 * float(found.row_power_A.sum())
    # the prediction would be a ninth lower if the noise were the same for all tokens
    assert measured == pytest.approx(predicted, rel=0.1)


def test_pooled_moments_have_effective_number_of_tokens():
    own, pool = (Moments(cov=torch.full((2, 2), v), tokens=t) for v, t in ((1.0, 10), (3.0, 1000)))

    mixed = own.pooled(pool, 0.5)

    assert torch.equal(mixed.cov, torch.full((2, 2), 2.0))
    assert mixed.tokens == 40
    assert mixed.own_tokens == 10
    assert pool_fraction(100, 0) == 1


def test_inspect_groups_experts_into_one_row(tmp_path, model, windows, capsys):
    model.save_pretrained(tmp_path / "dense")
    config = WaterSICConfig(5.0, dataset=windows)
    quantized = GptOssForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    quantized.save_pretrained(tmp_path / "packed")

    assert main(["inspect", str(tmp_path / "packed")]) == 0
    table = capsys.readouterr().out
    assert main(["inspect", "--json", str(tmp_path / "packed")]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert main(["verify", str(tmp_path / "packed")]) == 0

    assert f"{EXPERTS}.packed.*.down (4)" in table
    assert f"{EXPERTS}.packed.3.down" not in table
    (row,) = (row for row in rows if row["name"] == f"{EXPERTS}.packed.3.down")
    assert (row["tokens"], row["pooled"]) == (0, 1)
    # the biases of the experts and the router are dense, with a reason
    assert "biases of experts" in table
    together = experts_together(
        [row | {"error": None} for row in inspect_checkpoint(tmp_path / "packed")["layers"]]
    )
    assert len(together) == 4 + 2
