"""Damaged checkpoints: a clear error that names the layer, never wrong weights."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from watersic_hf import CheckpointError
from watersic_hf.checkpoint import inspect_checkpoint, read_headers, verify_checkpoint

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(quantized_folder, tmp_path):
    return shutil.copytree(quantized_folder, tmp_path / "damaged")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def edit(folder, change):
    """Rewrite the file with changed tensors."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def position(folder, tensor):
    """Where a tensor's bytes begin in the file, and how many they are."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    return 8 + length + start, end - start


def flip(folder, at, mask=0x10):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


@pytest.mark.parametrize("field", ["weight", "row_scale", "col_scale"])
def test_a_flipped_byte_names_the_layer(folder, field):
    start, size = position(folder, f"{LAYER}.{field}")
    draw = random.Random(0)

    for _ in range(12):
        at, mask = start + draw.randrange(size), 1 << draw.randrange(8)
        flip(folder, at, mask)
        with pytest.raises(CheckpointError, match=f"^{LAYER}: "):
            load(folder)
        with pytest.raises(CheckpointError, match=f"^{LAYER}: "):
            verify_checkpoint(folder)
        flip(folder, at, mask)
    load(folder)


def test_a_file_cut_short_names_the_tensor(folder):
    file = folder / "model.safetensors"
    start, size = position(folder, f"{LAYER}.weight")
    file.write_bytes(file.read_bytes()[: start + size // 2])

    with pytest.raises(CheckpointError, match=r"\.weight: .* cut short"):
        load(folder)
    with pytest.raises(CheckpointError, match="cut short"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("field", ["weight", "row_scale", "col_scale"])
def test_a_missing_tensor_names_the_layer_and_the_field(folder, field):
    edit(folder, lambda tensors: tensors.pop(f"{LAYER}.{field}"))

    with pytest.raises(CheckpointError, match=f"{LAYER}: .* no tensor {LAYER}.{field}"):
        load(folder)


def test_missing_layer_is_an_error_and_not_random_weights(folder):
    def drop(tensors):
        for field in ("weight", "row_scale", "col_scale"):
            del tensors[f"{LAYER}.{field}"]

    edit(folder, drop)

    with pytest.raises(CheckpointError, match=f"{LAYER}: the checkpoint has no tensor"):
        load(folder)


@pytest.mark.parametrize("field", ["row_scale", "col_scale"])
def test_a_changed_shape_names_the_layer_and_the_field(folder, field):
    name = f"{LAYER}.{field}"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))

    with pytest.raises(CheckpointError, match=f"{name}: the checkpoint has shape"):
        load(folder)


def test_a_payload_cut_short_names_the_layer(folder):
    name = f"{LAYER}.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name][:-7].clone()}))

    with pytest.raises(CheckpointError, match=f"^{LAYER}: "):
        load(folder)


def test_swapped_layers_are_detected(folder):
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]

    def swap(tensors):
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    edit(folder, swap)

    with pytest.raises(CheckpointError, match=r"q_proj: "):
        load(folder)


def test_a_newer_format_says_what_to_install(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"format version 2.*pip install -U watersic-hf"):
        load(folder)


def test_a_payload_of_a_newer_version_names_the_layer(folder):
    start, _ = position(folder, f"{LAYER}.weight")
    flip(folder, start + 4, 0x02)

    with pytest.raises(CheckpointError, match=f"^{LAYER}: "):
        load(folder)


def test_a_dense_model_that_claims_to_be_quantized_is_refused(folder, llama_folder):
    shutil.copy(llama_folder / "model.safetensors", folder / "model.safetensors")

    with pytest.raises(CheckpointError, match="no tensor"):
        load(folder)
    with pytest.raises(CheckpointError, match="holds no layer that watersic_hf quantized"):
        verify_checkpoint(folder)


def test_inspection_and_verification_read_everything(folder):
    found, checked = inspect_checkpoint(folder), verify_checkpoint(folder)

    headers = read_headers([folder / "model.safetensors"])
    quantized = [n for n in headers if "_proj." in n]
    assert len(found["layers"]) == checked["layers"] == 14
    assert checked["bytes"] == sum(headers[n].nbytes for n in quantized)
    assert found["totals"]["quantized_bytes"] == checked["bytes"]
    assert found["totals"]["dense_bytes"] == sum(
        h.nbytes for n, h in headers.items() if n not in quantized
    )
    assert all(torch.tensor(row["bits"]).isfinite() for row in found["layers"])
