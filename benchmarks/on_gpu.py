"""Run what needs a GPU: two commands, of 8 and of 4 minutes, from a bare checkout.

    PYTHONPATH=.:kernels python benchmarks/on_gpu.py first [--out DIR] [--dry-run]
    PYTHONPATH=.:kernels python benchmarks/on_gpu.py second [--out DIR] [--dry-run]

``first`` runs the tests of the kernels, compute-sanitizer on two of them where it is installed, and
`kernels_speed.py` on the layers that matter most.  ``second`` runs `zsic_speed.py`, and
`generation.py` on blocks with random codes.  Every part has a time limit; a part that fails or
exceeds it is reported, what it has measured until then is kept, and the others run.  Nothing is
downloaded.  ``--dry-run`` does the same on any machine, without the tests and without times.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_time import FORMS, GPUS, INSTRUCTIONS, laid_out, microseconds

FOLDER = Path(__file__).parent
KERNEL_TESTS = [
    f"tests/watersic_kernels/test_{name}.py"
    for name in ("packed", "prefix", "layers", "launch", "rans", "zsic", "trellis")
]
#: One test of each product, for compute-sanitizer, which slows them down by a factor of a hundred.
SANITIZED = "packed or prefix"


@dataclass(frozen=True)
class Part:
    """One part of a command."""

    name: str
    seconds: int
    """Time limit."""
    command: Sequence[str]
    rows: bool = False
    """Whether it writes rows to the file that follows ``--json``."""


def parts(which: str, dry_run: bool) -> list[Part]:
    """Return the parts of a command, in their order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    dry = ["--dry-run"] if dry_run else []

    def script(name: str, *options: str) -> list[str]:
        return [sys.executable, str(FOLDER / name), *options]

    if which == "second":
        size = ["--size", "70"] if dry_run else ["--size", "2048", "4096", "--device", "cuda"]
        small = ["--blocks", "1", "--hidden-size", "128"] if dry_run else []
        return [
            Part("zsic", 60, script("zsic_speed.py", *size), rows=True),
            Part("generation", 170, script("generation.py", *small, *dry), rows=True),
        ]
    tokens = ["1", "70"] if dry_run else ["1", "8", "16", "64", "512", "4096"]
    speed = script("kernels_speed.py", "--layers", "first", "--tokens", *tokens, *dry)
    found = [Part("kernels", 200, speed, rows=True)]
    if not dry_run:
        tests = [
            Part("tests of kernels", 110, [*pytest, *KERNEL_TESTS]),
            Part("tests on the GPU", 90, [*pytest, "tests/watersic_kernels/test_on_gpu.py"]),
        ]
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer:
            check = [sanitizer, "--tool", "memcheck", *pytest, *KERNEL_TESTS[:2], "-x"]
            tests.append(Part("memory check", 60, [*check, "-k", SANITIZED]))
        found = [*tests, *found]
    return found


def run(part: Part, out: Path) -> tuple[str, list[dict]]:
    """Run one part; return how it ended, and its rows."""
    file = out / f"{part.name}.json"
    file.unlink(missing_ok=True)
    command = [*part.command, *(["--json", str(file)] if part.rows else [])]
    print(f"== {part.name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(command, cwd=FOLDER.parent, timeout=part.seconds).returncode
        end = "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        end = f"not finished after {part.seconds} s"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return f"{end} ({time.monotonic() - start:.0f} s)", rows


def with_predictions(rows: list[dict]) -> list[dict]:
    """Add what `kernel_time.py` predicts for this GPU to the rows of products with one token.

    `times predicted` is the speed in a graph relative to the prediction.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = next((gpu for key, gpu in GPUS.items() if key.split()[-1] in name), None)
    if gpu is None:
        return rows
    instructions = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))
    for row in rows:
        if row.get("M") == 1 and row.get("form") in FORMS:
            A, _, N = row["layer"].split()[-3:]
            layout = laid_out((int(A), int(N)), row["form"], 3.0)
            found = microseconds(gpu, row["form"], layout, instructions)
            row["predicted us"] = round(found["total"], 1)
            if "graph us" in row:
                row["times predicted"] = round(found["total"] / row["graph us"], 2)
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("first", "second"))
    parser.add_argument("--out", default="on_gpu", help="folder for the rows of the parts")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    if arguments.dry_run and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    ends, rows = {}, []
    for part in parts(arguments.which, arguments.dry_run):
        ends[part.name], found = run(part, out)
        rows += found
    if not arguments.dry_run:
        rows = with_predictions(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    print(", ".join(f"{name}: {end}" for name, end in ends.items()))
    (out / f"{arguments.which}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
