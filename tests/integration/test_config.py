import copy
import inspect
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from watersic_hf import WaterSICConfig, WaterSICRuntime
from watersic_hf.core import LayerSettings
from watersic_hf.integration.settings import settings_of
from watersic_hf.quantization import CalibrationSettings


def test_to_dict_and_from_dict_round_trip():
    config = WaterSICConfig(bits=2.5, dataset="c4", layer_bits={"down_proj": 3}, seed=4)

    again = WaterSICConfig.from_dict(config.to_dict())

    assert again == config
    assert again.to_dict() == json.loads(config.to_json_string())


def test_equality_and_hash_depend_on_the_settings():
    assert WaterSICConfig(bits=2) != WaterSICConfig(bits=4)
    assert len({WaterSICConfig(bits=2), WaterSICConfig(bits=2), WaterSICConfig(bits=4)}) == 2


def test_objects_are_described_and_not_saved(tokenizer):
    config = WaterSICConfig(dataset=["a", "b"], tokenizer=tokenizer)

    saved = config.to_dict()

    assert saved["dataset"] == "list of 2"
    assert {"tokenizer", "runtime", "batch_size"}.isdisjoint(saved)
    assert "list of 2" in repr(config)


def test_deepcopy_shares_only_dataset_and_tokenizer(tokenizer):
    config = WaterSICConfig(dataset=["a"], tokenizer=tokenizer, layer_bits={"q": 4})

    clone = copy.deepcopy(config)
    clone.layer_bits["q"] = 2

    assert clone.dataset is config.dataset
    assert clone.tokenizer is config.tokenizer
    assert config.layer_bits == {"q": 4}


def test_torch_compile_traces_copies_of_the_configuration():
    t5 = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(t5).eval()
    model.config.quantization_config = WaterSICConfig(dataset=["a"], layer_bits={"q": 4})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.ones(1, 2, dtype=torch.long)

    # encoder-decoders copy their configuration in every forward pass without a cache
    assert compiled(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 2, 8)


def test_from_dict_keeps_keys_of_newer_versions():
    saved = WaterSICConfig().to_dict() | {"novelty": [1, 2]}

    assert WaterSICConfig.from_dict(saved).to_dict()["novelty"] == [1, 2]


def test_from_dict_returns_unused_arguments():
    saved = WaterSICConfig().to_dict() | {"novelty": 1}

    config, unused = WaterSICConfig.from_dict(saved, return_unused_kwargs=True, seed=3, other=4)

    assert (config.seed, config.to_dict()["novelty"], unused) == (3, 1, {"other": 4})


def test_a_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="sampels"):
        WaterSICConfig(sampels=4)


def test_only_bits_can_be_given_by_position():
    parameters = list(inspect.signature(WaterSICConfig).parameters.values())

    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["bits"]
    assert {p.name for p in parameters} == settings_of(WaterSICConfig).keys()
    assert WaterSICConfig(2.5).bits == 2.5


def test_pickle_keeps_all_settings():
    config = WaterSICConfig(bits=2.5, layer_bits={"q": 4}, runtime={"residency": "dense"})

    again = pickle.loads(pickle.dumps(config))

    assert again == config
    assert again.runtime == config.runtime


def test_the_docstring_describes_every_setting():
    for name, setting in settings_of(WaterSICConfig).items():
        assert f"        {name}: {setting.summary.split()[0]}" in WaterSICConfig.__doc__
    assert "Default: 2048." in WaterSICConfig.__doc__


def test_method_settings_are_selected_by_name():
    config = WaterSICConfig(damping=0.01, rescale=False, drift=0.25, mixing=True)

    assert config.settings == LayerSettings(damping=0.01, rescale=False, lattice="trellis")
    assert config.calibration == CalibrationSettings(drift=0.25, mixing=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.5}, "bits is 0.5, but must be a number from 0.75 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": "3"}, "bits is '3'"),
        ({"layer_bits": {"q": 0}}, "q is 0"),
        ({"samples": 0}, "samples is 0, but must be a positive integer"),
        ({"sequence_length": 1.5}, "sequence_length is 1.5"),
        ({"damping": 0.0}, "damping"),
        ({"allocation": "random"}, "allocation is 'random', but must be one of"),
        ({"drift": 1.5}, "drift is 1.5, but must be a number from 0 to 1"),
        ({"attention": -1}, "attention is -1"),
        ({"zero_rows": "all"}, "zero_rows is 'all', but must be \"auto\" or a mapping"),
        ({"zero_rows": {"(": [1]}}, "is not a valid regular expression"),
        ({"modules_to_not_convert": ["("]}, "is not a valid regular expression"),
        ({"runtime": {"residency": "fast"}}, "residency is 'fast'"),
        ({"format_version": 99}, "format version 99; this version of watersic_hf reads up to 1"),
    ],
)
def test_a_bad_value_is_a_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        WaterSICConfig(**settings)


def test_the_environment_sets_the_default_residency(monkeypatch):
    monkeypatch.setenv("WATERSIC_RESIDENCY", "entropy")

    assert WaterSICConfig().runtime == WaterSICRuntime(residency="entropy")
    assert WaterSICConfig(runtime={"residency": "dense"}).runtime.residency == "dense"


def test_the_first_matching_pattern_sets_the_bits_of_a_layer():
    config = WaterSICConfig(bits=3, layer_bits={r"layers\.0": 5, "down_proj": 4})

    assert config.bits_of("model.layers.0.mlp.down_proj") == 5
    assert config.bits_of("model.layers.1.mlp.down_proj") == 4
    assert config.bits_of("model.layers.1.mlp.up_proj") == 3


def test_a_saved_model_contains_its_settings(quantized_folder):
    config = AutoConfig.from_pretrained(quantized_folder).quantization_config

    assert config["quant_method"] == "watersic"
    assert config["bits"] == 4.0
    assert config["dataset"] == "pydoc"
    assert config["format_version"] == 1
    assert config["modules_to_not_convert"] == ["lm_head"]
