"""A weight in another form follows the packed tensors that it was made from."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from watersic_hf import CheckpointError, WaterSICLinear
from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import WaterSICEmbedding, WaterSICTiedHead
from watersic_hf.nn.linear import ops
from watersic_hf.testing import assert_close

FORMS = ("dense", "packed", "entropy", "stored")


def pack(seed=0, *, rows=48, spread=3):
    g = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, 32, generator=g) * spread).round().to(torch.int8)
    row_scale, col_scale = torch.rand(rows, generator=g) + 0.5, torch.rand(32, generator=g)
    return pack_layer(codes, row_scale.bfloat16(), col_scale.bfloat16(), name="l")


def make(kind=WaterSICLinear, seed=0, residency="dense", dtype=torch.float32, **options):
    layer = kind.from_packed(pack(seed, **options), dtype=dtype)
    layer.set_residency(residency)
    return layer


@pytest.fixture
def decodings(monkeypatch):
    """Count how often a payload is decoded."""
    count = []
    dequantize = ops.dequantize
    monkeypatch.setattr(ops, "dequantize", lambda *a: (count.append(1), dequantize(*a))[1])
    return count


def by_state(layer, other):
    layer.load_state_dict(other.state_dict())


def by_assignment(layer, other):
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def by_accelerate(layer, other):
    for name, tensor in other.packed.tensors().items():
        getattr(layer, name).data = getattr(layer, name).data.new_empty(tensor.shape)
        set_module_tensor_to_device(layer, name, "cpu", value=tensor)


def by_data(layer, other):
    for name, tensor in other.packed.tensors().items():
        getattr(layer, name).data = tensor


def by_writing_scales(layer, other):
    with torch.no_grad():
        layer.row_scale.mul_(2)
    other.row_scale.data.mul_(2)


LOADERS = (by_state, by_assignment, by_accelerate, by_data)


@pytest.mark.parametrize("residency", FORMS)
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", [WaterSICLinear, WaterSICEmbedding])
def test_loaded_codes_reach_the_product(kind, load, residency):
    layer, other = make(kind, 0, residency), make(kind, 1, "stored", spread=40)
    x = torch.randn(3, 32)
    assert len(layer.weight) != len(other.weight)
    layer(x)

    load(layer, other)

    assert layer.residency == residency
    torch.testing.assert_close(layer(x), other(x))
    if kind is WaterSICEmbedding:
        index = torch.tensor([[3, 0], [47, 3]])
        assert torch.equal(layer(index), other(index))
        assert load is by_data or layer.col_scale.dtype == torch.float32


@pytest.mark.parametrize("residency", FORMS)
def test_scales_written_in_place_reach_the_product(residency):
    layer, other = make(residency=residency), make(residency="stored")

    by_writing_scales(layer, other)

    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("without", ["embedding.weight", "head.weight", None])
def test_a_payload_loaded_under_either_name_of_a_tied_matrix_reaches_both(assign, without):
    def tied(seed):
        embedding = make(WaterSICEmbedding, seed, spread=3 + 20 * seed)
        return nn.ModuleDict({"embedding": embedding, "head": WaterSICTiedHead(embedding)})

    model, other = tied(0), tied(1)
    state = {k: v for k, v in copy.deepcopy(other.state_dict()).items() if k != without}

    model.load_state_dict(state, strict=False, assign=assign)

    x, index = torch.randn(3, 32), torch.tensor([5, 1])
    assert torch.equal(model["head"](x), other["head"](x))
    assert torch.equal(model["embedding"](index), other["embedding"](index))
    state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def test_a_compiled_layer_uses_loaded_and_replaced_tensors():
    layer, other = make(), make(seed=1, spread=40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)
    compiled(x)

    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    layer._parameters["row_scale"] = nn.Parameter(2 * layer.row_scale.data, False)
    torch.testing.assert_close(compiled(x), 2 * other(x))


def test_a_damaged_payload_is_refused_when_it_is_loaded():
    layer = nn.ModuleDict({"proj": make()})
    state = copy.deepcopy(layer.state_dict())
    state["proj.weight"][40] ^= 1

    with pytest.raises(RuntimeError, match="proj: the stored weight cannot be decoded"):
        layer.load_state_dict(state)
    with pytest.raises(CheckpointError):
        layer["proj"](torch.randn(3, 32))


def test_a_dense_weight_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        make().load_state_dict({"weight": torch.randn(48, 32)}, strict=False)


def test_nothing_is_decoded_again_without_new_values(decodings):
    layer = make()
    decodings.clear()
    x = torch.randn(3, 32)

    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.float()):
        other(x)
    for parameter in layer.parameters():
        # as PEFT casts, and as loaders replace
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    layer(x)
    layer.row_scale = nn.Parameter(layer.row_scale.data.clone(), False)
    layer(x)
    with torch.inference_mode():
        layer(x)

    assert not decodings


def test_offloading_a_dense_layer_keeps_its_weight(decodings):
    model = nn.Sequential(make())
    decodings.clear()
    x = torch.randn(3, 32)
    expected = model(x)

    cpu_offload(model)

    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert model[0].weight.is_meta
    assert not decodings


def test_a_layer_made_in_inference_mode_follows_its_tensors():
    with torch.inference_mode():
        layer, other = make(), make(seed=1)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(torch.ones(32)), other(torch.ones(32)))


@pytest.mark.parametrize("residency", ["dense", "packed", "stored"])
@pytest.mark.parametrize("kind", [WaterSICLinear, WaterSICEmbedding])
def test_casts_change_the_dtype_of_the_weight_and_no_saved_tensor(kind, residency):
    layer = make(kind, residency=residency)
    before = copy.deepcopy(layer.state_dict())

    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        layer.to(dtype)
        assert layer.compute_dtype == layer.dequantize().weight.dtype == dtype
        assert layer(torch.ones(2, 32, dtype=dtype)).dtype == dtype
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)

    for other in (layer, torch.load(buffer, weights_only=False), copy.deepcopy(layer)):
        for name, tensor in other.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
        other.check("l")
        assert other.packed.stored_bits == pack().stored_bits


@pytest.mark.parametrize("residency", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_all_residencies_in_other_precisions(residency, dtype):
    layer = make(residency=residency, dtype=dtype)
    x = torch.randn(2, 3, 32, dtype=dtype, requires_grad=True)
    expected = layer.dequantize()

    y = layer(x)
    y.sum().backward()

    # in float16, kernels multiply with the weight before it is rounded
    tolerance = 1e-12 if dtype == torch.float64 else 1e-3
    assert_close(y.detach(), expected(x).detach(), tolerance=tolerance)
    torch.testing.assert_close(x.grad, expected.weight.sum(0).expand(2, 3, 32))


@pytest.mark.parametrize("residency", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_product_of_an_ordinary_layer(residency, dtype):
    layer = make(residency=residency)
    x = torch.randn(2, 3, 32, requires_grad=True)
    dense = layer.dequantize()
    with torch.autocast("cpu", dtype):
        expected = dense(x)
        y = layer(x)
        # float64 is left as it is
        assert layer(x.double()).dtype == torch.float64
        # autocast may also be on in the backward pass
        y.float().sum().backward()

    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(2, 3, 32), rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("residency", ["dense", "packed"])
def test_autocast_in_a_compiled_layer(residency):
    torch.compiler.reset()
    layer = make(residency=residency)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32)

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x))
