"""Speed, memory and rate of the codec on a synthetic layer, against general-purpose compressors.

    python benchmarks/codec_throughput.py --rows 4096 --cols 4096 --bits 3

The codes are normal with log-normal scales of rows (0.3 octave) and columns (0.5 octave).  The
general-purpose compressors get the same codes as int8, row by row, clipped where they do not fit.
Sizes are in bits per code and speeds in million codes per second (best of `--repeat`).  Memory is
the peak allocation beyond the input, as a multiple of the size of the codes as int32.
"""

import argparse
import bz2
import lzma
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import torch

from watersic_hf import codec


def synthetic_codes(rows: int, cols: int, bits: float, seed: int = 0) -> torch.Tensor:
    """Return normal codes of about `bits` bits whose rows and columns differ in scale, A x N."""
    rng = np.random.default_rng(seed)
    col_scale_N = 2.0 ** (bits + 0.5 * rng.standard_normal(cols)) / 4.13
    codes_AN = np.empty((rows, cols), np.int32)
    for row_A in codes_AN:
        row_scale = 2.0 ** (0.3 * rng.standard_normal())
        row_A[:] = np.rint(rng.standard_normal(cols, np.float32) * (row_scale * col_scale_N))
    return torch.from_numpy(codes_AN)


def best_seconds(function: Callable[[], object], repeat: int) -> float:
    """Return the least wall time of several calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak of the memory that a call allocates through Python."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args(argv)

    codes_AN = synthetic_codes(arguments.rows, arguments.cols, arguments.bits)
    count = codes_AN.numel()
    payload = codec.encode(codes_AN)
    if not torch.equal(codec.decode(payload), codes_AN):
        raise SystemExit("the payload does not decode to the codes")
    statistics = codec.code_statistics(codes_AN)
    print(f"{arguments.rows} x {arguments.cols} codes, {torch.get_num_threads()} threads")
    print(f"bits: pooled entropy {statistics.pooled_entropy:.4f}, ", end="")
    print(f"class entropy {statistics.class_entropy:.4f}, ", end="")
    print(f"stored {8 * len(payload) / count:.4f}")
    for name, function in (
        ("encode", lambda: codec.encode(codes_AN)),
        ("decode", lambda: codec.decode(payload)),
        ("verify", lambda: codec.verify(payload)),
        ("payload_bits", lambda: codec.payload_bits(codes_AN)),
    ):
        speed = count / best_seconds(function, arguments.repeat) / 1e6
        # in a run of its own, because tracemalloc slows Python down; includes the result
        memory = peak_bytes(function) / (4 * count)
        print(f"  {name:12} {speed:8.1f} M codes/s   peak memory {memory:.2f} x int32 codes")
    compare_compressors(codes_AN)


def compare_compressors(codes_AN: torch.Tensor) -> None:
    """Print size and speed of general-purpose compressors on the first codes."""
    raw = codes_AN.clamp(-128, 127).to(torch.int8).numpy().tobytes()
    compressors = {
        "zlib -1": (lambda data: zlib.compress(data, 1), zlib.decompress),
        "zlib -6": (lambda data: zlib.compress(data, 6), zlib.decompress),
        "bz2 -9": (bz2.compress, bz2.decompress),
        "lzma -0": (lambda data: lzma.compress(data, preset=0), lzma.decompress),
    }
    sample = raw[: 1 << 22]
    print(f"general-purpose compressors on the first {len(sample)} codes as int8")
    for name, (compress, decompress) in compressors.items():
        packed = compress(sample)
        speeds = [
            len(sample) / best_seconds(run, 1) / 1e6
            for run in (
                lambda compress=compress: compress(sample),
                lambda decompress=decompress, packed=packed: decompress(packed),
            )
        ]
        bits = 8 * len(packed) / len(sample)
        print(f"  {name:8} {bits:.4f} bits, {speeds[0]:6.1f} in, {speeds[1]:6.1f} out M codes/s")


if __name__ == "__main__":
    main()
