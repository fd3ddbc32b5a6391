"""Folders that lack tensors of their model."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from watersic_hf.checkpoint import CheckpointError
from watersic_hf.cli import main
from watersic_hf.integration.completeness import require_tensors


@pytest.fixture
def folder(quantized_folder, tmp_path):
    return shutil.copytree(quantized_folder, tmp_path / "copy")


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_complete_model_passes(folder):
    require_tensors(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.row_scale"])
def test_a_missing_tensor_is_named(folder, name, capsys):
    drop(folder, name)

    with pytest.raises(CheckpointError, match=name):
        require_tensors(folder)
    assert main(["verify", str(folder)]) == 1
    assert name in capsys.readouterr().err


def test_an_unknown_architecture_is_not_checked(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))

    require_tensors(folder)
