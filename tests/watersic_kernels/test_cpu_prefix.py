import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from watersic_hf.nn import ops
from watersic_hf.nn.prefix import MAX_SHIFT, PADDING, TABLE_BITS, encode_codes
from watersic_hf.nn.prefix_tables import WINDOW, prefix_tables
from watersic_hf.testing import assert_close, trellis_values, uneven_codes

pytest.importorskip("numba")
from watersic_kernels.cpu import prefix, product

ROOT = Path(__file__).parents[2]

#: By dtype of the activations: 1e-6 is for the sums in float32, the other one rounding of y.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def layer(rows, columns, *, trellis, spread=1.5):
    """Prefix-coded codes or values, the codes, and scales."""
    codes_AN, path = uneven_codes(rows, columns, spread=spread), None
    if trellis:
        codes_AN, path = trellis_values(rows, columns, path_rows=rows, spread=spread)
    generator = torch.Generator().manual_seed(rows)
    row_scale_A = (torch.rand(rows, generator=generator) + 0.5).half()
    col_scale_N = (torch.rand(columns, generator=generator) * 0.01).half()
    return encode_codes(codes_AN, path), codes_AN, row_scale_A, col_scale_N


def run(x, coded, *scales):
    tables_TW = prefix_tables(torch.device("cpu"), coded.trellis).entries_TW
    return prefix.prefix_linear(x, [*coded.tensors().values()], *scales, tables_TW=tables_TW)


def expected(x, codes_AN, row_scale_A, col_scale_N):
    return x.double() @ (row_scale_A[:, None].double() * codes_AN * col_scale_N.double()).T


def test_constants_are_those_of_the_layout():
    layout = WINDOW, MAX_SHIFT, PADDING, TABLE_BITS

    assert layout == (prefix.WINDOW, prefix.MAX_SHIFT, prefix.PADDING, prefix.TABLE_BITS)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (127, 31), (300, 700)])
@pytest.mark.parametrize("spread", [0.0, 1.5, 4.0])
def test_product_for_ragged_sizes(shape, spread, trellis, dtype):
    coded, *weight = layer(*shape, trellis=trellis, spread=spread)

    for tokens in (1, 3, 70):
        x = torch.randn(shape[1], tokens).T.to(dtype)

        y = run(x, coded, *weight[1:])

        assert y.dtype == dtype
        assert_close(y, expected(x, *weight), tolerance=TOLERANCE[dtype])
    assert run(x[:0], coded, *weight[1:]).shape == (0, shape[0])


@pytest.mark.parametrize("trellis", [False, True])
def test_values_of_more_bits_than_fit_into_a_sum(trellis):
    coded, *weight = layer(64, 64, trellis=trellis, spread=7.0)
    assert (coded.tiles_BT >> TABLE_BITS).max() == MAX_SHIFT
    x = torch.randn(2, 64)

    assert_close(run(x, coded, *weight[1:]), expected(x, *weight), tolerance=1e-6)


def test_threads_do_not_change_the_sums(monkeypatch):
    coded, *weight = layer(700, 300, trellis=True)
    x = torch.randn(3, 300)
    monkeypatch.setattr(product, "ALONE", 0)
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found.append(run(x, coded, *weight[1:]))
        finally:
            torch.set_num_threads(before)

    assert torch.equal(*found)


def test_the_operator_uses_it_and_has_gradients():
    coded, codes_AN, *scales = layer(70, 65, trellis=True)
    arguments = "entropy", [*coded.tensors().values()], *scales
    x = torch.randn(2, 65, requires_grad=True)

    y = ops.coded_linear(x, *arguments, "auto")
    y.sum().backward()

    assert torch.equal(y, run(x, coded, *scales))
    weight_AN = scales[0][:, None].double() * codes_AN * scales[1].double()
    assert_close(x.grad, weight_AN.sum(0).expand(2, -1), tolerance=1e-5)


def test_words_without_padding_are_refused():
    coded, _, *scales = layer(64, 32, trellis=False, spread=0.0)
    tensors = [*coded.tensors().values()]
    tensors[0] = tensors[0][:5]

    with pytest.raises(ValueError, match="5 words"):
        prefix.prefix_linear(
            torch.ones(1, 32),
            tensors,
            *scales,
            tables_TW=prefix_tables(torch.device("cpu")).entries_TW,
        )


FUZZ = """
import torch
from watersic_hf.nn.prefix import encode_codes
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.testing import trellis_values, uneven_codes
from watersic_kernels.cpu.prefix import prefix_linear

generator = torch.Generator().manual_seed(0)
for trial in range(40):
    codes_AN, path = uneven_codes(70, 300), None
    if trial % 2:
        codes_AN, path = trellis_values(70, 300, path_rows=70)
    coded = encode_codes(codes_AN, path)
    tensors = coded.tensors()
    for name, tensor in tensors.items():
        if "order" not in name and trial > 1:
            limits = torch.iinfo(tensor.dtype)
            noise = torch.randint(limits.min, limits.max, tensor.shape, generator=generator)
            tensors[name] = noise.to(tensor.dtype)
    tables_TW = prefix_tables(torch.device("cpu"), coded.trellis).entries_TW
    layer = [*tensors.values()], torch.ones(70), torch.ones(300)
    for tokens in (1, 70):
        prefix_linear(torch.ones(tokens, 300), *layer, tables_TW=tables_TW)
print("done")
"""


def test_random_layouts_touch_nothing_outside_the_arrays(tmp_path):
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    settings = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}

    done = subprocess.run(
        [sys.executable, "-c", FUZZ], capture_output=True, text=True, env=os.environ | settings
    )

    assert done.stdout.strip() == "done", done.stderr
