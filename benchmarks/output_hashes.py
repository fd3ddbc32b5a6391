"""Print the SHA-256 of every file that quantization writes, for tiny random models.

Run it before and after a change that must not alter the output, and compare the two lists::

    python benchmarks/output_hashes.py > before.txt
    python benchmarks/output_hashes.py > after.txt && diff before.txt after.txt

Every model is quantized with calibration data and without, while it is loaded and streamed from
the disk, with dense and with quantized vocabulary matrices.  The hash of the report covers neither
the line about the run nor the seconds of the layers, which differ between any two runs.
"""

import argparse
import hashlib
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging as transformers_logging

from watersic_hf import WaterSICConfig
from watersic_hf.integration import quantize_to_folder

_VOCABULARY = 160

_LLAMA = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def build_models() -> dict[str, torch.nn.Module]:
    """Return the tiny models by name, each from the same seed."""
    bart = {
        "vocab_size": _VOCABULARY,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 128,
    }
    gpt2 = {"vocab_size": _VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
        "llama_untied": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=4)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**bart)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
    }
    models = {}
    for name, make in makers.items():
        torch.manual_seed(1)
        models[name] = make().eval()
    return models


def build_settings() -> dict[str, dict]:
    """Return the settings of `WaterSICConfig` by name of the case."""
    tokens = torch.randint(0, _VOCABULARY, (6, 48), generator=torch.Generator().manual_seed(0))
    data = {"dataset": tokens, "samples": 6, "sequence_length": 48, "batch_size": 2, "bits": 4.0}
    return {
        "no_data": {"bits": 4.0},
        "no_data_vocabulary": {"bits": 3.5, "quantize_embeddings": True, "quantize_head": True},
        "data": data,
        "data_vocabulary": data | {"quantize_embeddings": 5.0, "quantize_head": 5.0},
        "data_attention": data | {"attention": 0.5, "zero_rows": "auto"},
        "data_mixing": data | {"mixing": True, "allocation": "uniform", "row_importance": False},
        "data_patterns": data
        | {"layer_bits": {r"layers\.0": 5}, "modules_to_not_convert": ["v_proj"], "drift": 0.0},
    }


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            continue
        content = file.read_bytes()
        if file.name == "watersic_report.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            rows = [{**row, "seconds": 0} for row in rows if "run" not in row]
            content = json.dumps(rows).encode()
        found[file.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def quantize(model_class: type, original: Path, out: Path, settings: dict, way: str) -> None:
    """Quantize a saved model into the folder `out`, ``loaded`` or ``streamed``."""
    config = WaterSICConfig(**settings)
    if way == "loaded":
        model_class.from_pretrained(original, quantization_config=config).save_pretrained(out)
    else:
        quantize_to_folder(str(original), out, config, max_shard_size="60KB")


def main(argv: Sequence[str] | None = None) -> None:
    """Quantize every model in every way and print the hashes."""
    models, cases = build_models(), build_settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out" / "quantized"
        for name in arguments.models:
            original = Path(scratch) / name
            models[name].save_pretrained(original)
            for case, way in itertools.product(arguments.cases, ("loaded", "streamed")):
                try:
                    quantize(type(models[name]), original, out, cases[case], way)
                except Exception as error:
                    # a case that is refused has to be refused afterwards, too
                    print(f"{name} {case} {way}: {type(error).__name__}: {error}")
                    continue
                for file, digest in hashes(out).items():
                    print(f"{name} {case} {way} {file} {digest}", flush=True)
                for file in out.rglob("*"):
                    if file.is_file():
                        file.unlink()


if __name__ == "__main__":
    main()
