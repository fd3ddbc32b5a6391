import math
from dataclasses import asdict

import pytest
import torch

from watersic_hf.evaluation import evaluate, evaluation_windows, generation_speed, perplexity


def windows():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (20,), generator=g) for _ in range(3)]


def test_perplexity_is_the_exponential_of_the_mean_loss(make_llama):
    model = make_llama()

    found = evaluate(model, windows())

    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows()]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert found.tokens == 3 * 19
    assert found.kl_bits is None


def test_divergence_of_a_model_from_itself_is_zero(make_llama):
    model = make_llama()

    found = evaluate(model, windows(), model)

    assert found.kl_bits == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.original_perplexity == found.perplexity


def test_kl_is_that_of_the_original_from_the_model_in_bits(make_llama):
    model, original = make_llama(), make_llama(num_hidden_layers=1)

    found = evaluate(model, windows()[:1], original)

    with torch.no_grad():
        p = original(windows()[0][None]).logits[0, :-1].double().softmax(-1)
        q = model(windows()[0][None]).logits[0, :-1].double().softmax(-1)
    assert found.kl_bits == pytest.approx(float((p * (p / q).log2()).sum(-1).mean()), rel=1e-3)


def test_evaluation_does_not_depend_on_the_chunk_size(make_llama, monkeypatch):
    model, original = make_llama(), make_llama(num_hidden_layers=1)
    whole = evaluate(model, windows(), original)

    monkeypatch.setattr(perplexity, "SCRATCH_BYTES", 4 * 320 * 5)

    found = evaluate(model, windows(), original)
    assert asdict(found) == pytest.approx(asdict(whole), rel=1e-5)


def test_evaluation_needs_a_window(make_llama, tokenizer):
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        evaluate(make_llama(), [torch.tensor([3])])
    with pytest.raises(ValueError, match="one window needs 512"):
        evaluation_windows("short", tokenizer, sequence_length=512)


def test_generation_speed_is_positive(make_llama):
    model = make_llama()

    speed = generation_speed(model, torch.tensor([1, 2, 3]), new_tokens=4)

    assert speed.first_token_seconds > 0
    assert speed.tokens_per_second > 0
    assert speed.memory_bytes >= 4 * sum(parameter.numel() for parameter in model.parameters())
