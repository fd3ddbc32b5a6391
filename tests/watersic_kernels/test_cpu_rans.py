import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec import compiled
from watersic_hf.codec.trellis import quantizers, value_of

pytest.importorskip("numba")
ROOT = Path(__file__).parents[2]


def matrix(rows, cols, *, path_rows=None, scale=3.0):
    rng = np.random.default_rng(rows * cols)
    deviation_AN = scale * 2.0 ** (rng.normal(0, 1, (rows, 1)) + rng.normal(0, 1, cols))
    codes_AN = np.rint(deviation_AN * rng.standard_normal((rows, cols))).astype(np.int32)
    codes_AN[rng.random((rows, cols)) < 0.01] *= 500
    if path_rows is None:
        return torch.from_numpy(codes_AN), None
    values_AN = value_of(codes_AN, quantizers(codes_AN, path_rows))
    return torch.from_numpy(values_AN), codec.Path(torch.zeros(rows, dtype=torch.int64), path_rows)


@pytest.mark.parametrize("path_rows", [None, 100])
@pytest.mark.parametrize("scale", [0.3, 3.0, 3000.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 400), (300, 90), (70, 2500), (900, 33)])
def test_bytes_and_codes_are_those_of_numpy(shape, scale, path_rows, monkeypatch):
    codes_AN, path = matrix(*shape, path_rows=path_rows, scale=scale)
    payload = codec.encode(codes_AN, path=path)
    bits = codec.payload_bits(codes_AN, path=path)
    assert torch.equal(codec.decode(payload), codes_AN)

    monkeypatch.setattr(compiled, "_loader", None)

    assert torch.equal(codec.encode(codes_AN, path=path), payload)
    assert torch.equal(codec.decode(payload), codes_AN)
    assert codec.payload_bits(codes_AN, path=path) == bits


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bytes(threads, monkeypatch):
    codes_AN, _ = matrix(600, 500)
    expected = codec.encode(codes_AN)
    monkeypatch.setattr(compiled, "ALONE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(codec.encode(codes_AN), expected)
        assert torch.equal(codec.decode(expected), codes_AN)
    finally:
        torch.set_num_threads(before)


#: Random words and random heads under numba's bounds checks: nothing outside the arrays is touched.
#: Vector code has no such checks, so what lies around the arrays is changed, too.
FUZZ = """
import numpy as np
from watersic_kernels.cpu import rans

rng = np.random.default_rng(0)
for trial in range(300):
    rows, columns, keys = rng.integers(1, 70), rng.integers(1, 80 if trial % 4 == 0 else 9), 4
    per_lane = rng.integers(-(-rows // 32), rows + 1)
    lanes = -(-rows // per_lane)
    words = rng.integers(0, 1 << 16, 2 * lanes + rng.integers(0, 40)).astype(np.uint16)
    words = np.concatenate([words, words[-1:].repeat(rans.LANES)])
    pages = rng.integers(0, 1 << 32, 2 * 4096).astype(np.uint32)
    page_K = 4096 * rng.integers(0, 2, keys)
    shift_K = rng.integers(0, 17, keys).astype(np.uint8) * np.uint8(trial % 2)
    trellis = trial % 3 == 0
    rows_A = rng.integers(0, 2, rows)
    cols_N = rng.integers(0, 2, columns)
    width = max(20, columns)
    place_N = rng.integers(-9, 20, columns) if trial % 8 else np.arange(columns)
    found = []
    for around in range(2):
        arrays = []
        for array in (words, page_K, pages, shift_K, rows_A, cols_N, place_N):
            wide = rng.integers(0, 99, len(array) + 128).astype(array.dtype)
            wide[64:-64] = array
            arrays.append(wide[64:-64])
        guarded = np.full((width + 2, 80) if trellis else (82, width), 12345, np.int32)
        out = guarded[1:-1]
        ends = rans.decode_chunk(
            *arrays[:4], 0, *arrays[4:6], per_lane, 1 + trial % 2, trellis, trial % 11, arrays[6],
            out.reshape(-1), out.shape[1],
        )
        found.append((ends, out.tobytes()))
        inside = (out.T if trellis else out)[trial % 11 : trial % 11 + rows]
        for place in place_N:
            if 0 <= place < width:
                inside[:, place] = 12345
        assert (guarded == 12345).all()
    assert found[0] == found[1]
print("done")
"""


#: Encodes, counts and adds up codes in the middle of other numbers, under numba's bounds checks.
NEIGHBOURS = """
import numpy as np
from watersic_kernels.cpu import codec

rng = np.random.default_rng(0)
for trial in range(60):
    rows, columns, keys = rng.integers(1, 70), rng.integers(1, 80), 4
    given = np.rint(rng.standard_normal(rows * columns) * 10.0 ** (trial % 6)).astype(np.int32)
    quantizers = rng.integers(0, 2, rows * columns).astype(np.uint8)
    trellis = trial % 3 == 0
    entries = rng.integers(1, 1 << 11, 256 * keys) + (rng.integers(0, 2, 256 * keys) << 24)
    entries = entries.astype(np.uint32)
    shift_K = rng.integers(0, 17, keys).astype(np.uint8) * np.uint8(trial % 2)
    classes = [rng.integers(0, 2, count).astype(np.int32) for count in (rows, columns)]
    padded = np.append(classes[1], np.zeros(-columns % 8, np.int32))
    stored_rows, stored_columns = (columns, rows) if trellis else (rows, columns)
    stored = classes[::-1] if trellis else classes
    stored_padded = np.append(stored[1], np.zeros(-len(stored[1]) % 8, np.int32))
    per_lane = rng.integers(-(-stored_rows // 32), stored_rows + 1)
    bounds = np.full(len(padded), 100, np.uint32)
    found = []
    for around in range(2):
        wide = rng.integers(-99, 99, len(given) + 128).astype(np.int32)
        wide[64:-64] = given
        codes = wide[64:-64]
        wide = rng.integers(0, 99, len(given) + 128).astype(np.uint8)
        wide[64:-64] = quantizers
        size = 72 + 4 * len(codes)
        guarded = np.full(size + 128, 12345, np.uint16)
        out = guarded[64:-64]
        start, escaped = codec.encode_chunk(
            codes, wide[64:-64], trellis, columns, 0, 0, entries, shift_K, 0,
            stored[0], stored_padded, stored_columns, per_lane, 2, out,
        )
        assert (guarded[:64] == 12345).all() and (guarded[-64:] == 12345).all()
        sums, totals = np.zeros(len(padded), np.int64), np.zeros(rows, np.int64)
        counts = np.zeros(2 * 256 * keys, np.uint32)
        codec.add_columns(codes, bounds, columns, 0, rows, 1, sums)
        codec.sum_rows(codes, bounds, bounds, columns, 0, rows, totals)
        codec.count_symbols(
            codes, wide[64:-64], trellis, shift_K, 0, classes[0], padded, columns, 0, rows, counts
        )
        assert counts.sum() == rows * columns
        parts = out[start:], out[:escaped], sums[:columns], totals, counts
        found.append([part.tobytes() for part in parts])
    assert found[0] == found[1]
print("done")
"""


def run(code, **variables):
    environment = os.environ | variables
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("code", [FUZZ, NEIGHBOURS], ids=["decode", "encode"])
def test_nothing_outside_the_arrays_is_touched(code, tmp_path):
    done = run(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))

    assert done.stdout.strip() == "done", done.stderr


#: Encodes and decodes with vector code for another CPU.
OTHER_CPU = """
from pathlib import Path
import torch
from watersic_hf import codec

folder = Path(sys.argv[1])
for name, path_rows in (("scalar", None), ("trellis", 100)):
    codes_AN, payload = torch.load(folder / name)
    path = None
    if path_rows is not None:
        path = codec.Path(torch.zeros(len(codes_AN), dtype=torch.int64), path_rows)
    assert torch.equal(codec.encode(codes_AN, path=path), payload)
    assert torch.equal(codec.decode(payload), codes_AN)
print("done")
"""


@pytest.mark.slow
def test_a_cpu_without_extensions_gives_the_same_bytes(tmp_path):
    for name, path_rows in (("scalar", None), ("trellis", 100)):
        codes_AN, path = matrix(300, 90, path_rows=path_rows, scale=5.0)
        torch.save((codes_AN, codec.encode(codes_AN, path=path)), tmp_path / name)

    code = OTHER_CPU.replace("sys.argv[1]", repr(str(tmp_path)))
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = run(code, **generic, NUMBA_CACHE_DIR=str(tmp_path / "cache"))

    assert done.stdout.strip() == "done", done.stderr


def test_without_numba_the_codec_uses_numpy_and_says_so():
    code = """
import sys
sys.modules["numba"] = None
import torch
from watersic_hf import codec
codes = torch.arange(600).reshape(20, 30)
assert torch.equal(codec.decode(codec.encode(codes)), codes.int())
"""
    done = run(code)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("numba cannot be imported") == 1
