import pytest
import torch

from watersic_hf.nn.prefix import PADDING, encode_codes
from watersic_hf.nn.prefix_tables import WINDOW, prefix_tables
from watersic_hf.testing import assert_close, trellis_values
from watersic_kernels import prefix
from watersic_kernels.prefix import prefix_gradient, prefix_linear

# they also run on a CPU, in Triton's interpreter
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(rows, columns, *, spread=1.0, outliers=3):
    """Codes of many scales, some rows and columns empty, and scales."""
    generator = torch.Generator().manual_seed(rows * columns)
    scale_A = torch.exp2(spread * torch.randn(rows, 1, generator=generator))
    scale_N = torch.exp2(spread * torch.randn(columns, generator=generator))
    codes_AN = (2 * scale_A * scale_N * torch.randn(rows, columns, generator=generator)).round()
    codes_AN[:, 3::11] = 0
    codes_AN[2::9] = 0
    where = torch.randint(codes_AN.numel(), (outliers,), generator=generator)
    codes_AN.view(-1)[where] = torch.tensor([7049.0, -300.0, 5000.0])[:outliers]
    row_scale_A = (torch.rand(rows, generator=generator) + 0.5).half()
    col_scale_N = (torch.rand(columns, generator=generator) * 0.01).half()
    return codes_AN.int(), row_scale_A, col_scale_N


def run(x_MN, codes_AN, *scales, path=None, operator=prefix_linear):
    layout = [tensor.to(DEVICE) for tensor in encode_codes(codes_AN, path).tensors().values()]
    x_MN, *scales = (tensor.to(DEVICE) for tensor in (x_MN, *scales))
    tables_TW = prefix_tables(torch.device(DEVICE), path is not None).entries_TW
    return operator(x_MN, layout, *scales, tables_TW=tables_TW).cpu()


def expected(x_MN, codes_AN, row_scale_A, col_scale_N):
    weight_AN = row_scale_A[:, None].double() * codes_AN * col_scale_N.double()
    return x_MN.double() @ weight_AN.T


#: By dtype of the activations: 3e-6 is for the sum in float32; the others are one rounding of y,
#: and for many tokens also of codes and x.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_product_for_all_token_counts_and_dtypes(tokens, dtype):
    codes_AN, *scales = layer(70, 65)
    x_MN = torch.randn(tokens, 65).to(dtype)

    y_MA = run(x_MN, codes_AN, *scales)

    assert y_MA.dtype == dtype
    assert_close(y_MA, expected(x_MN, codes_AN, *scales), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (128, 64), (300, 33)])
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_product_for_ragged_sizes(shape, tokens):
    codes_AN, *scales = layer(*shape)
    x_MN = torch.randn(tokens, shape[1])

    y_MA = run(x_MN, codes_AN, *scales)

    assert_close(y_MA, expected(x_MN, codes_AN, *scales), tolerance=3e-6)


def test_product_with_low_bits_in_several_segments_and_bands(monkeypatch):
    monkeypatch.setattr("watersic_hf.nn.prefix.STREAM_COLUMNS", 64)
    monkeypatch.setattr("watersic_kernels.scratch.SCRATCH_BYTES", 1)
    codes_AN, *scales = layer(130, 200, spread=3.0)
    coded = encode_codes(codes_AN)
    assert coded.first_BS.shape == (3, 4)
    assert (coded.tiles_BT >> 8).max() > 4
    assert (coded.tiles_BT == 0).any() or (coded.tiles_BT & 255).min() < 5

    for tokens in (2, 9):
        x_MN = torch.randn(tokens, 200)
        y_MA = run(x_MN, codes_AN, *scales)
        assert_close(y_MA, expected(x_MN, codes_AN, *scales), tolerance=3e-6)


def test_product_for_zero_tokens():
    codes_AN, *scales = layer(5, 31)

    assert run(torch.randn(0, 31), codes_AN, *scales).shape == (0, 5)


def test_padding_of_kernel_and_layout_agree():
    assert prefix.PADDING == PADDING


def test_unaligned_tables_are_refused():
    codes_AN, *scales = layer(5, 31)
    layout = list(encode_codes(codes_AN).tensors().values())
    moved = torch.empty(5 * (1 << WINDOW) + 1, dtype=torch.int32)[1:].view(5, -1)

    with pytest.raises(ValueError, match="begin at a multiple of 8192 bytes"):
        prefix_linear(torch.randn(1, 31), layout, *scales, tables_TW=moved)


@pytest.mark.parametrize(("shape", "path_rows"), [((1, 1), 1), ((128, 64), 128), ((300, 33), 128)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_product_with_a_trellis(shape, path_rows, tokens):
    values_AN, path = trellis_values(*shape, path_rows=path_rows, spread=1.5)
    _, *scales = layer(*shape)
    x_MN = torch.randn(tokens, shape[1])

    y_MA = run(x_MN, values_AN, *scales, path=path)

    assert_close(y_MA, expected(x_MN, values_AN, *scales), tolerance=3e-6)


@pytest.mark.parametrize(
    ("dtype", "on_path", "scratch_bytes"),
    [
        (torch.float32, False, 1),
        (torch.float32, True, 1 << 20),
        (torch.float16, False, 1 << 20),
        (torch.bfloat16, True, 1),
    ],
)
def test_gradient(scratch_bytes, on_path, dtype, monkeypatch):
    monkeypatch.setattr("watersic_kernels.scratch.SCRATCH_BYTES", scratch_bytes)
    codes_AN, *scales = layer(140, 65)
    path = None
    if on_path:
        codes_AN, path = trellis_values(140, 65, path_rows=64, spread=1.5)
    grad_MA = torch.randn(3, 140).to(dtype)

    grad_MN = run(grad_MA, codes_AN, *scales, path=path, operator=prefix_gradient)

    assert grad_MN.dtype == dtype
    weight_AN = scales[0][:, None].double() * codes_AN * scales[1].double()
    assert_close(grad_MN, grad_MA.double() @ weight_AN, tolerance=2 * TOLERANCE[dtype])


def test_gradient_for_zero_tokens():
    codes_AN, *scales = layer(5, 31)

    assert run(torch.randn(0, 5), codes_AN, *scales, operator=prefix_gradient).shape == (0, 31)
