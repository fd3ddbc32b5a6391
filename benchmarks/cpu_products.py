"""Time products with compressed weights against torch's dense products, on a CPU.

    python benchmarks/cpu_products.py [--shapes 4096x14336 ...] [--tokens 1 8 512] [--threads N]

Every product is compared with that of the dense weight before it is timed.  `bf16` and `f32` are
the times of `F.linear` in these dtypes, measured in turn with our product for activations of the
same dtype, and divided by it.  A trellis is held as codes, as in a model, and for comparison as
values.
The first product of all is timed on its own: it compiles the kernels, or loads them from the disk.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from kernels_speed import PATH_ROWS, codes_of, on_a_path
from torch import Tensor
from torch.nn import functional as F

from watersic_hf.nn import ops
from watersic_hf.nn.bands import scale_codes
from watersic_hf.testing import assert_close

TIMES = ("ms, f32", "times f32", "ms, bf16", "times bf16")
COLUMNS = ("layer", "lattice", "M", "form", "bits held", *TIMES)


def seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median time of each of some functions, which are called in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [sorted(found)[len(found) // 2] for found in times]


def measure(coded: Sequence, dense: dict[torch.dtype, Tensor], tokens: int, repeats: int) -> dict:
    """Return the times of one form and number of tokens.

    Args:
        coded: residency, layout and scales, as `ops.coded_linear` takes them.
        dense: the dense weight by dtype.
        tokens: rows of the input.
        repeats: how often each product is timed.
    """
    row = {}
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        x_MN = torch.randn(tokens, dense[dtype].shape[1]).to(dtype)

        def ours(x_MN: Tensor = x_MN) -> Tensor:
            return ops.coded_linear(x_MN, *coded, "auto")

        def theirs(x_MN: Tensor = x_MN, dtype: torch.dtype = dtype) -> Tensor:
            return F.linear(x_MN, dense[dtype])

        assert_close(ours(), x_MN.float() @ dense[torch.float32].T, tolerance=1e-2)
        our_time, dense_time = seconds((ours, theirs), repeats)
        row |= {f"ms, {name}": round(1e3 * our_time, 2)}
        row |= {f"times {name}": round(dense_time / our_time, 2)}
    return row


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "8192x8192"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--forms", nargs="+", choices=ops.LAYOUTS, default=["packed"])
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {arguments.threads} threads")
    start = time.perf_counter()
    small = ops.encode(torch.ones(1, 1, dtype=torch.int32), "packed")
    layer = [*small.tensors().values()], torch.ones(1), torch.ones(1)
    ops.coded_linear(torch.ones(1, 1), "packed", *layer, "auto")
    print(f"first product: {time.perf_counter() - start:.1f} s")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    rows = []
    for shape in arguments.shapes:
        A, N = map(int, shape.split("x"))
        codes_AN, *scales = codes_of(A, N, arguments.bits, "cpu")
        values_AN, path = on_a_path(codes_AN, PATH_ROWS)
        layers = {"scalar": (codes_AN, None), "trellis, values": (values_AN, None)}
        layers["trellis, codes"] = values_AN, path
        for lattice, (given_AN, its_path) in layers.items():
            dense = {torch.float32: scale_codes(given_AN, *scales, torch.float32)}
            dense[torch.bfloat16] = dense[torch.float32].bfloat16()
            for form in arguments.forms:
                encoded = ops.encode(given_AN, form, its_path)
                coded = form, [*encoded.tensors().values()], *scales
                for tokens in arguments.tokens:
                    repeats = arguments.repeats if tokens < 64 else 1
                    row = {"layer": shape, "lattice": lattice, "M": tokens, "form": form}
                    row |= {"bits held": round(8 * encoded.nbytes / codes_AN.numel(), 2)}
                    row |= measure(coded, dense, tokens, repeats)
                    rows.append(row)
                    print("| " + " | ".join(str(row[c]) for c in COLUMNS) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
