import pytest
import torch

from watersic_hf import WaterSICLinear
from watersic_hf.checkpoint import rescale_layer
from watersic_hf.finetuning.layers import TrainableLinear
from watersic_hf.testing import assert_close


@pytest.fixture
def make_trainable(make_layer):
    """Make a trainable layer whose factors are not one, and the layer that it replaces."""

    def make(*, bias):
        layer = make_layer(bias=bias)
        trainable = TrainableLinear(layer)
        with torch.no_grad():
            for factor in trainable.factors().values():
                factor += 0.1 * torch.randn(factor.shape)
        return trainable, layer

    return make


# unlike the reference, the layer rounds the scales to 11 bits and, in bfloat16, the weight, the
# inputs and the output to 8 bits
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_product(make_trainable, bias, dtype, tolerance):
    trainable, _ = make_trainable(bias=bias)
    trainable.compute_dtype = dtype
    x = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(2, 7, 24, dtype=dtype)

    trainable(x).backward(grad_y)

    row, col, x64 = (
        t.detach().double().requires_grad_() for t in (*trainable.factors().values(), x)
    )
    row_scale, col_scale = trainable.row_scale.double() * row, trainable.col_scale.double() * col
    y = x64 @ (row_scale[:, None] * trainable.codes * col_scale).T
    y.backward(grad_y.double())
    assert_close(x.grad, x64.grad, tolerance=tolerance)
    assert_close(trainable.row_factor.grad, row.grad, tolerance=tolerance)
    assert_close(trainable.col_factor.grad, col.grad, tolerance=tolerance)
    assert trainable.col_factor.grad[3] == 0


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_right_if_the_output_is_changed_in_place(make_trainable, bias):
    trainable, _ = make_trainable(bias=bias)
    x = torch.randn(7, 16)
    gradients = []
    for clamp in (torch.clamp, torch.clamp_):
        trainable.zero_grad()
        clamp(trainable(x), -1, 1).sum().backward()
        gradients.append([factor.grad for factor in trainable.factors().values()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainable_layer_is_bit_equal_to_the_stored_layer(make_trainable, bias, dtype):
    trainable, layer = make_trainable(bias=bias)
    trainable.compute_dtype = dtype
    x = torch.randn(5, 16, dtype=dtype)

    found = trainable(x)
    scales = trainable.scales(trainable.row_factor.detach(), trainable.col_factor.detach())
    packed = rescale_layer(layer.packed, *scales, name="l")
    again = WaterSICLinear.from_packed(packed, dtype=dtype)
    again.set_residency("dense")
    expected = again(x) if layer.bias is None else again(x) + layer.bias.to(dtype)
    assert torch.equal(found, expected)
