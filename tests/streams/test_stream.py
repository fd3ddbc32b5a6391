import torch
from torch import nn

from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import decoder_blocks


def windows(count=5, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


@torch.no_grad()
def test_stream_ends_at_the_hidden_states_of_the_model(make_llama):
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


def test_different_blocks_get_their_own_arguments(tokens):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    blocks = [b for _, b in decoder_blocks(model, layers_of(model))]

    with torch.no_grad():
        stream = block_stream(model, blocks, list(tokens), batch_size=2)
        for index, block in enumerate(blocks):
            stream.advance(index, block)
        expected = model.model(input_ids=tokens).last_hidden_state

        torch.testing.assert_close(model.model.norm(stream.hidden[0]), expected)


@torch.no_grad()
def test_equal_arguments_of_batches_are_stored_once(make_llama):
    model = make_llama()
    stream = block_stream(model, list(model.model.layers), windows(8), batch_size=2)

    assert all(arguments is stream.arguments[0] for arguments in stream.arguments)


@torch.no_grad()
def test_arguments_of_later_blocks_can_depend_on_tokens(make_llama):
    class Echo(nn.Module):
        """Passes the mean of the first block's output to the second block as an argument."""

        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(320, 8)
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids, use_cache):
            first = self.layers[0](self.embedding(input_ids), shift=None)
            return self.layers[1](first, shift=first.mean((1, 2), keepdim=True))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, hidden_states, shift):
            return self.proj(hidden_states if shift is None else hidden_states + shift)

    model = Echo()
    stream = block_stream(model, list(model.layers), windows(8), batch_size=2)
    for index, block in enumerate(model.layers):
        stream.advance(index, block)

    for batch, hidden in enumerate(stream.hidden):
        window = torch.stack(windows(8)[2 * batch : 2 * batch + 2])
        torch.testing.assert_close(hidden, model(window, use_cache=False))
