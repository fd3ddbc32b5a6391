"""Kernels access only the tensors they are given, whatever the tensors of a layout contain."""

import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec.trellis import quantizers, value_of
from watersic_hf.core.trellis import LEVELS, code_costs
from watersic_hf.nn.packing import pack_codes
from watersic_hf.nn.prefix import encode_codes
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.testing import assert_close, trellis_values
from watersic_kernels import packed, prefix, rans, scratch, trellis

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="only Triton's interpreter reports every access"
)


class Memory:
    """The tensors that kernels may access."""

    def __init__(self):
        self.ranges = {}
        self.kept = []

    def allow(self, tensor):
        if tensor.numel():
            self.kept.append(tensor)
            self.ranges[tensor.data_ptr()] = tensor.data_ptr() + tensor.nbytes
        return tensor

    def check(self, pointers, mask):
        starts = np.array(sorted(self.ranges), np.int64)
        stops = np.array([self.ranges[start] for start in starts.tolist()], np.int64)
        address = pointers.data[mask.data.astype(bool)].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        index = np.searchsorted(starts, address, side="right") - 1
        inside = (index >= 0) & (address + size <= stops[index])
        assert inside.all(), f"{(~inside).sum()} accesses outside of all tensors"


@pytest.fixture
def memory(monkeypatch):
    """Check every access of a kernel, and fill what it allocates with poison."""
    from triton.runtime.interpreter import interpreter_builder as builder

    memory = Memory()
    load, store = builder.create_masked_load, builder.create_masked_store
    new_empty, finish = torch.Tensor.new_empty, scratch.finish

    def checked_load(pointers, mask, *others):
        memory.check(pointers, mask)
        return load(pointers, mask, *others)

    def checked_store(pointers, value, mask, *others):
        memory.check(pointers, mask)
        return store(pointers, value, mask, *others)

    def poisoned(tensor, *shape, **options):
        made = new_empty(tensor, *shape, **options)
        return memory.allow(made.fill_(float("nan") if made.is_floating_point() else 0x7F))

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    # the result of torch's own product was not allocated by `new_empty`
    monkeypatch.setattr(
        scratch, "finish", lambda sums, *others: finish(memory.allow(sums), *others)
    )
    return memory


def codes(rows, columns):
    generator = torch.Generator().manual_seed(0)
    scale_N = torch.exp2(torch.randn(columns, generator=generator))
    found_AN = (scale_N * torch.randn(rows, columns, generator=generator)).round().int()
    found_AN[0, -1] = 7049
    return found_AN


FORMS = {
    "packed": (pack_codes, packed.packed_linears, packed.packed_gradient),
    "prefix": (encode_codes, prefix.prefix_linears, prefix.prefix_gradient),
    "packed trellis": (pack_codes, packed.packed_linears, packed.packed_gradient),
    "prefix trellis": (encode_codes, prefix.prefix_linears, prefix.prefix_gradient),
}


def weight(form, memory, rows, damage=None):
    """Layout and scales that a kernel may access, its other arguments, and the expected codes."""
    expected_AN, path = codes(rows, 40), None
    if "trellis" in form:
        expected_AN, path = trellis_values(rows, 40, path_rows=rows)
    coded = FORMS[form][0](expected_AN, path)
    layout = [tensor.clone() for tensor in coded.tensors().values()]
    if damage is not None:
        damage(layout)
    options = {}
    if "prefix" in form:
        tables = prefix_tables(torch.device("cpu"), path is not None)
        options["tables_TW"] = memory.allow(tables.entries_TW)
    row_scale_A, col_scale_N = torch.ones(rows), torch.ones(40)
    for tensor in (*layout, row_scale_A, col_scale_N):
        memory.allow(tensor)
    return (layout, row_scale_A, col_scale_N), options, expected_AN


def multiply(form, memory, tokens, damage=None):
    """A product with two layers that may access only its own tensors; `damage` changes layouts."""
    parts = [weight(form, memory, rows, damage) for rows in (70, 5)]
    x_MN = memory.allow(torch.randn(tokens, 40))
    y_MA = memory.allow(torch.full((tokens, 75), float("nan")))

    FORMS[form][1](x_MN, [part[0] for part in parts], y_MA, **parts[0][1])

    return y_MA, x_MN @ torch.cat([part[2] for part in parts]).float().T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damaged", [False, True])
def test_gradients_access_only_their_tensors(form, damaged, memory):
    def damage(layout):
        if damaged:
            layout[0].random_(-(2**31), 2**31)

    layer, options, codes_AN = weight(form, memory, 70, damage)
    grad_MA = memory.allow(torch.randn(3, 70))

    grad_MN = FORMS[form][2](grad_MA, *layer, **options)

    if not damaged:
        assert_close(grad_MN, grad_MA @ codes_AN.float(), tolerance=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_products_access_only_their_tensors(form, tokens, memory):
    y, expected = multiply(form, memory, tokens)

    assert_close(y, expected, tolerance=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "seed"), [(1, 0), (70, 1)])
def test_products_with_random_layouts_access_only_their_tensors(form, tokens, seed, memory):
    rng = np.random.default_rng(seed)

    def damage(layout):
        for index, tensor in enumerate(layout):
            if index % 2 == seed:
                info = np.iinfo(tensor.numpy().dtype)
                noise = rng.integers(info.min, info.max, tensor.shape, endpoint=True)
                tensor.copy_(torch.from_numpy(noise))

    multiply(form, memory, tokens, damage)


@pytest.mark.parametrize("form", FORMS)
def test_products_with_flipped_bits_access_only_their_tensors(form, memory):
    rng = np.random.default_rng(0)

    def damage(layout):
        for tensor in layout:
            flat = tensor.view(-1).view(torch.uint8).numpy()
            if not len(flat):
                continue
            at = rng.integers(len(flat), size=max(1, len(flat) // 20))
            flat[at] ^= rng.integers(1, 256, size=len(at)).astype(np.uint8)

    multiply(form, memory, 2, damage)


def test_decoder_of_a_trellis_accesses_only_its_tensors(memory, monkeypatch):
    monkeypatch.setattr("watersic_hf.codec.layout.STEPS_SMALL", 32)
    generator = torch.Generator().manual_seed(0)
    path = codec.Path(torch.randint(0, 5, (20,), generator=generator), 8)
    codes_AN = codes(20, 34).numpy()
    in_order_AN = value_of(codes_AN, quantizers(codes_AN, path.rows).astype(np.int32))
    expected_AN = torch.from_numpy(in_order_AN)[path.row_class_A.argsort(stable=True).argsort()]
    payload = codec.encode(expected_AN, path=path)
    header, parts, order_A = codec.take_apart(payload)
    values_AN = torch.empty(header.rows, header.cols, dtype=torch.int32)
    for tensor in (*parts, order_A, values_AN):
        memory.allow(tensor)

    def decode():
        return rans.decode_chunks(
            parts,
            values_AN.T,
            rows_per_lane=header.rows_per_lane,
            cols_per_chunk=header.cols_per_chunk,
            escape_words=header.escape_words,
            order_N=order_A,
        )

    assert bool(decode().all())
    assert torch.equal(values_AN, expected_AN)
    parts[0].random_(-(2**15), 2**15, generator=generator)
    assert not bool(decode().any())


@pytest.mark.parametrize(("rows", "path_rows"), [(1, 8), (70, 30)])
def test_search_reads_no_scratch_memory_that_it_has_not_written(rows, path_rows, memory):
    pytest.importorskip("numba")
    reference = pytest.importorskip("watersic_kernels.cpu.trellis")
    generator = torch.Generator().manual_seed(0)
    target_A = 3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    level_A = torch.randint(-5, LEVELS + 5, (rows,), generator=generator)
    cost_KQV = code_costs()
    inputs = [memory.allow(tensor) for tensor in (target_A, level_A, cost_KQV)]

    values_A = trellis.search_path(*inputs, path_rows)

    arrays = (tensor.numpy() for tensor in inputs)
    np.testing.assert_array_equal(values_A.numpy(), reference.search_path(*arrays, path_rows))
