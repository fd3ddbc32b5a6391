"""Time products with compressed weights against torch's bfloat16 product, on a CUDA device.

    python benchmarks/kernels_speed.py [--layers llama-8b ...] [--tokens 1 8 ...] [--json FILE]

Every product is compared with that of the dense weight before it is timed; if they differ, its row
says so and has no times.  Times in a CUDA graph are over copies of the weight that no cache can
hold.  `copy` is the bandwidth at which the weight was read, as a fraction of the device's
copy bandwidth, which is measured in the same run.  bitsandbytes (NF4), torchao, GemLite and
GPTQModel's Marlin (4 bits) are also timed where they can be imported.  ``--dry-run``
runs a small layer on any machine, without times (on a CPU with TRITON_INTERPRET=1).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.codec import Path as TrellisPath
from watersic_hf.codec.trellis import quantizers, value_of
from watersic_hf.nn import ops
from watersic_hf.nn.bands import scale_codes
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.nn.tiles import TiledCodes
from watersic_hf.testing import assert_close

#: Rows and columns of the linear layers of models; layers that share an input count as one.
LAYERS = {
    "first": {"down": (4096, 14336), "square": (8192, 8192), "o": (4096, 4096)},
    "llama-1b": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "llama-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "qwen3-8b": {"qkv": (6144, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "70b": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
    "small": {"small": (192, 320)},
}

#: Rows of a path of the trellis.
PATH_ROWS = 1024

#: Weights that share a scale in the other packages.
GROUP = 128

TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
#: Most tokens of products that are also timed in a graph.
GRAPH_TOKENS = 64
COLUMNS = (
    *("layer", "M", "form", "bits held", "us", "bf16 us", "times bf16"),
    *("graph us", "graph bf16 us", "graph times bf16", "copy"),
)
#: Bytes that rotating copies of a weight take together, more than any cache.
ROTATING_BYTES = 256 << 20


def codes_of(rows: int, columns: int, bits: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes of about `bits` bits, rows and columns of different scales, and the scales."""
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
    return codes_AN.round_().short(), row_scale_A, col_scale_N


@dataclass(frozen=True)
class Product:
    """A product with a weight in some form, `run(x_MN, *tensors)`."""

    run: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    nbytes: int
    """Bytes that the weight takes."""
    tolerance: float
    """Relative error that is accepted."""
    weight_AN: Tensor
    """The dense weight, bfloat16."""


def on_a_path(codes_AN: Tensor, path_rows: int) -> tuple[Tensor, TrellisPath]:
    """Return the values of a trellis with these codes, and their path: by the size of the rows."""
    size_A = codes_AN.float().square().mean(1).clamp(min=1e-3)
    path = TrellisPath((8 * size_A.log2() / 2).round().long(), path_rows)
    ordered_AN = codes_AN[path.order_A].int().numpy()
    values_AN = torch.empty(codes_AN.shape, dtype=torch.int32)
    found_AN = value_of(ordered_AN, quantizers(ordered_AN, path_rows))
    values_AN[path.order_A] = torch.from_numpy(found_AN)
    return values_AN, path


def ours(residency: str, coded: TiledCodes, trellis: bool) -> Callable[..., Tensor]:
    """Return the product with our kernel; the operator would run the reference on a CPU."""
    from watersic_kernels import packed, prefix

    if residency == "packed":
        return lambda x_MN, *tensors: packed.packed_linear(x_MN, tensors[:-2], *tensors[-2:])
    device = coded.words_G.device
    tables_TW = prefix_tables(device, trellis).entries_TW
    return lambda x_MN, *tensors: prefix.prefix_linear(
        x_MN, tensors[:-2], *tensors[-2:], tables_TW=tables_TW
    )


def bitsandbytes(weight_AN: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    A, N = weight_AN.shape
    layer = Linear4bit(N, A, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight_AN.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight_AN.device)


def torchao(weight_AN: Tensor) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    A, N = weight_AN.shape
    layer = nn.Linear(N, A, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_AN.clone(), requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP))
    return layer


def gemlite(weight_AN: Tensor) -> Callable[[Tensor], Tensor]:
    from gemlite.helper import A16W4_HQQ_INT

    groups = weight_AN.float().view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low).clamp(min=1e-8) / 15
    codes_AN = ((groups - low) / scale).round().to(torch.uint8).view_as(weight_AN)
    layer = A16W4_HQQ_INT(device=str(weight_AN.device), dtype=weight_AN.dtype)
    return layer.from_weights(
        codes_AN, scale.to(weight_AN.dtype), (-low / scale).to(weight_AN.dtype)
    )


def marlin(weight_AN: Tensor) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    A, N = weight_AN.shape
    layer = MarlinLinear(
        bits=4,
        group_size=GROUP,
        desc_act=False,
        sym=True,
        in_features=N,
        out_features=A,
        dtype=weight_AN.dtype,
    ).to(weight_AN.device)
    # the time does not depend on the codes
    layer.qweight.data.random_(-(2**31), 2**31)
    layer.scales.data.fill_(0.01)
    layer.post_init()
    return layer


#: Products of other packages: functions from a dense weight to a product.
OTHERS = {
    "bitsandbytes NF4": bitsandbytes,
    "torchao int4": torchao,
    "GemLite 4 bits": gemlite,
    "Marlin 4 bits": marlin,
}


def keep_rows(file: str | None, rows: Sequence[dict]) -> None:
    """Write the rows so far to a file, if there is one: a run that is stopped keeps them."""
    if file is not None:
        Path(file).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time, with caches flushed between runs."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=100, return_mode="median")


def copy_bandwidth() -> float:
    """Return the bytes per millisecond that a large copy reads and writes, at full clocks."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start = time.monotonic()
    while time.monotonic() < start + 1:
        target.copy_(source)
        torch.cuda.synchronize()
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def graph_microseconds(product: Product, x_MN: Tensor) -> float:
    """Return the time of one product in a CUDA graph, over copies that no cache can hold."""
    count = max(2, ROTATING_BYTES // product.nbytes)
    copies = [[tensor.clone() for tensor in product.tensors] for _ in range(count)]
    product.run(x_MN, *copies[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in copies:
            product.run(x_MN, *tensors)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / (10 * count)


def forms(
    shape: tuple[int, int], bits: float, device: str, others: bool
) -> Iterator[tuple[str, Product]]:
    """Yield the products with a layer in every form, by name.

    The other packages round the weight themselves, so their errors are not checked.
    """
    codes_AN, *scales = codes_of(*shape, bits, device)
    values_AN, path = on_a_path(codes_AN.cpu(), PATH_ROWS)
    for lattice, given_AN, its_path in (
        ("", codes_AN, None),
        (", trellis", values_AN.to(device), path),
    ):
        weight_AN = scale_codes(given_AN, *scales, torch.bfloat16)
        for residency in ops.LAYOUTS:
            coded = ops.encode(given_AN, residency, its_path)
            run = ours(residency, coded, its_path is not None)
            tensors = [*coded.tensors().values(), *scales]
            yield f"{residency}{lattice}", Product(run, tensors, coded.nbytes, 1e-2, weight_AN)
    weight_AN = scale_codes(codes_AN, *scales, torch.bfloat16)
    for name, make in OTHERS.items() if others else ():
        try:
            # 4.5 bits per weight, with everything that a group adds
            nbytes = weight_AN.numel() * 9 // 16
            yield name, Product(make(weight_AN), (), nbytes, float("inf"), weight_AN)
        except Exception as error:
            print(f"{name}: not timed, {type(error).__name__}: {error}".splitlines()[0])


def measure(product: Product, tokens: int, copied: float | None) -> dict:
    """Return the row of one form.

    Args:
        product: the product.
        tokens: rows of the input.
        copied: the device's copy bandwidth in bytes per millisecond; None takes no times.
    """
    weight_AN = product.weight_AN
    # Triton's interpreter has no bfloat16 products
    dtype = torch.bfloat16 if weight_AN.is_cuda else torch.float32
    x_MN = torch.randn(tokens, weight_AN.shape[1], device=weight_AN.device).to(dtype)
    row = {"bits held": round(8 * product.nbytes / weight_AN.numel(), 2)}
    try:
        y_MA = product.run(x_MN, *product.tensors)
        assert_close(y_MA, x_MN @ weight_AN.to(dtype).T, tolerance=product.tolerance)
    except AssertionError as error:
        return row | {"us": f"WRONG: {error}"}
    if copied is None:
        return row | {"us": "right, not timed"}
    ours_ms = milliseconds(lambda: product.run(x_MN, *product.tensors))
    dense_ms = milliseconds(lambda: F.linear(x_MN, weight_AN))
    row |= {"us": round(1e3 * ours_ms, 1), "bf16 us": round(1e3 * dense_ms, 1)}
    row["times bf16"] = round(dense_ms / ours_ms, 2)
    if product.tensors and tokens <= GRAPH_TOKENS:
        dense = Product(F.linear, [weight_AN], weight_AN.nbytes, 0.0, weight_AN)
        ours_us, dense_us = (graph_microseconds(this, x_MN) for this in (product, dense))
        row |= {"graph us": round(ours_us, 1), "graph bf16 us": round(dense_us, 1)}
        row["graph times bf16"] = round(dense_us / ours_us, 2)
    return row | {
        "copy": round(product.nbytes / ours_ms / copied, 2),
    }


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [model for model in LAYERS if model != "small"]
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=models)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.dry_run:
        parser.error("no CUDA device was found; --dry-run checks the kernels without times")
    if arguments.dry_run:
        arguments.layers = ["small"]
    copied = None if arguments.dry_run else copy_bandwidth()
    if copied is not None:
        device_name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        print(f"{device_name}, copy {copied / 1e9:.2f} TB/s")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    rows = []
    for model in arguments.layers:
        for name, shape in LAYERS[model].items():
            for form, product in forms(shape, arguments.bits, device, not arguments.dry_run):
                for tokens in arguments.tokens:
                    row = {"layer": f"{model} {name} {shape[0]} x {shape[1]}", "M": tokens}
                    rows.append(row | {"form": form} | measure(product, tokens, copied))
                    cells = (str(rows[-1].get(column, "")) for column in COLUMNS)
                    print("| " + " | ".join(cells) + " |", flush=True)
                    keep_rows(arguments.json, rows)
    return rows


if __name__ == "__main__":
    main()
