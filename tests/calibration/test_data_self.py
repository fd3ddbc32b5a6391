"""The set "self": the model's own distribution, whatever its generation_config.json sets."""

import pytest
import torch

from watersic_hf.calibration import calibration_windows


def sample(model, length=10):
    options = {"samples": 3, "sequence_length": length, "seed": 0}
    return torch.stack(calibration_windows("self", tokenizer=None, model=model, **options))


@pytest.fixture
def model(make_llama):
    return make_llama(num_hidden_layers=1)


def test_default_configuration_samples_as_generate_does(model):
    prompt = torch.full((3, 1), model.generation_config.bos_token_id)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            min_new_tokens=9,
            max_new_tokens=9,
            pad_token_id=0,
        )

    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2},
        {"epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "top_h": 0.3},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[5]]},
        {"num_beams": 3, "num_beam_groups": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_return_sequences": 2},
        {"max_length": 5, "min_length": 100, "max_time": 1e-9, "stop_strings": ["x"]},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"suppress_tokens": list(range(3, 60)), "begin_suppress_tokens": [7]},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 9, "sequence_bias": [[[5], 9.0]]},
        {"guidance_scale": 3.0, "renormalize_logits": True, "remove_invalid_values": True},
        {"use_cache": False, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "dola_layers": "low", "exponential_decay_length_penalty": (2, 9.0)},
        {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0}, "token_healing": True},
        {"pad_token_id": 5, "an_entry_of_ours": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_have_no_effect(model, settings):
    expected = sample(model)
    own = model.generation_config
    for name, value in settings.items():
        setattr(own, name, value)

    assert torch.equal(sample(model), expected)
    assert model.generation_config is own
    assert all(getattr(own, name) == value for name, value in settings.items())


def test_generation_settings_in_the_model_configuration_have_no_effect(model):
    expected = sample(model)
    model.config.repetition_penalty = 5.0

    assert torch.equal(sample(model), expected)


def test_dropout_has_no_effect(make_llama):
    model = make_llama(num_hidden_layers=1, attention_dropout=0.5)
    expected = sample(model.eval())

    assert torch.equal(sample(model.train()), expected)
    assert model.training
