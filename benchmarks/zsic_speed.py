"""Time the blocked recursion against the plain column loop, on the CPU or a GPU.

Usage: python benchmarks/zsic_speed.py [--size 2048] [--device cpu] [--repeats 1] [--json FILE]

On a GPU the blocked recursion is timed twice: with torch operations, and with the kernel that
quantizes a block of columns in one launch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from watersic_hf.core import Moments
from watersic_hf.core.waterfill import step_for_rate
from watersic_hf.core.whiten import damped_cholesky, whitened_target
from watersic_hf.core.zsic import zsic, zsic_block
from watersic_hf.nn import block_step
from watersic_hf.testing import random_layer

Recursion = Callable[[Tensor, Tensor, float], Tensor]


def plain(target_AN: Tensor, chol_NN: Tensor, step: float) -> Tensor:
    """Run the recursion as usually written: one full-width rank-1 update per column."""
    target_AN = target_AN.contiguous().clone()
    codes_AN = torch.zeros_like(target_AN, dtype=torch.int32)
    for i in reversed(range(target_AN.shape[1])):
        y_A = target_AN[:, i]
        z_A = (y_A / step).round()
        if z_A @ z_A > 0:
            gain = (z_A @ y_A) / (step * (z_A @ z_A))
            target_AN -= gain * step / chol_NN[i, i] * torch.outer(z_A, chol_NN[i])
        codes_AN[:, i] = z_A
    return codes_AN


def unblocked(target_AN: Tensor, chol_NN: Tensor, step: float) -> Tensor:
    """Run `zsic_block` once over all columns: rank-1 updates of the columns still to come."""
    target_NA = target_AN.T.clone(memory_format=torch.contiguous_format)
    codes_NA = torch.empty_like(target_NA, dtype=torch.int32)
    zsic_block(target_NA, chol_NN, step, codes_NA, target_NA.new_empty(len(target_NA)))
    return codes_NA.T


def blocked(target_AN: Tensor, chol_NN: Tensor, step: float) -> Tensor:
    """Run the recursion of the library with torch operations."""
    return zsic(target_AN, chol_NN, step)[0]


def launched(target_AN: Tensor, chol_NN: Tensor, step: float) -> Tensor:
    """Run the recursion of the library with its kernel for a block of columns."""
    return zsic(target_AN, chol_NN, step, block_step=block_step(target_AN.device))[0]


def timed(run: Recursion, problem: tuple[Tensor, Tensor, float], repeats: int) -> tuple:
    """Return the least wall time of several runs, and the codes."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        codes_AN = run(*problem)
        if codes_AN.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, codes_AN


def main(argv: list[str] | None = None) -> list[dict]:
    """Print a markdown table and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="+", default=[2048], help="square layers")
    parser.add_argument("--rate", type=float, default=3.0, help="Shannon rate, bits per weight")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, float64\n"
    )
    forms = [plain, unblocked, blocked]
    if torch.device(options.device).type == "cuda":
        forms.append(launched)
    names = [form.__name__ for form in forms]
    print(f"| size | {' s | '.join(names)} s | plain / {names[-1]} | equal codes |")
    print("|---" * (len(forms) + 3) + "|")
    rows = []
    for size in options.size:
        weight_AN, cov_NN = (t.to(options.device) for t in random_layer(size, size, seed=0))
        chol_NN, damping = damped_cholesky(cov_NN, 1e-4, tokens=0, name="benchmark")
        target_AN = whitened_target(weight_AN, Moments(cov=cov_NN, tokens=0), chol_NN, damping)
        step = float(step_for_rate(weight_AN, chol_NN, options.rate))
        problem = (target_AN, chol_NN, step)
        forms[-1](*problem)
        results = [timed(run, problem, options.repeats) for run in forms]
        walls = [wall for wall, _ in results]
        equal = all(bool((codes_AN == results[0][1]).all()) for _, codes_AN in results)
        row = {"size": size} | {f"{n} s": round(w, 4) for n, w in zip(names, walls, strict=True)}
        rows.append(row | {"speedup": walls[0] / walls[-1], "equal": equal})
        print(
            "| " + " | ".join(map(str, row.values())) + f" | {rows[-1]['speedup']:.1f} | {equal} |"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
