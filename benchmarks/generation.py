"""Measure tokens per second, time to the first token and memory for every residency.

    python benchmarks/generation.py [MODEL] [--residencies dense packed entropy] [--json FILE]

MODEL is a folder written by `watersic quantize`; without one, some blocks of the shape of
Llama-3-8B with random codes are taken, which need no download.  On a CUDA device every residency
generates with and without CUDA graphs: the prompt is not compiled, and the decoding of further
tokens is, in torch.compile's ``reduce-overhead`` mode on one static cache.  Memory is the peak of
what torch has allocated on a CUDA device, and otherwise what the process holds.
``--dry-run`` generates a few tokens on any machine and prints no times.
"""

import argparse
import gc
import time
from collections.abc import Sequence

import psutil
import torch
from kernels_speed import codes_of, keep_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from watersic_hf import WaterSICConfig, WaterSICLinear, WaterSICRuntime, set_residency
from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import replace_module

COLUMNS = ("residency", "graphs", "tokens/s", "first token ms", "memory GB")


def random_model(blocks: int, hidden: int, device: str) -> torch.nn.Module:
    """Return blocks of the shape of Llama-3-8B, or of a smaller width, with random codes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            codes_AN, *scales = codes_of(layer.out_features, layer.in_features, 3.0, device)
            packed = pack_layer(codes_AN, *scales, name=name)
            quantized = WaterSICLinear.from_packed(packed, dtype=torch.bfloat16, device=device)
            replace_module(model.model.layers, name, quantized)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) / 50
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def load(folder: str, residency: str, device: str) -> torch.nn.Module:
    """Load a quantized model with a residency."""
    config = WaterSICConfig(runtime=WaterSICRuntime(residency=residency))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device
    )
    return model.eval()


def generate(
    model: torch.nn.Module, prompt_T: torch.Tensor, count: int, cache: StaticCache | None
) -> float:
    """Generate `count` tokens, and return the seconds that it took.

    Args:
        model: the model.
        prompt_T: the prompt.
        count: number of tokens.
        cache: cache whose addresses the graphs keep; None generates without graphs.
    """
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    if cache is not None:
        cache.reset()
        options["past_key_values"] = cache
    if prompt_T.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    # on CUDA, transformers compiles what follows the prompt if the cache is static
    model.generate(prompt_T[None], disable_compile=cache is None, **options)
    if prompt_T.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: torch.nn.Module, prompt_T: torch.Tensor, count: int, graphs: bool) -> dict:
    """Return times and peak memory, measured after a warm-up run."""
    cache = None
    if graphs:
        cache = StaticCache(config=model.config, max_cache_len=len(prompt_T) + count)
    generate(model, prompt_T, count, cache)
    if prompt_T.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    first = generate(model, prompt_T, 1, cache)
    rest = generate(model, prompt_T, count, cache) - first
    row = {"tokens/s": round((count - 1) / rest, 1), "first token ms": round(1e3 * first, 1)}
    if prompt_T.is_cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = psutil.Process().memory_info().rss
    row["memory GB"] = round(memory / 1e9, 2)
    return row


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of the quantized model")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the random model")
    parser.add_argument("--hidden-size", type=int, default=4096, help="width of the random model")
    parser.add_argument("--residencies", nargs="+", default=["dense", "packed", "entropy"])
    parser.add_argument("--prompt", type=int, default=128, help="length of the prompt in tokens")
    parser.add_argument("--tokens", type=int, default=128, help="number of tokens to generate")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.dry_run:
        arguments.prompt, arguments.tokens = 4, 3
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    rows = []
    made = None
    if arguments.model is None:
        made = random_model(arguments.blocks, arguments.hidden_size, device)
    for residency in arguments.residencies:
        if made is None:
            model = load(arguments.model, residency, device)
        else:
            set_residency(made, residency)
            model = made
        vocabulary = model.config.get_text_config().vocab_size
        prompt_T = torch.arange(arguments.prompt, device=device) % vocabulary
        # a dry run on a CPU tries the static cache
        for graphs in (False, True) if device == "cuda" else (arguments.dry_run,):
            row = {"residency": residency, "graphs": graphs}
            found = measure(model, prompt_T, arguments.tokens, graphs)
            rows.append(row if arguments.dry_run else row | found)
            print("| " + " | ".join(str(rows[-1].get(c, "")) for c in COLUMNS) + " |", flush=True)
            keep_rows(arguments.json, rows)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
