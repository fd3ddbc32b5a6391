import pytest
import torch
from torch.nn import functional as F

from watersic_hf.streams.attention import attention_importance


def received(model, tokens, layer):
    """Importance by its definition, from the probabilities that transformers returns."""
    with torch.no_grad():
        P = model(tokens, output_attentions=True).attentions[layer].double()
    queries_T = (P[0, 0] > 0).sum(0)
    p = P.mean(1).sum(1) / queries_T
    return (p / p.mean()).float()


def importance(model, tokens, layer):
    block = model.model.layers[layer]
    seen = []
    handle = block.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
        handle.remove()
        ((args, kwargs),) = seen
        return attention_importance(lambda batch: block(*args, **kwargs), 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_importance_is_mean_attention_of_visible_queries(make_llama, tokens, attention):
    expected = received(make_llama(attn_implementation="eager"), tokens, 1)

    (found,) = importance(make_llama(attn_implementation=attention), tokens, 1)

    assert found.shape == tokens.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(found.mean()) == pytest.approx(1)


@pytest.mark.parametrize("layer", [0, 1])
def test_importance_with_sliding_window_and_qk_norm(tokens, layer):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def model(attention):
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=24,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            attn_implementation=attention,
        )
        return Gemma3ForCausalLM(config).eval()

    expected = received(model("eager"), tokens, layer)

    (found,) = importance(model("sdpa"), tokens, layer)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_importance_of_uniform_causal_attention():
    T = 6
    zeros = torch.zeros(1, 2, T, 4)

    (found,) = attention_importance(
        lambda batch: F.scaled_dot_product_attention(zeros, zeros, zeros, is_causal=True), 1
    )

    # query i gives a probability of 1 / (i + 1) to every token that it sees
    p = torch.tensor([sum(1 / (i + 1) for i in range(j, T)) / (T - j) for j in range(T)])
    torch.testing.assert_close(found[0], p / p.mean())


def test_no_importance_without_attention():
    assert attention_importance(lambda batch: torch.zeros(2).sum(), 3) is None
