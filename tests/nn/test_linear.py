import copy
import io

import pytest
import torch
from torch import nn

from watersic_hf import CheckpointError, WaterSICLinear, set_residency
from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import layouts, module_matches, replace_module
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.testing import assert_close


def make(rows=48, columns=32, *, bias=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    codes = (torch.randn(rows, columns, generator=g) * 3).round().to(torch.int8)
    packed = pack_layer(
        codes, torch.rand(rows, generator=g) + 0.5, torch.rand(columns, generator=g), name="l"
    )
    values = torch.randn(rows, generator=g) if bias else None
    return WaterSICLinear.from_packed(packed, bias=values, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_residencies_match_the_dense_layer(bias, dtype):
    layer = make(bias=bias, dtype=dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    expected = layer.dequantize()(x)

    for residency in ("packed", "entropy", "stored"):
        layer.set_residency(residency)
        assert layer.residency == residency
        # two orders of summation, and weights that are rounded to the dtype or not at all
        assert_close(layer(x).detach(), expected.detach(), tolerance=5e-3)
    layer.set_residency("dense")

    assert torch.equal(layer(x), expected)


def test_packed_tensors_are_parameters_without_gradient():
    layer = make()

    parameters = dict(layer.named_parameters())

    assert set(parameters) == {"weight", "row_scale", "col_scale", "bias"}
    assert not any(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("residency", ["dense", "packed", "entropy"])
def test_state_dict_holds_only_the_stored_tensors(residency):
    layer = make()
    layer.set_residency(residency)

    assert set(layer.state_dict()) == {"weight", "row_scale", "col_scale", "bias"}


def test_moving_a_layer_uploads_its_symbol_tables(monkeypatch):
    # the first product may be inside the capture of a CUDA graph, which allows no upload
    layer, asked = make(), []
    layer.set_residency("entropy")
    tables = prefix_tables(torch.device("cpu"))
    monkeypatch.setattr(layouts, "prefix_tables", lambda *key: asked.append(key) or tables)

    layer.to("meta")

    assert asked == [(torch.device("meta"), False)]


@pytest.mark.parametrize("residency", ["dense", "packed", "entropy", "stored"])
def test_casting_the_layer_keeps_the_stored_tensors(residency):
    layer = make()
    layer.set_residency(residency)
    before = {k: v.clone() for k, v in layer.packed.tensors().items()}

    layer.to(torch.bfloat16)

    assert all(torch.equal(before[k], v) for k, v in layer.packed.tensors().items())
    layer.check("l")
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_deepcopy_and_torch_save_keep_the_output():
    layer = make()
    layer.set_residency("dense")
    x = torch.randn(3, 32)

    clone = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)

    assert torch.equal(clone(x), layer(x))
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


def test_only_the_input_gets_a_gradient():
    layer = make()
    x = torch.randn(3, 32, requires_grad=True)

    layer(x).sum().backward()

    assert x.grad.abs().sum() > 0
    assert layer.weight.grad is None


@pytest.mark.parametrize("residency", ["dense", "packed", "entropy", "stored"])
def test_torch_compile_without_graph_breaks(residency):
    layer = make()
    layer.set_residency(residency)
    x = torch.randn(3, 32)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast_dtype_is_that_of_a_linear_layer():
    layer = make()
    layer.set_residency("dense")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 32))

    assert y.dtype == torch.bfloat16


def test_an_unknown_residency_is_refused():
    with pytest.raises(ValueError, match="residency is 'fast'"):
        make().set_residency("fast")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        make().set_residency("packed", backend="cuda")


@pytest.mark.parametrize("residency", ["dense", "packed", "entropy"])
def test_error_for_a_damaged_payload_names_the_layer(residency):
    model = nn.Sequential(make())
    model[0].weight.data[40] ^= 1

    with pytest.raises(CheckpointError, match=r"^0: "):
        set_residency(model, residency)


def test_repr_has_sizes_bits_and_residency():
    text = repr(make())

    assert "in_features=32, out_features=48, bias=True, bits=" in text
    assert "residency=stored" in text


def test_stored_layer_has_the_same_size_in_memory_as_on_disk():
    layer = make(256, 512, bias=False)

    held = sum(p.numel() * p.element_size() for p in layer.parameters())

    assert 8 * held == layer.packed.stored_bits


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.1.q", r"layers\.1", True),
        ("model.layers.10.q", r"layers\.1", False),
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.lm_head2", "lm_head", False),
        ("a.mlp.gate_proj", r"mlp\.gate", False),
        ("a.mlp.gate", r"mlp\.gate", True),
        ("a.x_proj", "x_proj|y_proj", True),
        ("a.y_proj", "x_proj|y_proj", True),
        ("layers.3.mlp.up", r"layers\.\d+\.mlp", True),
    ],
)
def test_patterns_match_whole_components_of_a_name(name, pattern, expected):
    assert (module_matches(name, [pattern]) is not None) == expected


def test_replace_module_keeps_the_training_mode():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 48)))
    model.eval()

    replace_module(model, "0.0", make().train())

    assert isinstance(model[0][0], WaterSICLinear)
    assert not model[0][0].training
