import pytest
import torch
from torch import nn

from watersic_hf.calibration.capture import block_stream, group_moments
from watersic_hf.calibration.topology import decoder_blocks, input_groups

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def windows(count=5, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


@torch.no_grad()
def test_a_stream_pushed_through_all_blocks_ends_at_the_models_hidden_states(make_llama):
    model = make_llama()
    blocks = [b for _, b in decoder_blocks(model, layers_of(model))]
    tokens = [*windows(5, 16), *windows(2, 9)]

    stream = block_stream(model, blocks, tokens, batch_size=2)
    for index, block in enumerate(blocks):
        stream.advance(index, block)

    found = [row for batch in stream.hidden for row in model.model.norm(batch)]
    for window, hidden in zip(tokens, found, strict=True):
        expected = model.model(input_ids=window[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected)


@torch.no_grad()
def test_groups_are_the_layers_that_share_an_input_in_the_order_of_use(make_llama):
    model = make_llama()
    name, block = decoder_blocks(model, layers_of(model))[0]
    stream = block_stream(model, [block], windows(), batch_size=2)

    groups = input_groups(block, PROJECTIONS, lambda: stream.run(0, block, 0))

    assert name == "model.layers.0"
    assert [g.layers for g in groups] == [
        PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:],
    ]  # fmt: skip
    assert all(g.calls == 1 for g in groups)


@torch.no_grad()
def test_moments_are_those_of_the_layers_inputs(make_llama):
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[0]
    stream = block_stream(model, [block], windows(), batch_size=2)
    groups = input_groups(block, PROJECTIONS, lambda: stream.run(0, block, 0))

    moments = group_moments(stream, 0, block, groups[3], name="b")

    seen = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for batch in range(len(stream.hidden)):
        stream.run(0, block, batch)
    handle.remove()
    x_TN = torch.cat([x.flatten(0, 1) for x in seen]).double()
    assert moments.tokens == len(x_TN) == 80
    torch.testing.assert_close(moments.cov, x_TN.T @ x_TN / len(x_TN), rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_the_batch_size_changes_nothing_but_rounding(make_llama):
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[0]
    found = []
    for batch_size in (1, 5):
        stream = block_stream(model, [block], windows(), batch_size=batch_size)
        group = input_groups(block, PROJECTIONS, lambda s=stream: s.run(0, block, 0))[1]
        found.append(group_moments(stream, 0, block, group, name="b").cov)

    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_blocks_that_differ_get_their_own_arguments(tokens):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    blocks = [b for _, b in decoder_blocks(model, layers_of(model))]

    with torch.no_grad():
        stream = block_stream(model, blocks, list(tokens), batch_size=2)
        for index, block in enumerate(blocks):
            stream.advance(index, block)
        expected = model.model(input_ids=tokens).last_hidden_state

        torch.testing.assert_close(model.model.norm(stream.hidden[0]), expected)


def test_a_model_without_blocks_cannot_be_calibrated():
    model = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(ValueError, match="no list of blocks holds any of the 1 linear layers"):
        decoder_blocks(model, ["0"])


def test_inputs_that_are_not_finite_name_the_layer(make_llama):
    from watersic_hf import CalibrationError

    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
        _, block = decoder_blocks(model, layers_of(model))[0]
        stream = block_stream(model, [block], windows(), batch_size=2)
        group = input_groups(block, PROJECTIONS, lambda: stream.run(0, block, 0))[0]

        with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.self_attn\.q_proj: "):
            group_moments(stream, 0, block, group, name="model.layers.0")
