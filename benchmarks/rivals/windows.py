"""Calibration windows, so that every method that calibrates sees the same tokens."""

import argparse

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, help="as WaterSICConfig(dataset=...)")
    parser.add_argument("--samples", type=int, default=64, help="number of windows (default: 64)")
    parser.add_argument(
        "--sequence-length", type=int, default=512, help="tokens per window (default: 512)"
    )
    parser.add_argument("--seed", type=int, default=0)


def write_windows(options: argparse.Namespace) -> None:
    """Draw windows as `watersic quantize` does, and write them to ``options.out``."""
    from transformers import AutoTokenizer

    from watersic_hf.calibration.data import calibration_windows

    chosen = calibration_windows(
        options.text,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    save_file({"windows": torch.stack(chosen)}, options.out)
    print(f"{options.out}: {len(chosen)} windows of {options.sequence_length} tokens")


def read_windows(file: str) -> Tensor:
    """Return the windows of a file, int64, windows x tokens."""
    found = load_file(file).get("windows")
    if found is None or found.ndim != 2 or found.dtype != torch.int64:
        raise SystemExit(
            f"{file}: needs one int64 tensor `windows` of shape (count, length), as written by "
            "`run_rival.py windows`"
        )
    return found
