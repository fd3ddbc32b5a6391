import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from watersic_hf.nn import backends, ops
from watersic_hf.nn.packing import pack_codes
from watersic_hf.testing import assert_close, trellis_values, uneven_codes

pytest.importorskip("numba")
import numba

from watersic_kernels.cpu import product, threads, vectors
from watersic_kernels.cpu.packed import packed_linear

ROOT = Path(__file__).parents[2]

#: By dtype of the activations: 1e-6 is for the sums in float32, the other one rounding of y.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def layer(rows, columns, *, trellis, spread=1.5, path_rows=None):
    """Codes or values of many widths with outliers, some columns empty: packed, and scales."""
    if trellis:
        path_rows = path_rows or rows
        codes_AN, path = trellis_values(rows, columns, path_rows=path_rows, spread=spread)
    else:
        codes_AN, path = uneven_codes(rows, columns, spread=spread), None
    generator = torch.Generator().manual_seed(rows)
    row_scale_A = (torch.rand(rows, generator=generator) + 0.5).half()
    col_scale_N = (torch.rand(columns, generator=generator) * 0.01).half()
    return pack_codes(codes_AN, path), codes_AN, row_scale_A, col_scale_N


def run(x, packed, *scales):
    return packed_linear(x, [*packed.tensors().values()], *scales)


def expected(x, codes_AN, row_scale_A, col_scale_N):
    return x.double() @ (row_scale_A[:, None].double() * codes_AN * col_scale_N.double()).T


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (127, 31), (128, 64), (300, 127)])
def test_product_for_ragged_sizes_and_all_token_counts(shape, trellis, dtype):
    packed, *weight = layer(*shape, trellis=trellis)

    for tokens in (*range(1, 10), 40, 70):
        x = torch.randn(tokens, shape[1]).to(dtype)

        y = run(x, packed, *weight[1:])

        assert y.dtype == dtype
        assert_close(y, expected(x, *weight), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 40, 70])
@pytest.mark.parametrize("trellis", [False, True])
def test_product_with_tiles_of_every_width(trellis, tokens):
    packed, *weight = layer(300, 700, trellis=trellis, spread=4.0)
    assert set((packed.tiles_BT & 15).flatten().tolist()) >= set(range(2, 9 - trellis))
    x = torch.randn(tokens, 700)

    assert_close(run(x, packed, *weight[1:]), expected(x, *weight), tolerance=1e-6)


def test_product_with_several_paths():
    packed, *weight = layer(500, 70, trellis=True, path_rows=128)
    x = torch.randn(3, 70)

    assert_close(run(x, packed, *weight[1:]), expected(x, *weight), tolerance=1e-6)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_strided_input_and_no_tokens(tokens):
    packed, *weight = layer(70, 65, trellis=True)
    x = torch.randn(65, tokens).T

    assert_close(run(x, packed, *weight[1:]), expected(x, *weight), tolerance=1e-6)

    assert run(x[:0], packed, *weight[1:]).shape == (0, 70)


@pytest.mark.parametrize("parts", [1, 2])
def test_tokens_are_rounded_relative_to_the_largest_column_of_a_tile(parts):
    # one column of the third tile is far larger than all others, and the fifth tile is zero
    x_MC = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    x_MC[:, 70], x_MC[:, 128:160] = 1e6, 0

    pairs_TVP, sum_TV, scale_TV, fixed_MC, unit_MK = product._integers(x_MC, parts)

    low, high = pairs_TVP.astype(np.int16), pairs_TVP >> 16
    columns = np.concatenate([low, high], 2)
    assert (columns.sum(2) == sum_TV).all()
    values = (columns * scale_TV.astype(np.float64)[..., None]).reshape(8, 3, parts, 32).sum(2)
    error = np.abs(values.transpose(1, 0, 2) - x_MC.reshape(3, 8, 32)).max(2)
    largest = np.abs(x_MC.reshape(3, 8, 32)).max(2)
    # 2^-31 and what a scale in float32 adds
    assert (error <= largest * (2.0**-16 * 1.001 if parts == 1 else 2.0**-24)).all()
    assert np.abs(fixed_MC * unit_MK.repeat(256, 1) - x_MC).max() <= 1e6 * 2.0**-31


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_input_that_is_not_finite_shows_in_the_output(dtype, value):
    packed, *weight = layer(130, 300, trellis=False)
    x = torch.randn(2, 300).to(dtype)
    x[1, 5] = value

    y = run(x, packed, *weight[1:])

    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an instruction of x86")
def test_products_multiply_pairs_of_columns():
    @numba.njit
    def add(pairs, columns, sums):
        vectors.add_rows(pairs, 0, columns, 0, 0, 1.0, sums, 0)

    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 256, (16, 128, 2)).astype(np.int16)
    columns = rng.integers(-32767, 32768, (16, 2)).astype(np.int16)
    sums = np.zeros(8, np.float32)

    add(pairs.view(np.int32).ravel(), columns.view(np.int32).ravel(), sums)

    expected = (pairs[:, :8].astype(np.int64) * columns[:, None]).sum((0, 2))
    assert np.allclose(sums, expected, rtol=1e-6)
    (assembly,) = add.inspect_asm().values()
    assert assembly.count("pmaddwd") >= vectors.PAIRS


@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_threads_do_not_change_the_sums(tokens, monkeypatch):
    packed, *weight = layer(700, 300, trellis=True)
    x = torch.randn(tokens, 300)
    monkeypatch.setattr(product, "ALONE", 0)
    monkeypatch.setattr(product, "SCRATCH_BYTES", 4 * 300 * 300)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(run(x, packed, *weight[1:]))
        finally:
            torch.set_num_threads(before)

    assert_close(found[0], expected(x, *weight), tolerance=1e-6)
    if tokens <= product.FUSED_TOKENS:
        assert torch.equal(*found)


@pytest.mark.parametrize("trellis", [False, True])
def test_the_operator_chooses_the_kernel_and_has_gradients(trellis, monkeypatch):
    packed, *weight = layer(70, 65, trellis=trellis)
    arguments = "packed", [*packed.tensors().values()], *weight[1:]
    called = []
    monkeypatch.setattr(
        backends.cpu_kernels().packed,
        "packed_linear",
        lambda *given: called.append(given) or packed_linear(*given),
    )
    x = torch.randn(2, 3, 65, requires_grad=True)

    y = ops.coded_linear(x, *arguments, "auto")
    y.square().sum().backward()

    assert len(called) == 1
    other = x.detach().clone().requires_grad_()
    reference = ops.coded_linear(other, *arguments, "reference")
    reference.square().sum().backward()
    assert len(called) == 1
    assert_close(y.detach(), reference.detach(), tolerance=1e-6)
    assert_close(x.grad, other.grad, tolerance=1e-6)
    # float64 activations keep the precision of the reference
    ops.coded_linear(x.detach().double(), *arguments, "auto")
    assert len(called) == 1


def in_a_process(code, **variables):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


#: Random tensors of a layout under numba's bounds checks, between guards: nothing outside the
#: arrays is read, and nothing outside the results is written.  What vectors read is not checked by
#: numba: the words end where memory ends.
FUZZ = """
import ctypes
import mmap
import numpy as np
from watersic_kernels.cpu import packed, product
from watersic_kernels.cpu.tiles import GROUP

libc = ctypes.CDLL(None, use_errno=True)
kept = []


def at_the_end_of_memory(array):
    # a copy behind which the next byte cannot be read
    pages = -(-array.nbytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    kept.append(memory)
    whole = np.frombuffer(memory, np.uint8)
    last = ctypes.c_void_p(whole.ctypes.data + len(whole) - mmap.PAGESIZE)
    assert libc.mprotect(last, mmap.PAGESIZE, 0) == 0
    first = len(whole) - mmap.PAGESIZE - array.nbytes
    copy = whole[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


rng = np.random.default_rng(0)
for trial in range(60):
    band, bands = int(rng.choice([64, 128])), int(rng.integers(1, 4))
    tiles = int(rng.integers(1, 12))
    groups, trellis, entries = -(-tiles // 8), trial % 2, int(rng.integers(0, 900))
    words = rng.integers(0, 1 << 32, (int(rng.integers(1, 30)), band)).astype(np.uint32)
    entry = rng.integers(0, len(words), (bands, tiles)) << 4 | rng.integers(0, 16, (bands, tiles))
    wild = rng.random((bands, tiles)) < 0.2
    entry[wild] = rng.integers(-(1 << 31), 1 << 31, wild.sum())
    state = None
    if trellis:
        state = rng.integers(-(1 << 31), 1 << 31, (bands, tiles, 3)).astype(np.int32)
    outliers = rng.integers(-(1 << 15), 1 << 15, entries).astype(np.int16)
    first = rng.integers(-5, 1000, (bands, groups)).astype(np.int32)
    limit = 1 << (31 if trial % 3 == 0 else 3)
    count = rng.integers(-limit, limit, (bands, groups, band)).astype(np.int32)
    words, outliers = at_the_end_of_memory(words), at_the_end_of_memory(outliers)
    tokens = trial % 4
    x = rng.standard_normal((tokens, groups * GROUP)).astype(np.float32)
    x = product._integers(x, 1 + trial % 2)
    rows = tokens or 32 * tiles
    found = []
    for poison in (0x7F, 0xFF):
        # memory that the kernel may get as scratch memory
        garbage = [np.full(size, poison, np.uint8) for size in (8192, 512, 1 << 20)]
        del garbage
        guarded = np.zeros((rows + 2, bands * band), np.float32)
        out = guarded[1:-1]
        packed._run(
            words, entry.astype(np.int32), state, outliers, first, count, x, 0, bands, 0, out
        )
        assert (guarded[0] == 0).all() and (guarded[-1] == 0).all()
        assert np.isfinite(out).all()
        found.append(out)
    assert (found[0] == found[1]).all()
print("done")
"""


def test_random_layouts_touch_nothing_outside_the_arrays(tmp_path):
    done = in_a_process(FUZZ, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))

    assert done.stdout.strip() == "done", done.stderr


FORK = """
import os
import torch
from watersic_hf.nn.packing import pack_codes
from watersic_hf.testing import uneven_codes
from watersic_kernels.cpu import product
from watersic_kernels.cpu.packed import packed_linear

torch.set_num_threads(2)
product.ALONE = 0
codes_AN = uneven_codes(500, 64)
layout = [*pack_codes(codes_AN).tensors().values()]
arguments = torch.ones(1, 64), layout, torch.ones(500), torch.ones(64)
expected = packed_linear(*arguments)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(packed_linear(*arguments), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_multiplies():
    assert in_a_process(FORK).stdout.strip() == "done"


@pytest.mark.parametrize("openmp", [True, False])
def test_work_runs_on_all_threads_and_its_errors_arrive(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(threads, "_parallel", None)
    meeting = threading.Barrier(2, timeout=60)

    threads.on_threads(meeting.wait, 2)

    def fail() -> None:
        if meeting.wait():
            raise ValueError("of one thread")

    with pytest.raises(ValueError, match="of one thread"):
        threads.on_threads(fail, 2)


def test_an_order_that_names_no_column_is_refused():
    codes_AN = uneven_codes(40, 30)
    *layout, order_C, entries_O, first_BK, count_BKr = pack_codes(codes_AN).tensors().values()
    order_C = order_C.clone()
    order_C[3] = 30

    with pytest.raises(IndexError, match="order of the columns"):
        packed_linear(
            torch.ones(1, 30),
            [*layout, order_C, entries_O, first_BK, count_BKr],
            torch.ones(40),
            torch.ones(30),
        )


def test_without_numba_the_reference_is_used_and_says_so():
    code = """
import sys
import threading
sys.modules["numba"] = None
import torch
from watersic_hf.nn import ops
from watersic_hf.testing import uneven_codes
codes_AN = uneven_codes(40, 30)
layer = [*ops.encode(codes_AN, "packed").tensors().values()], torch.ones(40), torch.ones(30)
for _ in range(2):
    y = ops.coded_linear(torch.ones(1, 30), "packed", *layer, "auto")
assert torch.allclose(y, codes_AN.sum(1).float())
"""

    done = in_a_process(code)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("numba cannot be imported") == 1
