import pytest
import torch

from watersic_hf import codec
from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import bands, ops


def packed(rows, columns):
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = (torch.randn(rows, columns, generator=g) * 3).round().to(torch.int8)
    row_scale = torch.rand(rows, generator=g) + 0.5
    col_scale = torch.rand(columns, generator=g) * 0.1
    layer = pack_layer(codes, row_scale, col_scale, name="l")
    dense = layer.row_scale[:, None].float() * (codes * layer.col_scale.float())
    return (layer.weight, layer.row_scale, layer.col_scale), dense


def encoded(rows, columns, residency):
    """The weight of `packed`, encoded: the arguments of `coded_linear` between x and backend."""
    payload, *scales = packed(rows, columns)[0]
    coded = ops.encode(codec.decode(payload), residency)
    return residency, list(coded.tensors().values()), *scales


SHAPES = [(1, 1), (1, 40), (40, 1), (5, 127), (300, 33), (127, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_codes_times_scales(shape):
    layer, dense = packed(*shape)

    assert torch.equal(ops.dequantize(*layer, torch.float32), dense)
    assert torch.equal(ops.dequantize(*layer, torch.bfloat16), dense.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_linear_operators_match_the_dense_product(shape, leading):
    layer, dense = packed(*shape)
    x = torch.randn(*leading, shape[1])

    torch.testing.assert_close(ops.dequant_linear(x, *layer), x @ dense.T)
    for residency in ops.LAYOUTS:
        coded = encoded(*shape, residency)
        torch.testing.assert_close(ops.coded_linear(x, *coded, "auto"), x @ dense.T)


def test_dequant_linear_of_a_non_contiguous_input():
    layer, dense = packed(40, 24)
    x = torch.randn(24, 6).T

    torch.testing.assert_close(ops.dequant_linear(x, *layer), x @ dense.T)


def test_dequantize_does_not_depend_on_the_tile_size(monkeypatch):
    layer, dense = packed(300, 1500)
    monkeypatch.setattr(bands, "SCRATCH_BYTES", 1500 * 4 * 70)

    tiles = list(bands.weight_tiles(*layer, torch.float32))

    assert len(tiles) > 2
    assert torch.equal(torch.cat([tile for _, tile in tiles]), dense)


def test_tiles_of_a_trellis_are_whole_paths(monkeypatch):
    monkeypatch.setattr(bands, "SCRATCH_BYTES", 12 * 4 * 70)
    g = torch.Generator().manual_seed(0)
    path = codec.Path(torch.randint(0, 5, (100,), generator=g), 32)
    # multiples of 4 are values of even codes, which never leave quantizer 0
    values_AN = 4 * torch.randint(-3, 4, (100, 12), generator=g)
    scales = torch.rand(100, generator=g), torch.rand(12, generator=g)
    payload = codec.encode(values_AN, path=path)

    tiles = list(bands.weight_tiles(payload, *scales, torch.float32))

    order_A = path.row_class_A.argsort(stable=True)
    found = [set(rows.tolist()) for rows, _ in tiles]
    assert found == [set(order_A[:64].tolist()), set(order_A[64:].tolist())]
    weight_AN = scales[0][:, None] * (values_AN * scales[1])
    assert torch.equal(ops.dequantize(payload, *scales, torch.float32), weight_AN)
    x = torch.randn(2, 12)
    torch.testing.assert_close(ops.dequant_linear(x, payload, *scales), x @ weight_AN.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_gradient_matches_the_dense_product(dtype):
    layer, dense = packed(40, 24)
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(2, 3, 40, dtype=dtype)

    coded = [ops.coded_linear(x, *encoded(40, 24, form), "auto") for form in ops.LAYOUTS]
    for y in (ops.dequant_linear(x, *layer), *coded):
        (grad_x,) = torch.autograd.grad(y, x, grad_y)

        torch.testing.assert_close(grad_x, grad_y @ dense.to(dtype))


def test_operators_pass_opcheck():
    layer, _ = packed(40, 24)
    x = torch.randn(2, 24, requires_grad=True)

    torch.library.opcheck(ops.dequant_linear, (x, *layer))
    torch.library.opcheck(ops.dequantize, (*layer, torch.float32))
    torch.library.opcheck(ops.dequant_linear_backward, (torch.randn(2, 40), *layer))
    for residency in ops.LAYOUTS:
        coded = encoded(40, 24, residency)
        torch.library.opcheck(ops.coded_linear, (x, *coded, "auto"))
        torch.library.opcheck(ops.coded_linear_backward, (torch.randn(2, 40), *coded, "auto"))


WAITING = ("dequantize", "dequant_linear", "dequant_linear_backward", "joined_stored_linear")
RUNNING = ("coded_linear", "coded_linear_backward", "joined_linear")


@pytest.mark.parametrize("name", [*WAITING, "payload_rows", "packed_rows", *RUNNING])
def test_operators_that_wait_for_the_device_are_kept_out_of_cuda_graphs(name):
    tags = getattr(torch.ops.watersic, name).default.tags

    assert (torch.Tag.cudagraph_unsafe in tags) == (name not in RUNNING)


def test_an_input_of_the_wrong_size_is_refused():
    layer, _ = packed(40, 24)

    with pytest.raises(ValueError, match=r"x has shape \(2, 23\), but a layer of 40 x 24"):
        ops.dequant_linear(torch.randn(2, 23), *layer)
    with pytest.raises(ValueError, match=r"x has shape \(2, 23\), but a layer of 40 x 24"):
        ops.coded_linear(torch.randn(2, 23), *encoded(40, 24, "entropy"), "auto")


def test_scales_of_another_shape_are_refused():
    (payload, row_scale, col_scale), _ = packed(40, 24)

    with pytest.raises(ValueError, match="40 x 24 codes"):
        ops.dequantize(payload, row_scale[1:], col_scale, torch.float32)
