import copy

import pytest
import torch
from torch import nn

from watersic_hf.calibration.moments import group_moments
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.stream import BlockStream, block_stream
from watersic_hf.streams.topology import decoder_blocks, input_groups

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def windows(count=5, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


def run_of(stream, block):
    return lambda: stream.run(0, block, 0)


@torch.no_grad()
def views_of_second_block(make_llama, noise=0.1):
    """The second block of a model, and the same with different weights and hidden states."""
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[1]
    stream = block_stream(model, [model.model.layers[0], block], windows(), batch_size=2)
    stream.advance(0, model.model.layers[0])
    original = BlockView(stream, 1, copy.deepcopy(block))
    working = BlockView(stream.copy(), 1, block)
    g = torch.Generator().manual_seed(1)
    working.stream.hidden = [
        h + noise * torch.randn(h.shape, generator=g) for h in original.stream.hidden
    ]
    block.self_attn.o_proj.weight.mul_(1.1)
    groups = input_groups(block, PROJECTIONS, lambda: stream.run(1, block, 0), stream.hidden[0])
    return original, working, groups


def flat(tensors):
    return torch.cat([t.flatten(0, 1) for t in tensors]).double()


def state(view, batch, module):
    """The input of a module of the block, or the block's output."""
    if module is None:
        return view.run(batch)
    kept = []
    layer = view.block.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    view.run(batch)
    handle.remove()
    return kept[0]


@torch.no_grad()
def test_group_moments_match_layer_inputs(make_llama):
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[0]
    stream = block_stream(model, [block], windows(), batch_size=2)
    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

    moments, _ = group_moments(BlockView(stream, 0, block), groups[3], name="b")

    seen = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for batch in range(len(stream.hidden)):
        stream.run(0, block, batch)
    handle.remove()
    x_TN = torch.cat([x.flatten(0, 1) for x in seen]).double()
    assert moments.tokens == len(x_TN) == 80
    torch.testing.assert_close(moments.cov, x_TN.T @ x_TN / len(x_TN), rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_moments_do_not_depend_on_batch_size(make_llama):
    model = make_llama()
    _, block = decoder_blocks(model, layers_of(model))[0]
    found = []
    for batch_size in (1, 5):
        stream = block_stream(model, [block], windows(), batch_size=batch_size)
        group = input_groups(
            block, PROJECTIONS, lambda s=stream: s.run(0, block, 0), stream.hidden[0]
        )[1]
        found.append(group_moments(BlockView(stream, 0, block), group, name="b")[0].cov)

    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_nonfinite_inputs_raise_with_layer_name(make_llama):
    from watersic_hf import CalibrationError

    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
        _, block = decoder_blocks(model, layers_of(model))[0]
        stream = block_stream(model, [block], windows(), batch_size=2)
        group = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])[0]

        with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.self_attn\.q_proj: "):
            group_moments(BlockView(stream, 0, block), group, name="model.layers.0")


@torch.no_grad()
def test_moments_of_both_streams_match_direct_computation(make_llama):
    original, working, groups = views_of_second_block(make_llama)
    g = torch.Generator().manual_seed(2)
    importance = [torch.rand(h.shape[:2], generator=g) for h in original.stream.hidden]

    plain, weighted = group_moments(
        working, groups[3], name="b", original=original, residual=True, importance=importance
    )

    seen = {}
    for view, inputs, states in ((original, "x", "r"), (working, "xh", "rh")):
        for key, module in (
            (inputs, view.block.mlp.down_proj),
            (states, view.block.post_attention_layernorm),
        ):
            kept = seen[key] = []
            handle = module.register_forward_pre_hook(lambda m, a, kept=kept: kept.append(a[0]))
            for batch in range(len(view.stream.hidden)):
                view.run(batch)
            handle.remove()
    x, xh, error = flat(seen["x"]), flat(seen["xh"]), flat(seen["r"]) - flat(seen["rh"])
    for moments, w_T1 in ((plain, 1.0), (weighted, torch.cat(importance).double().view(-1, 1))):
        expected = {
            "cov": x.T @ (w_T1 * x),
            "drifted_cov_NN": xh.T @ (w_T1 * xh),
            "cross_cov_NN": x.T @ (w_T1 * xh),
            "residual_AN": error.T @ (w_T1 * xh),
        }
        for field, value in expected.items():
            found = getattr(moments, field)
            torch.testing.assert_close(found, value / len(x), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 3])
def test_residual_compensation_lowers_residual_stream_error(make_llama, number):
    from watersic_hf.core import quantize_weight

    original, working, groups = views_of_second_block(make_llama)
    group, layer = groups[number], groups[number].layers[0]
    dense_AN = original.block.get_submodule(layer).weight
    # the residual stream right after the layer: the next state, or the block's output
    after = "post_attention_layernorm" if group.residual == "" else None
    errors = {}
    for residual in (False, True):
        moments, _ = group_moments(working, group, name="b", original=original, residual=residual)
        quantized = quantize_weight(dense_AN, moments, rate=6.0)
        working.block.get_submodule(layer).weight.copy_(quantized.dequantize())
        errors[residual] = sum(
            float((state(working, batch, after) - state(original, batch, after)).square().sum())
            for batch in range(len(working.stream.hidden))
        )

    assert errors[True] < 0.95 * errors[False]


@torch.no_grad()
def test_later_of_two_parallel_layers_compensates_for_residual_error():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from watersic_hf.core import quantize_weight

    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = GPTNeoXForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.mul_(5) if parameter.ndim == 2 else None
    ((_, block),) = decoder_blocks(model, layers_of(model)[:-1])
    stream = block_stream(model, [block], windows(), batch_size=2)
    original = BlockView(stream, 0, copy.deepcopy(block))
    working = BlockView(stream.copy(), 0, block)
    g = torch.Generator().manual_seed(1)
    working.stream.hidden = [h + 0.01 * torch.randn(h.shape, generator=g) for h in stream.hidden]
    names = [n for n, m in block.named_modules() if type(m) is nn.Linear]

    groups = input_groups(block, names, run_of(stream, block), stream.hidden[0])
    block.attention.dense.weight.mul_(1.3)

    assert [(g.residual, g.parallel_layer) for g in groups] == [
        (None, None),
        (None, None),
        (None, None),
        ("", "attention.dense"),
    ]
    assert [g.feeds_attention for g in groups] == [True, False, False, False]
    errors = {}
    for residual in (False, True):
        moments, _ = group_moments(
            working, groups[3], name="b", original=original, residual=residual
        )
        quantized = quantize_weight(original.block.mlp.dense_4h_to_h.weight, moments, rate=6.0)
        block.mlp.dense_4h_to_h.weight.copy_(quantized.dequantize())
        errors[residual] = sum(
            float((stream.run(0, original.block, b) - working.stream.run(0, block, b)).norm() ** 2)
            for b in range(len(stream.hidden))
        )
    # 80 tokens for 64 inputs; without the parallel layer, next to nothing is compensated for
    assert errors[True] < 0.8 * errors[False]


@torch.no_grad()
def test_residual_stream_can_be_the_input_of_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.mix = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.down(self.up(x).relu())
            return x + self.mix(x)

    block, x = Block(), torch.randn(2, 4, 8)
    groups = input_groups(block, ["up", "down", "mix"], lambda: block(x), x)
    view = BlockView(BlockStream([x], [[((), {})]]), 0, block)

    assert [g.residual for g in groups] == [None, "", "mix"]
    moments, _ = group_moments(view, groups[2], name="b", original=view, residual=True)
    assert moments.residual_AN.abs().max() == 0
