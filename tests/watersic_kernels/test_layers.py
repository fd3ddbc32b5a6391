"""Several layers in one launch, and the number of launches."""

from collections import Counter

import pytest
import torch

from watersic_hf.nn import ops
from watersic_hf.nn.forms import Form, JoinedForms
from watersic_hf.testing import assert_close, trellis_values
from watersic_kernels import packed

# they also run on a CPU, in Triton's interpreter
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = 280


@pytest.fixture
def launches(monkeypatch):
    """Number of launches by kernel; the operators launch kernels on every device."""
    counts = Counter()
    kind = type(packed._gemv_kernel)
    run = kind.run

    def counted(kernel, *arguments, **options):
        counts[kernel.fn.__name__] += 1
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(kind, "run", counted)
    kernels = ops.kernels_on(torch.device("cuda"), "triton")
    monkeypatch.setattr(ops, "kernels_on", lambda *_: kernels)
    monkeypatch.setattr(ops, "product_kernels", lambda *_: kernels)
    return counts


def form(residency, rows, *, seed, on_path=False):
    """A weight in a residency, and the dense weight."""
    generator = torch.Generator().manual_seed(seed)
    codes_AN, path = (4 * torch.randn(rows, COLUMNS, generator=generator)).round().int(), None
    if on_path:
        codes_AN, path = trellis_values(rows, COLUMNS, path_rows=rows)
    else:
        codes_AN[0, :5] = torch.tensor([3000, -700, 0, 90, 5])
    scales = torch.rand(rows, generator=generator) + 0.5, torch.rand(COLUMNS, generator=generator)
    weight_AN = scales[0][:, None] * codes_AN * scales[1]
    tensors = [weight_AN]
    if residency != "dense":
        tensors = [*ops.encode(codes_AN, residency, path).tensors().values(), *scales]
    tensors = tuple(tensor.to(DEVICE) for tensor in tensors)
    return Form(residency=residency, tensors=tensors), weight_AN.to(DEVICE)


@pytest.mark.parametrize("residency", ["packed", "entropy"])
@pytest.mark.parametrize("count", [1, 3])
def test_one_token_takes_two_launches(count, residency, launches):
    forms, weights = zip(
        *(form(residency, rows, seed=rows) for rows in (128, 250, 127)[:count]), strict=True
    )
    x = torch.randn(1, COLUMNS, device=DEVICE)

    y = JoinedForms(list(forms), sum(map(len, weights)))(x)

    assert launches == {"_fold_kernel": 1, "_gemv_kernel": 1}
    assert_close(y, x @ torch.cat(weights).T, tolerance=3e-6)


@pytest.mark.parametrize("residency", ["packed", "entropy"])
@pytest.mark.parametrize("tokens", [3, 70])
def test_layers_side_by_side_for_several_tokens(tokens, residency, launches):
    forms, weights = zip(*(form(residency, rows, seed=rows) for rows in (128, 5, 100)), strict=True)
    x = torch.randn(1, tokens, COLUMNS, device=DEVICE)

    # outputs beyond the weights are zero
    y = JoinedForms(list(forms), 240)(x)

    assert y.shape == (1, tokens, 240)
    assert not y[..., 233:].any()
    assert_close(y[..., :233], x @ torch.cat(weights).T, tolerance=3e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_layers_of_different_kinds(tokens, launches):
    kinds = [
        ("packed", 128, False),
        # a band of 64 rows
        ("packed", 60, False),
        ("packed", 128, True),
        ("dense", 7, False),
        ("entropy", 128, True),
        ("entropy", 128, False),
    ]
    forms, weights = zip(
        *(form(kind, rows, seed=i, on_path=path) for i, (kind, rows, path) in enumerate(kinds)),
        strict=True,
    )
    x = torch.randn(tokens, COLUMNS, device=DEVICE)

    y = JoinedForms(list(forms), sum(map(len, weights)))(x)

    assert_close(y, x @ torch.cat(weights).T, tolerance=3e-6)


def test_joined_layers_refuse_an_input_of_another_width(launches):
    joined = JoinedForms([form("packed", 5, seed=0)[0]], 5)

    with pytest.raises(ValueError, match=r"x has shape \(1, 560\), but a layer of 5 x 280"):
        joined(torch.randn(1, 2 * COLUMNS, device=DEVICE))


@pytest.mark.parametrize("residency", ["packed", "entropy"])
def test_gradient_decodes_once(residency, launches):
    held, weight_AN = form(residency, 200, seed=0)
    *layout, row_scale_A, col_scale_N = held.tensors
    x = torch.randn(2, 3, COLUMNS, device=DEVICE, requires_grad=True)
    y = ops.coded_linear(x, residency, layout, row_scale_A, col_scale_N, "auto")
    grad_y = torch.randn_like(y)
    launches.clear()

    (grad_x,) = torch.autograd.grad(y, x, grad_y)

    once = ("_fold_kernel", "_decode_kernel", "_decode_outliers_kernel", "_finish_kernel")
    assert launches == dict.fromkeys(once, 1)
    assert_close(grad_x, grad_y @ weight_AN, tolerance=3e-6)
