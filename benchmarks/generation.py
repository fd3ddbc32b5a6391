"""Measure tokens per second, time to the first token and peak memory for every residency.

    python benchmarks/generation.py MODEL [--residencies dense packed entropy] [--json FILE]

MODEL is a folder written by `watersic quantize`.  On a CUDA device every residency generates with
and without CUDA graphs (a static cache and torch.compile's ``reduce-overhead`` mode).
``--dry-run`` generates a few tokens on any machine and prints no times.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import watersic_hf  # noqa: F401  (registers the format)
from watersic_hf import WaterSICConfig, WaterSICRuntime

COLUMNS = ("residency", "graphs", "tokens/s", "first token ms", "peak GB")


def load(folder: str, residency: str, device: str) -> torch.nn.Module:
    """Load a quantized model with a residency."""
    config = WaterSICConfig(runtime=WaterSICRuntime(residency=residency))
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device
    )
    return model.eval()


def generate(model: torch.nn.Module, prompt_T: torch.Tensor, count: int, graphs: bool) -> float:
    """Generate `count` tokens, and return the seconds that it took."""
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False}
    if graphs:
        options["cache_implementation"] = "static"
    if prompt_T.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(prompt_T[None], disable_compile=True, **options)
    if prompt_T.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: torch.nn.Module, prompt_T: torch.Tensor, count: int, graphs: bool) -> dict:
    """Return times and peak memory, measured after a warm-up run."""
    plain = model.forward
    if graphs:
        model.forward = torch.compile(plain, mode="reduce-overhead", fullgraph=True)
    try:
        generate(model, prompt_T, count, graphs)
        if prompt_T.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        first = generate(model, prompt_T, 1, graphs)
        rest = generate(model, prompt_T, count, graphs) - first
    finally:
        model.forward = plain
    row = {"tokens/s": round((count - 1) / rest, 1), "first token ms": round(1e3 * first, 1)}
    if prompt_T.is_cuda:
        row["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the quantized model")
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
    for residency in arguments.residencies:
        model = load(arguments.model, residency, device)
        vocabulary = model.config.get_text_config().vocab_size
        prompt_T = torch.arange(arguments.prompt, device=device) % vocabulary
        for graphs in (False, True) if device == "cuda" else (False,):
            row = {"residency": residency, "graphs": graphs}
            found = measure(model, prompt_T, arguments.tokens, graphs)
            rows.append(row if arguments.dry_run else row | found)
            print("| " + " | ".join(str(rows[-1].get(c, "")) for c in COLUMNS) + " |", flush=True)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
