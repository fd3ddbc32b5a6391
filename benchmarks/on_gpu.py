"""Run everything that needs a GPU, in less than 20 minutes, and print one table.

    python benchmarks/on_gpu.py MODEL [--out DIR] [--dry-run]

First ``pytest -m gpu``; if it fails, nothing is timed.  Then `kernels_speed.py` on the layers that
matter most, `zsic_speed.py`, and `generation.py` on MODEL, a folder written by `watersic quantize`.
Each part has a time limit, and a part that exceeds it is reported.  ``--dry-run`` does the same on
any machine, without the tests and without times.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent

#: Time limits of the parts in seconds.
LIMITS = {"tests": 240, "kernels": 460, "zsic": 100, "generation": 360}


def run(name: str, command: Sequence[str]) -> str:
    """Run one part, and return how it ended."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    try:
        status = subprocess.run(command, cwd=FOLDER.parent, timeout=LIMITS[name]).returncode
    except subprocess.TimeoutExpired:
        return f"not finished after {LIMITS[name]} s"
    return "done" if status == 0 else f"failed with status {status}"


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the quantized model")
    parser.add_argument("--out", default="on_gpu", help="folder for the rows of the parts")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    python, dry = [sys.executable], ["--dry-run"] if arguments.dry_run else []
    ends = {}
    if not arguments.dry_run:
        ends["tests"] = run("tests", [*python, "-m", "pytest", "-q", "-m", "gpu"])
    if ends.get("tests", "done") == "done":
        tokens = ["1", "70"] if arguments.dry_run else ["1", "8", "64", "4096"]
        options = [] if arguments.dry_run else ["--layers", "llama-8b", "70b"]
        speed = [str(FOLDER / "kernels_speed.py"), "--json", str(out / "kernels.json")]
        ends["kernels"] = run("kernels", [*python, *speed, "--tokens", *tokens, *options, *dry])
        speed = [str(FOLDER / "zsic_speed.py"), "--json", str(out / "zsic.json")]
        options = ["--size", "70"] if arguments.dry_run else ["--size", "2048", "4096"]
        device = ["--device", "cpu" if arguments.dry_run else "cuda"]
        ends["zsic"] = run("zsic", [*python, *speed, *options, *device])
        speed = [str(FOLDER / "generation.py"), str(Path(arguments.model).resolve())]
        speed += ["--json", str(out / "generation.json")]
        ends["generation"] = run("generation", [*python, *speed, *dry])

    rows = []
    for name in ("kernels", "zsic", "generation"):
        if ends.get(name) == "done":
            rows += json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    print(", ".join(f"{name}: {end}" for name, end in ends.items()))
    return rows


if __name__ == "__main__":
    main()
