"""Kernels access only the tensors they are given, whatever the tensors of a layout contain."""

import numpy as np
import pytest
import torch

from watersic_hf.nn.packing import pack_codes
from watersic_hf.nn.prefix import encode_codes
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.testing import assert_close
from watersic_kernels import packed, prefix, product

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
    new_empty, finish = torch.Tensor.new_empty, product.finish

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
        product, "finish", lambda sums, *others: finish(memory.allow(sums), *others)
    )
    return memory


def codes(rows, columns):
    generator = torch.Generator().manual_seed(0)
    scale_N = torch.exp2(torch.randn(columns, generator=generator))
    found_AN = (scale_N * torch.randn(rows, columns, generator=generator)).round().int()
    found_AN[0, -1] = 7049
    return found_AN


FORMS = {
    "packed": (pack_codes, packed.packed_linear),
    "prefix": (encode_codes, prefix.prefix_linear),
}


def multiply(form, memory, tokens, damage=None):
    """A product that may access only its own tensors; `damage` changes the layout."""
    encode, linear = FORMS[form]
    expected_AN = codes(70, 40)
    layout = [tensor.clone() for tensor in encode(expected_AN).tensors().values()]
    if damage is not None:
        damage(layout)
    x_MN = torch.randn(tokens, 40)
    options = {}
    if form == "prefix":
        options["tables_TW"] = memory.allow(prefix_tables(torch.device("cpu")).entries_TW)
    row_scale_A, col_scale_N = torch.ones(70), torch.ones(40)
    for tensor in (x_MN, *layout, row_scale_A, col_scale_N):
        memory.allow(tensor)
    y_MA = linear(x_MN, layout, row_scale_A, col_scale_N, **options)
    return y_MA, x_MN @ expected_AN.float().T


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
            flat = tensor.view(torch.uint8).view(-1).numpy()
            at = rng.integers(len(flat), size=max(1, len(flat) // 20))
            flat[at] ^= rng.integers(1, 256, size=len(at)).astype(np.uint8)

    multiply(form, memory, 2, damage)
