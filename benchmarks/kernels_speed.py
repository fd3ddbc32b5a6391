"""Time of one product with packed weights against torch's bfloat16 product, on a CUDA device.

    python benchmarks/kernels_speed.py [--layers llama-8b ...] [--tokens 1 8 ...] [--json FILE]

A layer is timed only after its output was compared with that of its dense weight.  `copy` is the
share of the device's own copy bandwidth, measured in the same run, at which the weight was read.
``--dry-run`` runs a small layer on any machine, without times (on a CPU with TRITON_INTERPRET=1).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from watersic_hf.nn import ops
from watersic_hf.nn.packing import PackedCodes, pack_codes
from watersic_hf.testing import assert_close

#: Rows and columns of the linear layers of models, those that share an input as one.
LAYERS = {
    "llama-1b": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "llama-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096),
                 "down": (4096, 14336)},
    "qwen3-8b": {"qkv": (6144, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192),
            "down": (8192, 28672)},
    "small": {"small": (192, 320)},
}  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)


def layer(rows: int, columns: int, bits: float, device: str) -> tuple[PackedCodes, Tensor, Tensor]:
    """Codes of about so many bits, rows and columns of different scales, packed; and scales."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # a normal code of standard deviation s has log2(s) + 2.05 bits
    spread_A, spread_N = 0.3 * normal(rows, 1), 0.5 * normal(columns)
    codes_AN = (
        normal(rows, columns).mul_(torch.exp2(bits - 2.05 + spread_A)).mul_(torch.exp2(spread_N))
    )
    row_scale_A = (1 + 0.1 * normal(rows)).half()
    col_scale_N = (0.01 * torch.exp2(-spread_N)).half()
    return pack_codes(codes_AN.round_().short()), row_scale_A, col_scale_N


def dense(packed: PackedCodes, row_scale_A: Tensor, col_scale_N: Tensor) -> Tensor:
    weight_AN = row_scale_A.new_empty(packed.rows, packed.columns, dtype=torch.bfloat16)
    layout = list(packed.tensors().values())
    scales = row_scale_A, col_scale_N
    for rows, weight_rN in ops.coded_bands("packed", layout, *scales, torch.bfloat16):
        weight_AN[rows] = weight_rN
    return weight_AN


def milliseconds(run: Callable[[], object]) -> float:
    """Median time, with caches flushed between runs."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=100, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per millisecond that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["llama-8b", "70b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.dry_run:
        parser.error("there is no CUDA device; --dry-run checks the kernels without times")
    if arguments.dry_run:
        arguments.layers = ["small"]
    copied = None if arguments.dry_run else copy_bandwidth()
    if copied is not None:
        device_name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        print(f"{device_name}, copy {copied / 1e9:.2f} TB/s")
    columns = ["layer", "M", "bits held", "packed us", "bf16 us", "times bf16", "copy"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    rows = []
    for model in arguments.layers:
        for name, shape in LAYERS[model].items():
            packed, *scales = layer(*shape, arguments.bits, device)
            weight_AN = dense(packed, *scales)
            for tokens in arguments.tokens:
                row = measure(packed, scales, weight_AN, tokens, copied)
                row = {"layer": f"{model} {name} {shape[0]} x {shape[1]}", "M": tokens} | row
                rows.append(row)
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def measure(
    packed: PackedCodes,
    scales: Sequence[Tensor],
    weight_AN: Tensor,
    tokens: int,
    copied: float | None,
) -> dict:
    from watersic_kernels.packed import packed_linear

    # Triton's interpreter has no bfloat16 products
    dtype = torch.bfloat16 if weight_AN.is_cuda else torch.float32
    x_MN = torch.randn(tokens, packed.columns, device=weight_AN.device).to(dtype)
    arguments = (x_MN, *packed.tensors().values(), *scales)
    assert_close(packed_linear(*arguments), x_MN @ weight_AN.to(dtype).T, tolerance=1e-2)
    row = {"bits held": round(8 * packed.nbytes / weight_AN.numel(), 2)}
    if copied is None:
        return row
    ours = milliseconds(lambda: packed_linear(*arguments))
    theirs = milliseconds(lambda: F.linear(x_MN, weight_AN))
    return row | {
        "packed us": round(1e3 * ours, 1),
        "bf16 us": round(1e3 * theirs, 1),
        "times bf16": round(theirs / ours, 2),
        "copy": round(packed.nbytes / ours / copied, 2),
    }


if __name__ == "__main__":
    main()
