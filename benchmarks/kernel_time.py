"""Predict the time of products with one token on GPUs that need not be here.

    python benchmarks/kernel_time.py [--gpus H200 ...] [--json FILE]

A layer with random codes is laid out here; its bytes, the instructions per weight of the committed
table and the longest chains of steps that wait for each other then give the time on a GPU: the
longest of what its memory, its issue slots, its table lookups and the chains take, by `OVERLAP`,
the sum over the splits, and the launches.  The numbers are predictions, in a CUDA graph; nothing is
timed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels_speed import PATH_ROWS, codes_of, on_a_path

from watersic_hf.nn import ops
from watersic_hf.nn.prefix import PrefixCodes
from watersic_hf.nn.tiles import TILE, TiledCodes
from watersic_kernels.packed import PROGRAMS

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = ROOT / "tests" / "watersic_kernels" / "instructions.json"


@dataclass(frozen=True)
class Gpu:
    """What limits a product on a GPU; clocks are those of boost."""

    target: str
    """Its row in the table of instructions."""
    processors: int
    """Streaming multiprocessors."""
    gigahertz: float
    terabytes: float
    """Bandwidth of its memory per second."""

    @property
    def lanes(self) -> float:
        """Instructions of one lane per microsecond: four warps of 32 lanes per processor."""
        return 128 * self.processors * 1e3 * self.gigahertz


GPUS = {
    "H200": Gpu("sm_90", 132, 1.98, 4.8),
    "H100": Gpu("sm_90", 132, 1.98, 3.35),
    "RTX 4090": Gpu("sm_89", 128, 2.52, 1.008),
}
SHAPES = ((4096, 14336), (8192, 8192))

#: Form: residency, lattice, and the rows of the table of instructions.
FORMS = {
    "packed": ("packed", "scalar", "gemv tile 3 bits"),
    "packed, trellis": ("packed", "trellis", "gemv trellis tile 3 bits"),
    "entropy": ("entropy", "scalar", "prefix tile 128 rows 1 tokens"),
}

#: Fraction of the bandwidth that a kernel which only reads reaches.
READING = 0.9
#: What the longest part takes grows by this factor, since the others do not hide behind it wholly.
OVERLAP = 1.15
#: Microseconds per kernel in a graph, and kernels of a product: the first scales x.
LAUNCH, LAUNCHES = 2.0, 2
#: Microseconds of an iteration over outliers: an entry, then the input that it multiplies.
ITERATION = 0.5
#: Microseconds in which four columns of a stream are decoded: the next word comes from the L2
#: cache, into which the block is prefetched.
STEP = 0.2
#: Microseconds until the last program of a band knows that it is, and in which it adds up the sums
#: of `SUMMED` splits.
ARRIVAL, SUM = 0.5, 0.25
#: Splits that are added up at once, as in the kernels with one token.
SUMMED = 8
#: Entries of a row that are read at once; `AT_ONCE` of the kernels with one token.
AT_ONCE = 4
#: Conflicts of a lookup of 32 lanes in a symbol table; there is a lookup for every two codes.
CONFLICTS = 6


def chain(layout: TiledCodes) -> int:
    """Return the iterations of the longest chain of outliers of one program.

    A program has at most one group of columns, as there are more programs than groups.
    """
    count_BKr = layout.tensors()["outlier_count_BKr"]
    return -(-int(count_BKr.max()) // AT_ONCE)


def microseconds(gpu: Gpu, form: str, layout: TiledCodes, instructions: dict) -> dict[str, float]:
    """Return the predicted time of one product, and its parts."""
    weights = layout.rows * layout.columns
    per_weight = instructions[FORMS[form][2]][gpu.target]["per weight"]
    parts = {
        "memory": layout.nbytes / (READING * 1e6 * gpu.terabytes),
        "issue": weights * per_weight / gpu.lanes,
        "outliers": ITERATION * chain(layout),
    }
    splits = splits_of(layout)
    if FORMS[form][0] == "entropy":
        parts["lookups"] = weights / 64 * CONFLICTS / (gpu.processors * 1e3 * gpu.gigahertz)
        parts["steps"] = STEP * layout.tiles_per_segment * TILE / 4
    sums = ARRIVAL + SUM * -(-splits // SUMMED)
    return parts | {"total": OVERLAP * max(parts.values()) + sums + LAUNCHES * LAUNCH}


def splits_of(layout: TiledCodes) -> int:
    """Return the parts into which the columns of a product with one token are split."""
    bands, tiles = layout.tensors()["tiles_BT"].shape
    if isinstance(layout, PrefixCodes):
        return layout.first_BS.shape[1]
    return -(-tiles // -(-tiles // max(1, PROGRAMS // bands)))


def laid_out(shape: tuple[int, int], form: str, bits: float) -> TiledCodes:
    """Return random codes of about `bits` bits in the layout of a form."""
    residency, lattice, _ = FORMS[form]
    codes_AN, *_ = codes_of(*shape, bits, "cpu")
    if lattice == "scalar":
        return ops.encode(codes_AN, residency)
    # any codes are those of a path
    values_AN, path = on_a_path(codes_AN, PATH_ROWS)
    return ops.encode(values_AN, residency, path)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument("--bits", type=float, default=3.0, help="approximate bits of the codes")
    parser.add_argument("--shape", type=int, nargs=2, help="rows and columns (default: two layers)")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    instructions = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))
    rows = []
    print("| layer | form | bits held | chain | GPU | bf16 us | us | longest part | times bf16 |")
    print("|---|---|--:|--:|---|--:|--:|---|--:|")
    for shape in [tuple(arguments.shape)] if arguments.shape else SHAPES:
        for form in FORMS:
            layout = laid_out(shape, form, arguments.bits)
            weights = layout.rows * layout.columns
            held = 8 * layout.nbytes / weights
            for name in arguments.gpus:
                dense = 2 * weights / (READING * 1e6 * GPUS[name].terabytes) + LAUNCH
                parts = microseconds(GPUS[name], form, layout, instructions)
                total = parts.pop("total")
                row = {
                    "layer": f"{shape[0]} x {shape[1]}",
                    "form": form,
                    "bits held": round(held, 3),
                    "chain": chain(layout),
                    "GPU": name,
                    "bf16 us": round(dense, 1),
                    "us": round(total, 1),
                    "longest part": max(parts, key=parts.get),
                    "times bf16": round(dense / total, 2),
                }
                rows.append(row)
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
