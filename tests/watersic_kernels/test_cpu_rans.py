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
FUZZ = """
import numpy as np
from watersic_kernels.cpu import rans

rng = np.random.default_rng(0)
for trial in range(300):
    rows, columns, keys = rng.integers(1, 70), rng.integers(1, 9), 4
    per_lane = rng.integers(-(-rows // 32), rows + 1)
    lanes = -(-rows // per_lane)
    words = rng.integers(0, 1 << 16, 2 * lanes + rng.integers(0, 40)).astype(np.uint16)
    pages = rng.integers(0, 1 << 32, 2 * 4096).astype(np.uint32)
    page_K = 4096 * rng.integers(0, 2, keys)
    shift_K = rng.integers(0, 17, keys).astype(np.uint8) * np.uint8(trial % 2)
    trellis = trial % 3 == 0
    rows_A = rng.integers(0, 2, rows)
    cols_N = rng.integers(0, 2, columns)
    place_N = rng.integers(-9, 20, columns)
    guarded = np.full((22, 80) if trellis else (82, 20), 12345, np.int32)
    out = guarded[1:-1]
    words = np.concatenate([words, words[-1:].repeat(rans.LANES)])
    rans.decode_chunk(
        words, page_K, pages, shift_K, 0, rows_A, cols_N, per_lane, 1 + trial % 2, trellis,
        trial % 11, place_N, out,
    )
    inside = (out.T if trellis else out)[trial % 11 : trial % 11 + rows]
    for place in place_N:
        if 0 <= place < 20:
            inside[:, place] = 12345
    assert (guarded == 12345).all()
print("done")
"""


def test_random_words_touch_nothing_outside_the_arrays(tmp_path):
    environment = os.environ | {
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }

    done = subprocess.run(
        [sys.executable, "-c", FUZZ], env=environment, capture_output=True, text=True
    )

    assert done.stdout.strip() == "done", done.stderr


#: Encodes and decodes matrices on a CPU without vector instructions beyond the most common ones.
GENERIC = """
import sys
import torch
from watersic_hf import codec

for file in sys.argv[1:]:
    given = torch.load(file, weights_only=False)
    assert torch.equal(codec.encode(given["codes"], path=given["path"]), given["payload"])
    assert torch.equal(codec.decode(given["payload"]), given["codes"])
print("done")
"""


def test_bytes_do_not_depend_on_the_instructions_of_the_cpu(tmp_path):
    files = []
    for path_rows in (None, 100):
        codes_AN, path = matrix(300, 90, path_rows=path_rows)
        given = {"codes": codes_AN, "path": path, "payload": codec.encode(codes_AN, path=path)}
        files.append(str(tmp_path / f"{path_rows}.pt"))
        torch.save(given, files[-1])
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }

    done = subprocess.run(
        [sys.executable, "-c", GENERIC, *files], env=environment, capture_output=True, text=True
    )

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
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("numba cannot be imported") == 1
