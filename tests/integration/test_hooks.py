"""What transformers asks the quantizer, apart from loading and saving as a whole."""

import pytest
import torch
from accelerate.utils import compute_module_sizes
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from watersic_hf import WaterSICConfig, WaterSICHfQuantizer
from watersic_hf.integration import save_quantized
from watersic_hf.report import write_folder_page


def quantizer(*, pre_quantized, dataset=None):
    return AutoHfQuantizer.from_config(WaterSICConfig(dataset=dataset), pre_quantized=pre_quantized)


def prepared(make_llama, **way):
    found = quantizer(**way)
    found.update_dtype(torch.float32)
    with torch.device("meta"):
        model = make_llama()
    found.preprocess_model(model, dtype=torch.float32, device_map=None, checkpoint_files=None)
    return found, model


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ({"pre_quantized": False}, True),
        ({"pre_quantized": False, "dataset": "pydoc"}, False),
        ({"pre_quantized": True}, True),
    ],
    ids=["data-free", "calibrated", "pre-quantized"],
)
def test_param_needs_quantization_by_way_of_loading(make_llama, way, expected):
    found, model = prepared(make_llama, **way)

    needs = {
        name: found.param_needs_quantization(model, name)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    }

    assert isinstance(found, WaterSICHfQuantizer)
    assert needs == {
        "model.layers.0.mlp.up_proj.weight": expected,
        "model.norm.weight": False,
        "lm_head.weight": False,
    }


def test_param_element_size_is_that_of_quantized_weights(make_llama):
    found, model = prepared(make_llama, pre_quantized=False)
    weight = model.model.layers[0].mlp.up_proj.weight

    assert found.param_element_size(model, "model.layers.0.mlp.up_proj.weight", weight) == 3 / 8
    assert found.param_element_size(model, "model.norm.weight", model.model.norm.weight) == 4


def test_module_sizes_add_up_to_the_footprint(quantized_folder):
    model = AutoModelForCausalLM.from_pretrained(
        quantized_folder, quantization_config=WaterSICConfig(runtime={"residency": "stored"})
    )

    assert compute_module_sizes(model)[""] == model.get_memory_footprint()


def test_the_footprint_of_a_packed_model_is_a_fraction_of_the_dense_ones(
    llama_folder, quantized_folder
):
    dense = AutoModelForCausalLM.from_pretrained(llama_folder)
    packed = AutoModelForCausalLM.from_pretrained(
        quantized_folder, quantization_config=WaterSICConfig(runtime={"residency": "stored"})
    )

    def layers(model):
        return model.model.layers.parameters()

    sizes = [sum(p.numel() * p.element_size() for p in layers(m)) for m in (dense, packed)]
    # 4 of 32 bits, and the norms
    assert sizes[1] < 0.14 * sizes[0]


def test_max_memory_splits_a_quantized_model_over_devices(quantized_folder, tmp_path, tokens):
    reference = AutoModelForCausalLM.from_pretrained(quantized_folder)

    model = AutoModelForCausalLM.from_pretrained(
        quantized_folder,
        device_map="auto",
        max_memory={"cpu": 110_000},
        offload_folder=tmp_path / "offload",
    )

    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("form", ["strings", "tokenized", "ids", "tensor"])
def test_calibration_data_in_every_form(quantize, tokenizer, tokens, form):
    text = "a sentence about nothing. " * 40
    forms = {
        "strings": [text],
        "tokenized": [dict(tokenizer(text[:200])) for _ in range(3)],
        "ids": [tokenizer(text)["input_ids"]],
        "tensor": tokens,
    }

    model = quantize(dataset=forms[form], samples=2)

    assert len(model.hf_quantizer.reports) == 14
    assert model.config.quantization_config.to_dict()["dataset"].split(" of ")[0] in (
        "list",
        "Tensor",
    )


@pytest.mark.parametrize("by", ["name", "object", "beside the model"])
def test_the_tokenizer_is_found(quantize, llama_folder, make_llama, tmp_path, by):
    make_llama().save_pretrained(tmp_path)
    source = llama_folder if by == "beside the model" else tmp_path
    chosen = {
        "name": str(llama_folder),
        "object": AutoTokenizer.from_pretrained(llama_folder),
        "beside the model": None,
    }[by]

    model = quantize(source, tokenizer=chosen)

    assert len(model.hf_quantizer.reports) == 14


def test_without_a_tokenizer_text_cannot_calibrate(quantize, make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="no tokenizer was given or found beside the model"):
        quantize(tmp_path, tokenizer=None)


def test_saved_model_does_not_show_the_folder_of_its_calibration_text(quantized_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    model.config.quantization_config.dataset = "/home/folder of ours/t.txt"

    name = str(quantized_folder)
    save_quantized(model, tmp_path / "out", tokenizer=name, base=name)
    write_folder_page(tmp_path / "out")

    files = list((tmp_path / "out").iterdir())
    assert {"config.json", "README.md", "report.html"} <= {file.name for file in files}
    assert not any(b"folder of ours" in file.read_bytes() for file in files)
    assert "| t.txt, " in (tmp_path / "out" / "README.md").read_text()


def test_windows_are_cut_to_max_position_embeddings(quantize):
    model = quantize(sequence_length=4096, samples=2)

    assert {r.tokens for r in model.hf_quantizer.reports} == {2 * 256}


def test_calibration_moves_blocks_to_a_device_and_back(quantize, monkeypatch):
    from watersic_hf.integration import run as module

    devices = []
    original = module.quantize_blocks

    def spy(*args, **kwargs):
        devices.append(kwargs["source"].device)
        return original(*args, **kwargs | {"source": module.ResidentBlocks("cpu")})

    monkeypatch.setattr(module, "quantize_blocks", spy)
    model = quantize()

    assert devices == ["cuda" if torch.cuda.is_available() else None]
    assert {p.device.type for p in model.parameters()} == {"cpu"}
