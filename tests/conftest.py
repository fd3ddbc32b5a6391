import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread per worker, also in the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# without a GPU, kernels run in Triton's interpreter, which must be known before Triton is imported
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import watersic_hf
from watersic_hf import WaterSICConfig
from watersic_hf.calibration import pydoc_texts
from watersic_hf.checkpoint import rescale_layer
from watersic_hf.nn import packed_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"])
    trained.train_from_iterator(pydoc_texts()[:20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")


def tiny_llama(**changes) -> LlamaForCausalLM:
    """A random Llama whose head is tied to its embedding unless `changes` says otherwise."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="session")
def make_llama():
    return tiny_llama


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer):
    """The tiny dense model and its tokenizer on the disk."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantize(llama_folder, tokenizer):
    """Quantize the tiny model (or another folder) with a few calibration windows."""

    def run(folder=llama_folder, *, load=None, **changes):
        settings = {
            "bits": 4.0,
            "dataset": "pydoc",
            "tokenizer": tokenizer,
            "samples": 4,
            "sequence_length": 64,
        }
        settings |= changes
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=WaterSICConfig(**settings), **(load or {})
        )

    return run


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory, quantize, tokenizer):
    """The tiny model, calibrated and saved."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spoil_scales():
    """Put the scales of a quantized model off by a tenth, so that finetuning has much to mend."""

    def spoil(model):
        g = torch.Generator().manual_seed(0)
        for name, layer in packed_layers(model):
            scales = (
                scale.float() * (0.1 * torch.randn(scale.shape, generator=g)).exp()
                for scale in (layer.row_scale.data, layer.col_scale.data)
            )
            packed = rescale_layer(layer.packed, *scales, name=name)
            for field, tensor in packed.tensors().items():
                getattr(layer, field).data = tensor
            layer.set_residency("stored")
            layer.set_residency("dense")
        return model

    return spoil


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def write_task(tmp_path):
    """Write a task of lm-evaluation-harness and its documents; multiple choice by default."""

    def write(name, documents, **changes):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.json"
        data.write_text(json.dumps(documents))
        config = {
            "task": name,
            "dataset_path": "json",
            "test_split": "train",
            "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path / "cache")},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "fewshot_split": "train",
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [{"metric": "acc"}],
        }
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps(config | changes))
        return folder / f"{name}.yaml"

    return write


@pytest.fixture(scope="session")
def packed_names():
    """Names of the quantized layers of a model."""

    def names(model):
        return [n for n, m in model.named_modules() if isinstance(m, watersic_hf.WaterSICLinear)]

    return names


@pytest.fixture
def watersic_log(caplog):
    """The package's log records, also where the application has cut propagation."""
    caplog.set_level(logging.INFO, logger="watersic_hf")
    return caplog
