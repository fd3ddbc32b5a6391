"""Compile the kernels for GPUs that need not be present, and count registers and instructions.

    python benchmarks/kernel_instructions.py [--json FILE]

For every kernel and target: registers and spilled bytes.  For a tile on NVIDIA GPUs also the
instructions of the loop over tiles, per weight of a lane; that is how many issue slots of a warp 32
weights take.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from watersic_kernels import (
    outliers,
    packed,
    paths,
    prefix,
    product,
    rans,
    streams,
    tiles,
    trellis,
    zsic,
)

NVIDIA = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)}
TARGETS = {**NVIDIA, "gfx942": GPUTarget("hip", "gfx942", 64)}

#: Types of the kernels' pointer arguments by name; other arguments are 32-bit integers.
POINTERS = {
    "folded_CM": "*fp32",
    "folded_LCM": "*fp32",
    "cleared": "*i32",
    "arrived_B": "*i32",
    "words_G": "*i32",
    "tiles_BT": "*i32",
    "state_BT3": "*i32",
    "outliers_O": "*i16",
    "sums_SMR": "*fp32",
    "x_MN": "*bf16",
    "order_C": "*i16",
    "order_R": "*i16",
    "scale_N": "*fp16",
    "scale_A": "*fp16",
    "codes_RC": "*bf16",
    "y_MA": "*bf16",
    "words_W": "*i16",
    "offsets_C": "*i64",
    "row_class_A": "*i32",
    "col_class_N": "*i32",
    "first_BS": "*i32",
    "shortest_BS": "*i32",
    "bits_BSr": "*u8",
    "outlier_first_BK": "*i32",
    "outlier_count_BKr": "*u8",
    "first_BK": "*i32",
    "count_BKr": "*u8",
    "tables_TW": "*i32",
    "codes_CR": "*bf16",
    "order_N": "*i64",
    "table": "*i32",
    "shift_K": "*i32",
    "codes_AN": "*i32",
    "good_C": "*i32",
    "target_A": "*fp64",
    "level_A": "*i64",
    "cost_KQV": "*fp64",
    "best_A4": "*fp64",
    "value_A4": "*i32",
    "choice_A": "*u8",
    "chosen_A": "*u8",
    "values_A": "*i32",
    "codes_BA": "*i32",
    "arrived": "*i32",
}

#: Arguments that are tuples with an entry per layer.
LAYERED = {
    "_fold_kernel": ("order_C", "scale_N"),
    "_gemv_kernel": (
        *("words_G", "tiles_BT", "state_BT3", "first_BS", "shortest_BS", "bits_BSr"),
        *("outliers_O", "outlier_first_BK", "outlier_count_BKr", "order_R", "scale_A", "y_MA"),
        *("first_band", "outputs", "slots", "entries", "words"),
    ),
}


@triton.jit
def tiles_of_one_width(
    folded_CM,
    words_G,
    sums_SMR,
    tiles,
    exponents,
    WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The loop of `packed._gemv_kernel` for one width, so that its instructions can be counted."""
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    for t in range(tiles):
        words = words_G + t * (WIDTH * BAND) + r[None, :]
        x = folded_CM + t * (32 * TOKENS)
        sums = packed._add_tile(sums, x, words, exponents, WIDTH, BAND, TOKENS)
    tl.store(sums_SMR + m[:, None] * BAND + r[None, :], sums)


@triton.jit
def paths_of_one_width(
    folded_CM,
    words_G,
    state_BT3,
    sums_SMR,
    tiles,
    exponents,
    WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """As `tiles_of_one_width`, for the values of a trellis."""
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    for t in range(tiles):
        words = words_G + t * (WIDTH * BAND) + r[None, :]
        x = folded_CM + t * (32 * TOKENS)
        parity = tl.load(words)
        quantizer = paths.quantizers(parity, state_BT3 + t * 3, r[None, :], 1)
        sums = paths._add_path(sums, x, words, parity, quantizer, exponents, WIDTH, BAND, TOKENS)
    tl.store(sums_SMR + m[:, None] * BAND + r[None, :], sums)


@triton.jit
def tiles_without_low_bits(
    folded_CM,
    words_G,
    bits_BSr,
    tiles_BT,
    tables_TW,
    sums_SMR,
    tiles,
    limit,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The loop of `prefix._gemv_kernel` for tiles whose codes have no low bits."""
    r = tl.arange(0, BAND)[None, :]
    m = tl.arange(0, TOKENS)[:, None]
    sums = tl.zeros((TOKENS, BAND), tl.float32)
    at = tl.load(bits_BSr + r).to(tl.int32)
    w0, w1, w2 = streams._ahead(words_G, at)
    for t in range(tiles):
        at = tl.minimum(at, limit)
        table, _ = streams._table(tiles_BT + t, tables_TW, 50, WINDOW)
        x = folded_CM + t * (32 * TOKENS)
        sums, at, w0, w1, w2 = prefix._add_tile(
            sums, x, table, words_G, at, w0, w1, w2, WINDOW, TOKENS
        )
    tl.store(sums_SMR + m * BAND + r, sums)


def variants() -> dict[str, tuple]:
    """Return by name: the kernel, its constants, the types that differ, and the number of warps."""
    found: dict[str, tuple] = {}
    for band in (64, 128):
        for tokens in (1, 8):
            constants = {"BAND": band, "TOKENS": tokens, "TRELLIS": False}
            found[f"gemv {band} rows {tokens} tokens"] = (packed._gemv_kernel, constants, {}, 1)
    constants = {"BAND": 128, "TOKENS": 1, "TRELLIS": False}
    found["gemv 128 rows 1 tokens 3 layers"] = (packed._gemv_kernel, constants, {}, 1)
    constants = {"BAND": 128, "TOKENS": 1, "TRELLIS": True}
    found["gemv trellis 128 rows 1 tokens"] = (packed._gemv_kernel, constants, {}, 1)
    for width in range(1, 9):
        constants = {"WIDTH": width, "BAND": 128, "TOKENS": 1}
        found[f"gemv trellis tile {width} bits"] = (paths_of_one_width, constants, {}, 1)
    for width in range(1, 9):
        constants = {"WIDTH": width, "BAND": 128, "TOKENS": 1}
        found[f"gemv tile {width} bits"] = (tiles_of_one_width, constants, {}, 1)
    constants = {"WIDTH": 3, "BAND": 128, "TOKENS": 4}
    found["gemv tile 3 bits 4 tokens"] = (tiles_of_one_width, constants, {}, 1)
    for kind, precision in (("bf16", "ieee"), ("fp32", "tf32")):
        for name, on_path in (("", False), (" trellis", True)):
            constants = {"BLOCK_M": 32, "BAND": 128, "PRECISION": precision, "TRELLIS": on_path}
            types = {"folded_CM": f"*{kind}"}
            found[f"gemm{name} {kind}"] = (tiles._gemm_kernel, constants, types, 4)
    found["decode"] = (tiles._decode_kernel, {"BAND": 128, "TRELLIS": False}, {}, 4)
    found["decode trellis"] = (tiles._decode_kernel, {"BAND": 128, "TRELLIS": True}, {}, 4)
    found["prefix values"] = (prefix._values_kernel, {"BAND": 128}, {}, 4)
    found["decode outliers"] = (outliers._decode_outliers_kernel, {"BAND": 128}, {}, 1)
    for band in (64, 128):
        for tokens in (1, 8):
            constants = {"BAND": band, "TOKENS": tokens, "WINDOW": 11}
            types = {"tiles_BT": "*i16"}
            name = f"{band} rows {tokens} tokens"
            found[f"prefix gemv {name}"] = (prefix._gemv_kernel, constants, types, 1)
            found[f"prefix tile {name}"] = (tiles_without_low_bits, constants, types, 1)
    constants = {"BAND": 128, "TOKENS": 1, "WINDOW": 11}
    name = "prefix gemv 128 rows 1 tokens 3 layers"
    found[name] = (prefix._gemv_kernel, constants, {"tiles_BT": "*i16"}, 1)
    constants = {"BAND": 128, "WINDOW": 11}
    found["prefix decode"] = (prefix._decode_kernel, constants, {"tiles_BT": "*i16"}, 1)
    found["fold"] = (product._fold_kernel, {"BLOCK_C": 1024, "BLOCK_M": 1, "TF32": False}, {}, 4)
    found["rans decode"] = (rans._decode_kernel, {"TRELLIS": False}, {}, 1)
    found["rans decode trellis"] = (rans._decode_kernel, {"TRELLIS": True}, {}, 1)
    for kind in ("fp32", "fp64"):
        names = ("target_BA", "chol_BB", "step_1", "shrinkage_B", "sums_B2P")
        constants = {"ROWS": zsic.ROWS, "PROGRAMS": 256}
        types = dict.fromkeys(names, f"*{kind}")
        found[f"zsic block {kind}"] = (zsic._block_kernel, constants, types, 4)
    constants = {"ROWS": trellis.ROWS}
    found["trellis prepare"] = (trellis._prepare_kernel, constants, {}, 4)
    found["trellis search"] = (trellis._search_kernel, constants, {}, 1)
    found["finish"] = (product._finish_kernel, {"BLOCK_S": 16, "BLOCK_R": 64}, {}, 4)
    return found


def measure(name: str, target: str) -> dict[str, float]:
    """Compile one variant for one target, and return what was counted."""
    kernel, constants, types, warps = variants()[name]
    if "PREFETCH" in kernel.arg_names:
        constants = constants | {"PREFETCH": target in NVIDIA}
    signature: dict[str, str | tuple[str, ...]] = {}
    aligned = {}
    for index, argument in enumerate(kernel.arg_names):
        kind = types.get(argument, POINTERS.get(argument, "i32"))
        layered = argument in LAYERED.get(kernel.fn.__name__, ())
        kinds = (kind,) * (3 if name.endswith("3 layers") else 1)
        signature[argument] = kinds if layered else kind
        if argument in constants:
            signature[argument] = "constexpr"
        elif kind.startswith("*"):
            # as at launch, where pointers of tensors are aligned
            places = [(index, l) for l in range(len(kinds))] if layered else [(index,)]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(kernel, signature, constants, aligned)
    # as at launch: only the search through the trellis must not fuse
    options = {"num_warps": warps, "enable_fp_fusion": not name.startswith("trellis")}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target not in NVIDIA:
        text = compiled.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count: (\d+)", text))
        return {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), "spilled": spilled}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    row = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
    }
    if "tile" in name:
        rows_of_a_lane = constants["BAND"] // 32
        row["per weight"] = round(_loop(code) / (32 * rows_of_a_lane), 2)
    return row


def _tool(name: str, *arguments: object) -> str:
    """Run a tool of the triton package and return its output."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [tools / name, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def _loop(code: str) -> int:
    """Return the number of instructions in the longest loop of a disassembled kernel."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            jump = re.search(r"BRA.*?`\((\.L_\w+)\)", line)
            if jump and jump[1] in labels:
                longest = max(longest, count - labels[jump[1]])
    return longest


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", help="kernels by name (default: all)", default=list(variants())
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    print(f"triton {triton.__version__}: registers / bytes spilled / instructions per weight")
    print("| kernel | " + " | ".join(arguments.targets) + " |")
    print("|---|" + "---|" * len(arguments.targets))
    table: dict[str, Any] = {"triton": triton.__version__}
    names = [name for name in variants() if name in arguments.only]
    with ProcessPoolExecutor() as pool:
        rows = pool.map(measure, *zip(*itertools.product(names, arguments.targets), strict=True))
        for name in names:
            table[name] = {target: next(rows) for target in arguments.targets}
            cells = [" / ".join(map(str, row.values())) for row in table[name].values()]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
