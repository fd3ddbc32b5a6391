"""What a program has set in torch does not change what is quantized."""

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from watersic_hf import WaterSICConfig
from watersic_hf.integration import quantize_to_folder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@contextlib.contextmanager
def everything():
    """All that a program may set, at the same time."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory, make_llama):
    folder = tmp_path_factory.mktemp("dense")
    make_llama(**SIZES).save_pretrained(folder)
    return folder


def make_config(with_data):
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 96, (48,), generator=g) for _ in range(3)]
    return WaterSICConfig(
        bits=4,
        dataset=windows if with_data else None,
        samples=3,
        sequence_length=48,
        quantize_head=True,
    )


@pytest.fixture(scope="module")
def quantized(dense_folder, tmp_path_factory):
    """Tensors and model of a quantization in some state of torch."""

    def run(state, way, with_data):
        folder = tmp_path_factory.mktemp("quantized")
        config, model = make_config(with_data), None
        with state():
            if way == "folder":
                quantize_to_folder(str(dense_folder), folder, config)
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    dense_folder, quantization_config=config
                )
        if model is not None:
            model.save_pretrained(folder)
        return load_file(folder / "model.safetensors"), model

    return run


@pytest.fixture(scope="module")
def expected(quantized):
    return {data: quantized(contextlib.nullcontext, "load", data)[0] for data in (False, True)}


@pytest.mark.parametrize("with_data", [False, True], ids=["without data", "with data"])
@pytest.mark.parametrize("way", ["load", "folder"])
def test_the_state_of_torch_does_not_change_the_file(quantized, expected, way, with_data):
    found, model = quantized(everything, way, with_data)

    assert found.keys() == expected[with_data].keys()
    assert all(torch.equal(value, expected[with_data][name]) for name, value in found.items())
    if model is not None:
        assert not any(parameter.is_inference() for parameter in model.parameters())


def test_another_default_device_does_not_change_the_file(quantized, expected):
    found, _ = quantized(lambda: torch.device("meta"), "folder", True)

    assert all(torch.equal(value, expected[True][name]) for name, value in found.items())


def test_massive_rows_without_a_dataset_are_refused(dense_folder, tmp_path):
    config = WaterSICConfig(zero_rows="auto")

    for quantize in (
        lambda: AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config),
        lambda: quantize_to_folder(str(dense_folder), tmp_path / "out", config),
    ):
        with pytest.raises(ValueError, match=r'`zero_rows` is "auto".* no `dataset`'):
            quantize()
