import pytest
import torch
from torch import nn

from watersic_hf.streams.stream import block_stream
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


def test_model_without_blocks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))

    with pytest.raises(ValueError, match="no list of blocks holds any of the 1 linear layers"):
        decoder_blocks(model, ["0"])


@torch.no_grad()
def test_input_groups_in_order_of_use(make_llama):
    model = make_llama()
    name, block = decoder_blocks(model, layers_of(model))[0]
    stream = block_stream(model, [block], windows(), batch_size=2)

    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

    assert name == "model.layers.0"
    assert [g.layers for g in groups] == [
        PROJECTIONS[:3],
        PROJECTIONS[3:4],
        PROJECTIONS[4:6],
        PROJECTIONS[6:],
    ]
    assert all(g.calls == 1 for g in groups)


@torch.no_grad()
def test_residual_stream_found_where_a_layer_adds_to_it(make_llama):
    model = make_llama()
    first, block = model.model.layers
    stream = block_stream(model, [first, block], windows(), batch_size=2)
    stream.advance(0, first)

    groups = input_groups(block, PROJECTIONS, lambda: stream.run(1, block, 0), stream.hidden[0])

    assert [g.residual for g in groups] == [None, "", None, "post_attention_layernorm"]
    assert [g.feeds_attention for g in groups] == [True, False, False, False]


@torch.no_grad()
def test_layer_followed_by_a_norm_does_not_write_to_residual_stream():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config).eval()
    ((_, block),) = decoder_blocks(model, layers_of(model))
    stream = block_stream(model, [block], windows(), batch_size=2)

    groups = input_groups(block, PROJECTIONS, run_of(stream, block), stream.hidden[0])

    assert [g.residual for g in groups] == [None] * 4
    assert [g.feeds_attention for g in groups] == [True, False, False, False]


@torch.no_grad()
def test_layers_before_and_after_attention_are_separate_groups():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = PhiForCausalLM(config).eval()
    ((_, block),) = decoder_blocks(model, layers_of(model))
    stream = block_stream(model, [block], windows(), batch_size=2)
    names = [n for n, m in block.named_modules() if type(m) is nn.Linear]

    groups = input_groups(block, names, run_of(stream, block), stream.hidden[0])

    assert [len(g.layers) for g in groups] == [3, 1, 1, 1]
    assert [g.feeds_attention for g in groups] == [True, False, False, False]
