"""Where the bytes of a model are, in our format and in others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from watersic_hf.cli import main
from watersic_hf.integration.audit import audit


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_bytes_of_a_quantized_model_add_up_to_its_file(quantized_folder, make_llama):
    folder = quantized_folder
    found = audit(str(folder))
    rows = {row.name: row for row in found.rows}

    assert found.nbytes == size_of(folder)
    assert found.parameters == sum(p.numel() for p in make_llama().parameters())
    assert rows["model.layers.*.mlp.down_proj"].parameters == 2 * 64 * 160
    assert 3 < rows["model.layers.*.mlp.down_proj"].bits < 6
    assert rows["model.embed_tokens"].group == "embeddings"
    assert rows["model.norm"].group == "norms"


def test_a_model_that_is_not_quantized_has_the_bits_of_its_dtype(llama_folder):
    found = audit(str(llama_folder))

    assert found.nbytes == size_of(llama_folder)
    assert all(row.bits == 32 for row in found.rows)


def test_integers_that_others_pack_count_as_the_weights_of_the_architecture(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    # GPTQ's names: 8 weights of 4 bits in an integer
    layer = "model.layers.0.mlp.down_proj"
    tensors = {
        f"{layer}.qweight": torch.zeros(20, 64, dtype=torch.int32),
        f"{layer}.scales": torch.zeros(2, 64, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")

    (row,) = audit(str(tmp_path)).rows

    assert row.parameters == 64 * 160
    assert row.bits == pytest.approx(4 + 16 * 2 / 160)


def test_without_a_configuration_our_layers_are_counted_whole(quantized_folder, make_llama):
    (file,) = quantized_folder.glob("*.safetensors")
    found = audit(str(file))

    assert found.parameters == sum(p.numel() for p in make_llama().parameters())
    assert not found.exact


def test_a_gguf_file(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    blocks = torch.zeros(32, 2 * 34, dtype=torch.uint8).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.add_tensor("token_embd.weight", torch.zeros(40, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "model.gguf"

    assert main(["audit", str(file), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == file.stat().st_size
    assert found["groups"] == {"embeddings": [1280, 5120], "layers": [2048, 2176]}


def test_the_table(llama_folder, capsys):
    assert main(["audit", str(llama_folder)]) == 0

    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in out
    assert "whole model" in out
    assert "headers, metadata" in out
