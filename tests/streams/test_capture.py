import copy

import pytest
import torch
from torch import nn

from watersic_hf.calibration.moments import group_moments
from watersic_hf.streams.hooks import Side
from watersic_hf.streams.stream import BlockStream, block_stream
from watersic_hf.streams.topology import decoder_blocks, input_groups

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def windows(count=5, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


def run_of(stream, block):
    return lambda: stream.run(0, block, 0)


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

    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

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
    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

    moments, _ = group_moments(Side(stream, block), 0, groups[3], name="b")

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
        group = input_groups(
            block, PROJECTIONS, lambda s=stream: s.run(0, block, 0), stream.hidden[0]
        )[1]
        found.append(group_moments(Side(stream, block), 0, group, name="b")[0].cov)

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
        group = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])[0]

        with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.self_attn\.q_proj: "):
            group_moments(Side(stream, block), 0, group, name="model.layers.0")


@torch.no_grad()
def two_sides(make_llama, noise=0.1):
    """The second block of a model, and the same with other weights and hidden states."""
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[1]
    stream = block_stream(model, [model.model.layers[0], block], windows(), batch_size=2)
    stream.advance(0, model.model.layers[0])
    original = Side(stream, copy.deepcopy(block))
    working = Side(stream.copy(), block)
    g = torch.Generator().manual_seed(1)
    working.stream.hidden = [
        h + noise * torch.randn(h.shape, generator=g) for h in original.stream.hidden
    ]
    block.self_attn.o_proj.weight.mul_(1.1)
    groups = input_groups(block, PROJECTIONS, lambda: stream.run(1, block, 0), stream.hidden[0])
    return original, working, groups


def flat(tensors):
    return torch.cat([t.flatten(0, 1) for t in tensors]).double()


@torch.no_grad()
def test_the_residual_stream_is_found_where_a_layer_adds_to_it(make_llama):
    _, _, groups = two_sides(make_llama)

    assert [g.residual for g in groups] == [None, "", None, "post_attention_layernorm"]
    assert [g.feeds_attention for g in groups] == [True, False, False, False]


@torch.no_grad()
def test_a_layer_behind_whose_output_a_norm_stands_does_not_write_to_the_stream():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ((_, block),) = decoder_blocks(model, layers_of(model))
    stream = block_stream(model, [block], windows(), batch_size=2)

    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

    assert [g.residual for g in groups] == [None] * 4
    assert [g.feeds_attention for g in groups] == [True, False, False, False]


@torch.no_grad()
def test_moments_of_both_streams_taken_in_one_pass_are_those_taken_directly(make_llama):
    original, working, groups = two_sides(make_llama)
    g = torch.Generator().manual_seed(2)
    importance = [torch.rand(h.shape[:2], generator=g) for h in original.stream.hidden]

    plain, weighted = group_moments(
        working, 1, groups[3], name="b", original=original, residual=True, importance=importance
    )

    seen = {}
    for side, inputs, states in ((original, "x", "r"), (working, "xh", "rh")):
        for key, module in ((inputs, side.block.mlp.down_proj),
                            (states, side.block.post_attention_layernorm)):  # fmt: skip
            kept = seen[key] = []
            handle = module.register_forward_pre_hook(lambda m, a, kept=kept: kept.append(a[0]))
            for batch in range(len(side.stream.hidden)):
                side.stream.run(1, side.block, batch)
            handle.remove()
    x, xh, error = flat(seen["x"]), flat(seen["xh"]), flat(seen["r"]) - flat(seen["rh"])
    for moments, w_T1 in ((plain, 1.0), (weighted, torch.cat(importance).double().view(-1, 1))):
        expected = {
            "cov": x.T @ (w_T1 * x), "drifted_cov_NN": xh.T @ (w_T1 * xh),
            "cross_cov_NN": x.T @ (w_T1 * xh), "residual_AN": error.T @ (w_T1 * xh),
        }  # fmt: skip
        for field, value in expected.items():
            found = getattr(moments, field)
            torch.testing.assert_close(found, value / len(x), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 3])
def test_residual_compensation_lowers_the_error_of_the_residual_stream(make_llama, number):
    from watersic_hf.core import quantize_weight

    original, working, groups = two_sides(make_llama)
    group, layer = groups[number], groups[number].layers[0]
    dense_AN = original.block.get_submodule(layer).weight
    # the stream right after the layer: the next state, or the block's output
    after = "post_attention_layernorm" if group.residual == "" else None
    errors = {}
    for residual in (False, True):
        moments, _ = group_moments(
            working, 1, group, name="b", original=original, residual=residual
        )
        quantized = quantize_weight(dense_AN, moments, rate=6.0)
        working.block.get_submodule(layer).weight.copy_(quantized.dequantize())
        errors[residual] = sum(
            float((state(working, batch, after) - state(original, batch, after)).square().sum())
            for batch in range(len(working.stream.hidden))
        )

    assert errors[True] < 0.95 * errors[False]


@torch.no_grad()
def test_of_two_layers_side_by_side_the_later_one_makes_up_for_the_stream():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from watersic_hf.core import quantize_weight

    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.mul_(5) if parameter.ndim == 2 else None
    ((_, block),) = decoder_blocks(model, layers_of(model)[:-1])
    stream = block_stream(model, [block], windows(), batch_size=2)
    original = Side(stream, copy.deepcopy(block))
    working = Side(stream.copy(), block)
    g = torch.Generator().manual_seed(1)
    working.stream.hidden = [h + 0.01 * torch.randn(h.shape, generator=g) for h in stream.hidden]
    names = [n for n, m in block.named_modules() if type(m) is nn.Linear]

    groups = input_groups(block, names, run_of(stream, block), stream.hidden[0])
    block.attention.dense.weight.mul_(1.3)

    assert [(g.residual, g.beside) for g in groups] == [
        (None, None), (None, None), (None, None), ("", "attention.dense"),
    ]  # fmt: skip
    assert [g.feeds_attention for g in groups] == [True, False, False, False]
    errors = {}
    for residual in (False, True):
        moments, _ = group_moments(
            working, 0, groups[3], name="b", original=original, residual=residual
        )
        quantized = quantize_weight(original.block.mlp.dense_4h_to_h.weight, moments, rate=6.0)
        block.mlp.dense_4h_to_h.weight.copy_(quantized.dequantize())
        errors[residual] = sum(
            float((stream.run(0, original.block, b) - working.stream.run(0, block, b)).norm() ** 2)
            for b in range(len(stream.hidden))
        )
    # 80 tokens for 64 inputs; without what runs beside it, it makes up for next to nothing
    assert errors[True] < 0.8 * errors[False]


@torch.no_grad()
def test_layers_on_one_tensor_before_and_behind_the_attention_are_two_groups():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    ((_, block),) = decoder_blocks(model, layers_of(model))
    stream = block_stream(model, [block], windows(), batch_size=2)
    names = [n for n, m in block.named_modules() if type(m) is nn.Linear]

    groups = input_groups(block, names, run_of(stream, block), stream.hidden[0])

    assert [len(g.layers) for g in groups] == [3, 1, 1, 1]
    assert [g.feeds_attention for g in groups] == [True, False, False, False]


@torch.no_grad()
def test_the_residual_stream_may_be_the_input_of_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.mix = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.down(self.up(x).relu())
            return x + self.mix(x)

    block, x = Block(), torch.randn(2, 4, 8)
    groups = input_groups(block, ["up", "down", "mix"], lambda: block(x), x)
    side = Side(BlockStream([x], [[((), {})]]), block)

    assert [g.residual for g in groups] == [None, "", "mix"]
    moments, _ = group_moments(side, 0, groups[2], name="b", original=side, residual=True)
    assert moments.residual_AN.abs().max() == 0


def state(side, batch, module):
    """The input of a module of the block, or the block's output."""
    if module is None:
        return side.stream.run(1, side.block, batch)
    kept = []
    layer = side.block.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    side.stream.run(1, side.block, batch)
    handle.remove()
    return kept[0]
