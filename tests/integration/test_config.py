import copy
import json

import pytest
from transformers import AutoConfig

from watersic_hf import WaterSICConfig, WaterSICRuntime


def test_the_dictionary_and_back_is_the_same_configuration():
    config = WaterSICConfig(bits=2.5, dataset="c4", layer_bits={"down_proj": 3}, seed=4)

    again = WaterSICConfig.from_dict(config.to_dict())

    assert again == config
    assert again.to_dict() == json.loads(config.to_json_string())


def test_configurations_of_other_settings_differ():
    assert WaterSICConfig(bits=2) != WaterSICConfig(bits=4)
    assert len({WaterSICConfig(bits=2), WaterSICConfig(bits=2), WaterSICConfig(bits=4)}) == 2


def test_live_objects_are_described_and_not_saved(tokenizer):
    config = WaterSICConfig(dataset=["a", "b"], tokenizer=tokenizer)

    saved = config.to_dict()

    assert saved["dataset"] == "list of 2"
    assert {"tokenizer", "runtime", "batch_size"}.isdisjoint(saved)
    assert "list of 2" in repr(config)


def test_a_copy_shares_the_data_and_nothing_else(tokenizer):
    config = WaterSICConfig(dataset=["a"], tokenizer=tokenizer, layer_bits={"q": 4})

    clone = copy.deepcopy(config)
    clone.layer_bits["q"] = 2

    assert clone.dataset is config.dataset
    assert clone.tokenizer is config.tokenizer
    assert config.layer_bits == {"q": 4}


def test_keys_of_a_newer_writer_are_kept():
    saved = WaterSICConfig().to_dict() | {"novelty": [1, 2]}

    assert WaterSICConfig.from_dict(saved).to_dict()["novelty"] == [1, 2]


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
        ({"zero_rows": {"(": [1]}}, "is no regular expression"),
        ({"modules_to_not_convert": ["("]}, "is no regular expression"),
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


def test_bits_of_a_layer_are_those_of_the_first_pattern_that_matches():
    config = WaterSICConfig(bits=3, layer_bits={r"layers\.0": 5, "down_proj": 4})

    assert config.bits_of("model.layers.0.mlp.down_proj") == 5
    assert config.bits_of("model.layers.1.mlp.down_proj") == 4
    assert config.bits_of("model.layers.1.mlp.up_proj") == 3


def test_a_saved_model_tells_its_settings(quantized_folder):
    config = AutoConfig.from_pretrained(quantized_folder).quantization_config

    assert config["quant_method"] == "watersic"
    assert config["bits"] == 4.0
    assert config["dataset"] == "pydoc"
    assert config["format_version"] == 1
    assert config["modules_to_not_convert"] == ["lm_head"]
