"""Measure vLLM with a quantized model beside the dense one: tokens per second, seconds to load.

    python benchmarks/serving.py QUANTIZED --against DENSE [--residencies dense packed]

Needs vLLM.  Every engine has a process of its own, and the engines take turns, so that a machine
that changes its speed changes it for all.  The best of the turns counts.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

COLUMNS = ("model", "residency", "load s", "tokens/s, 1", "tokens/s, 8")
PROMPT_TOKENS = 32
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def run_engine(folder: str, residency: str | None, tokens: int, dtype: str) -> dict:
    """Start an engine in this process; return the seconds to load, and tokens per second."""
    from vllm import LLM, SamplingParams

    options = {"dtype": dtype, "max_model_len": PROMPT_TOKENS + tokens + 1, "max_num_seqs": 8}
    options["enforce_eager"] = True
    if residency is not None:
        options["additional_config"] = {"watersic": {"residency": residency}}
    start = time.perf_counter()
    engine = LLM(model=folder, **options)
    found = {"load s": time.perf_counter() - start}
    settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for together in (1, 8):
        prompts = [
            {"prompt_token_ids": list(range(100 + n, 100 + n + PROMPT_TOKENS))}
            for n in range(together)
        ]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        start = time.perf_counter()
        engine.generate(prompts, settings, use_tqdm=False)
        found[f"tokens/s, {together}"] = together * tokens / (time.perf_counter() - start)
    return found


def in_process(*engine: object) -> dict:
    """Return what `run_engine` does, from a fork of this process, which has imported vLLM."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(run_engine, engine)


def print_rows(rows: Sequence[dict]) -> None:
    """Print the results as a table."""
    print("  ".join(f"{column:>14}" for column in COLUMNS))
    for row in rows:
        cells = [row[column] for column in COLUMNS]
        print("  ".join(f"{c:14.2f}" if isinstance(c, float) else f"{c:>14}" for c in cells))


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run the benchmark; return one row per engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the quantized model")
    parser.add_argument("--against", help="folder of the dense model")
    parser.add_argument("--residencies", nargs="+", default=["dense", "packed"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=2, help="runs of each engine")
    parser.add_argument("--dtype", default="float32", help="dtype of both models")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    os.environ |= SETTINGS
    importlib.import_module("vllm.v1.worker.cpu_worker")
    engines = [(arguments.model, residency) for residency in arguments.residencies]
    if arguments.against:
        engines.insert(0, (arguments.against, None))
    rows = [{"model": "quantized" if r else "original", "residency": r or ""} for _, r in engines]
    for _ in range(arguments.turns):
        for row, engine in zip(rows, engines, strict=True):
            found = in_process(*engine, arguments.tokens, arguments.dtype)
            for column, value in found.items():
                best = min if column == "load s" else max
                row[column] = best(row.get(column, value), value)
    print_rows(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
