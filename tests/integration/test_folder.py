"""From folder to folder: where a model is read from, and what the output folder may be."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from watersic_hf import WaterSICConfig
from watersic_hf.checkpoint import verify_checkpoint
from watersic_hf.integration import quantize_to_folder
from watersic_hf.integration.folder import UNFINISHED
from watersic_hf.integration.plan import plan

CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class CustomConfig(LlamaConfig):
    model_type = "custom"


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture(scope="module")
def original(make_llama, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "original"
    make_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize(model, out, **options):
    return quantize_to_folder(str(model), out, WaterSICConfig(6.0), **options)


@pytest.mark.parametrize("out", [".", "run.json", "converted-0", "nested/twice", "a [b] c"])
def test_any_folder_name_is_an_output(original, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)

    quantize(original, out)

    assert verify_checkpoint(out)["layers"] == 7
    assert not (tmp_path / out / UNFINISHED).exists()
    card = (tmp_path / out / "README.md").read_text(encoding="utf-8")
    assert f"# {(tmp_path / out).resolve().name}\n" in card


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "m.gguf", "README.md"])
def test_output_folder_with_files_at_risk_is_refused(original, tmp_path, name):
    (tmp_path / name).write_text("precious")

    with pytest.raises(FileExistsError, match=f"that would be overwritten: {name}"):
        quantize(original, tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_input_folder_and_file_are_refused_as_output(original, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(FileExistsError, match="holds a model already"):
        quantize(original, original)
    with pytest.raises(FileExistsError, match="is a file"):
        quantize(original, tmp_path / "file")


def test_second_run_in_one_folder_is_refused(original, tmp_path):
    work = tmp_path / UNFINISHED
    work.mkdir()

    with (
        FileLock(work / "lock"),
        pytest.raises(FileExistsError, match="another run is active in this folder"),
    ):
        quantize(original, tmp_path)
    quantize(original, tmp_path)

    assert not work.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "5 gigabytes"}, "maximum size of a weight file is '5 gigabytes'"),
        ({"max_shard_size": "10"}, "maximum size of a weight file is '10'"),
        ({"device_map": "gpu"}, "gpu"),
    ],
)
def test_arguments_are_checked_before_the_model_is_read(tmp_path, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        quantize(tmp_path / "nowhere", tmp_path / "out", **options)

    assert not (tmp_path / "out").exists()


def test_adapter_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")

    for call in (
        lambda: quantize(tmp_path / "adapter", tmp_path / "out"),
        lambda: plan(str(tmp_path / "adapter"), WaterSICConfig()),
    ):
        with pytest.raises(ValueError, match=r"is an adapter.*merge_and_unload"):
            call()


def test_custom_code_reaches_every_part(original, tmp_path, monkeypatch):
    home, out = tmp_path / "repository", tmp_path / "out"
    shutil.copytree(original, home)
    (home / "custom_llama.py").write_text(CUSTOM_CODE)
    config = json.loads((home / "config.json").read_text()) | {
        "model_type": "custom",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {
            "AutoConfig": "custom_llama.CustomConfig",
            "AutoModelForCausalLM": "custom_llama.CustomForCausalLM",
        },
    }
    (home / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "n")

    with pytest.raises(ValueError, match="trust_remote_code"):
        quantize(home, out)
    quantize(home, out, trust_remote_code=True)

    assert verify_checkpoint(out)["layers"] == 7
    assert (out / "custom_llama.py").is_file()
    assert (out / "tokenizer.json").is_file()


def test_model_in_a_subfolder(original, tmp_path):
    quantize(original.parent, tmp_path, subfolder=original.name)

    assert verify_checkpoint(tmp_path)["layers"] == 7
    assert (tmp_path / "tokenizer.json").is_file()


def test_no_file_names_a_path_of_this_machine(original, tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("some words about nothing at all. " * 40)
    config = WaterSICConfig(6.0, dataset=str(text), samples=2, sequence_length=32)

    quantize_to_folder(str(original), tmp_path / "out", config)

    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content, file.name
        assert str(Path(original).parent).encode() not in content, file.name


def test_offloading_while_quantizing_is_not_warned_of(original, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        quantize(original, tmp_path)

    assert "on the meta device" not in caplog.text
