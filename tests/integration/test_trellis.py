import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from watersic_hf import WaterSICConfig, WaterSICRuntime
from watersic_hf.checkpoint import inspect_checkpoint, verify_checkpoint
from watersic_hf.codec import read_header
from watersic_hf.integration.folder import quantize_to_folder
from watersic_hf.nn import packed_layers
from watersic_hf.testing import assert_close

pytest.importorskip("numba")


def rules(model):
    return {read_header(layer.weight.data).rule for _, layer in packed_layers(model)}


@pytest.fixture(scope="module")
def trellis_folder(quantize, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trellis")
    quantize(lattice="trellis", bits=3.0, quantize_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_reloaded_model_gives_the_same_logits_in_every_residency(trellis_folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(
        trellis_folder,
        quantization_config=WaterSICConfig(runtime=WaterSICRuntime(residency="dense")),
    )
    assert rules(model) == {2}
    assert model.config.quantization_config.lattice == "trellis"
    with torch.no_grad():
        expected = model(tokens).logits

        for residency in ("packed", "entropy", "stored"):
            model.set_residency(residency)
            assert_close(model(tokens).logits, expected, tolerance=1e-5)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 27)


def test_trellis_is_closer_to_the_original_at_equal_bits(make_llama, tmp_path, tokens):
    make_llama(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits

        def distance(lattice):
            config = WaterSICConfig(bits=3.0, lattice=lattice)
            model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
            return float((model(tokens).logits - original).square().mean())

        assert distance("trellis") < 0.9 * distance("scalar")


def test_folder_equals_the_model_in_memory_and_itself(llama_folder, tokenizer, tmp_path):
    config = {"bits": 3.0, "lattice": "trellis", "dataset": "pydoc", "samples": 4}
    config |= {"sequence_length": 64, "tokenizer": tokenizer}
    for out in ("a", "b"):
        quantize_to_folder(llama_folder, tmp_path / out, WaterSICConfig(**config))
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=WaterSICConfig(**config)
    )
    model.save_pretrained(tmp_path / "c")

    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_inspection_and_verification_know_the_trellis(trellis_folder):
    verify_checkpoint(trellis_folder)
    for row in inspect_checkpoint(trellis_folder)["layers"]:
        assert row["class_entropy"] < row["pooled_entropy"]
        assert row["payload_bits"] < row["bits"]


def test_old_model_says_that_it_is_scalar():
    saved = WaterSICConfig(bits=3.0, lattice="trellis").to_dict()
    assert WaterSICConfig.from_dict(saved).lattice == "trellis"
    del saved["lattice"]

    assert WaterSICConfig.from_dict(saved).lattice == "scalar"


def test_unknown_lattice_is_an_error():
    with pytest.raises(ValueError, match="lattice is 'cubic'; use one of"):
        WaterSICConfig(lattice="cubic")


def test_without_numba_the_error_says_what_to_do(llama_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "watersic_kernels.cpu.trellis", raising=False)

    with pytest.raises(ImportError, match=r"needs numba.*`pip install numba`, or use .* `scalar`"):
        AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=WaterSICConfig(lattice="trellis")
        )
