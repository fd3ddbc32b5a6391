"""Measure perplexity and KL of one model, quantized at several rates.

    python benchmarks/perplexity.py --model FOLDER --calibration calib.txt --text eval.txt

Stored bits are computed from the bytes of the saved files.  The evaluation text must differ from
the calibration text; the defaults are disjoint parts of Python's documentation.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from watersic_hf import WaterSICConfig
from watersic_hf.checkpoint import inspect_checkpoint
from watersic_hf.evaluation import evaluate, evaluation_text, evaluation_windows

COLUMNS = ("asked", "stored", "pooled entropy", "perplexity", "KL bits/token", "top-1", "seconds")


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0])
    parser.add_argument(
        "--calibration",
        default="pydoc",
        help="as WaterSICConfig(dataset=...); none quantizes without data",
    )
    parser.add_argument("--text", help="evaluation text file (default: held-out topics of pydoc)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = evaluation_text(arguments.text)
    windows = evaluation_windows(
        text, tokenizer, sequence_length=arguments.sequence_length, limit=arguments.windows
    )
    original = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, {len(windows)} windows, {arguments.model}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|--:" * len(COLUMNS) + "|")
    rows = []
    for bits in arguments.bits:
        rows.append(_measure(arguments, bits, original, windows))
        print("| " + " | ".join(f"{v:.5g}" for v in rows[-1].values()) + " |", flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=2))
    print(f"\noriginal perplexity {evaluate(original, windows).perplexity:.4f}")
    return rows


def _measure(
    arguments: argparse.Namespace, bits: float, original: torch.nn.Module, windows: list
) -> dict:
    """Quantize at one rate, and return the row."""
    config = WaterSICConfig(
        bits=bits,
        dataset=None if arguments.calibration == "none" else arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        totals = inspect_checkpoint(folder)["totals"]
    result = evaluate(model.eval(), windows, original)
    values = (
        bits,
        totals["bits"],
        totals["pooled_entropy"],
        result.perplexity,
        result.kl_bits,
        result.top1_agreement,
        seconds,
    )
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    main()
