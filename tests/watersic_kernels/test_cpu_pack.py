import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from watersic_hf.nn import packing
from watersic_hf.testing import trellis_values, uneven_codes

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]

#: Rows, columns, and rows of a path; it is the only one if it has as many as the weight.
SHAPES = [
    (1, 1, 1),
    (70, 65, 70),
    (200, 300, 64),
    (300, 700, 128),
    (150, 64, 150),
    (2100, 96, 1024),
]


def packed_by_torch(codes_AN, path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packing, "cpu_kernels", lambda: None)
        return packing.pack_codes(codes_AN, path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_tensors_are_those_that_torch_packs(shape, spread, trellis, dtype, monkeypatch):
    rows, columns, path_rows = shape
    codes_AN, path = uneven_codes(rows, columns, spread=spread), None
    if trellis:
        codes_AN, path = trellis_values(rows, columns, path_rows=path_rows, spread=spread)
    codes_AN = codes_AN.to(dtype)

    found = packing.pack_codes(codes_AN, path).tensors()

    expected = packed_by_torch(codes_AN, path, monkeypatch).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("largest", [2**31 - 1, -(2**31)])
def test_the_largest_integers_are_packed(largest, monkeypatch):
    codes_AN = torch.zeros(3, 40, dtype=torch.int32)
    codes_AN[1, 5] = largest

    found = packing.pack_codes(codes_AN)

    ((rows, restored_AN),) = packing.unpack_bands(found)
    assert torch.equal(restored_AN[rows.argsort()], codes_AN)


def test_threads_do_not_change_the_tensors():
    values_AN, path = trellis_values(700, 90, path_rows=128)
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(packing.pack_codes(values_AN, path).tensors())
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_nothing_outside_the_arrays_is_touched(tmp_path):
    code = """
from watersic_hf.nn.packing import pack_codes
from watersic_hf.testing import trellis_values, uneven_codes

for rows, columns, path_rows in ((1, 1, 1), (70, 65, 70), (200, 300, 64)):
    pack_codes(uneven_codes(rows, columns, spread=3.0))
    pack_codes(*trellis_values(rows, columns, path_rows=path_rows, spread=3.0))
print("done")
"""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    settings = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings
    )

    assert done.stdout.strip() == "done", done.stderr
