import pytest
import torch
from torch import nn

from watersic_hf import WaterSICLinear, codec, set_residency
from watersic_hf.checkpoint import pack_layer
from watersic_hf.core import Moments, quantize_weight
from watersic_hf.core.trellis import Path, Trellis
from watersic_hf.nn import block_step, path_search
from watersic_hf.nn.decoding import decode
from watersic_hf.testing import assert_close, random_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(params=["packed", "entropy"])
def models(request):
    """A model of two layers on the GPU, with compressed weights and with dense ones."""
    rows, columns = 512, 768
    generator = torch.Generator().manual_seed(0)
    layers, dense = [], []
    for A, N in ((rows, columns), (columns, rows)):
        codes_AN = (3 * torch.randn(A, N, generator=generator)).round().to(torch.int8)
        row_scale_A = torch.rand(A, generator=generator) + 0.5
        col_scale_N = 0.01 * torch.rand(N, generator=generator)
        packed = pack_layer(codes_AN, row_scale_A, col_scale_N, name="l")
        bias = torch.randn(A, generator=generator)
        layers.append(WaterSICLinear.from_packed(packed, bias=bias, dtype=torch.bfloat16))
        dense.append(layers[-1].dequantize())
    found = nn.Sequential(*layers).cuda()
    set_residency(found, request.param, backend="triton")
    return found, nn.Sequential(*dense).cuda()


@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 9, 64, 65, 300])
def test_model_matches_the_dense_one(tokens, models):
    packed, dense = models
    x = torch.randn(2, tokens, 768, device="cuda", dtype=torch.bfloat16)

    y = packed(x)

    if tokens:
        assert_close(y, dense(x), tolerance=1e-2)
    assert y.shape == (2, tokens, 768)


def test_payload_is_in_host_memory_except_when_stored(models):
    packed, _ = models

    assert {layer.weight.device.type for layer in packed} == {"cpu"}
    assert {layer.words_G.device.type for layer in packed} == {"cuda"}
    set_residency(packed, "stored")
    assert {layer.weight.device.type for layer in packed} == {"cuda"}


def test_cuda_graph_replays_the_product(models):
    packed, dense = models
    x = torch.randn(1, 768, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        packed(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed(x)

        x.normal_()
        graph.replay()

        assert_close(y, dense(x), tolerance=1e-2)


def test_torch_compile_without_graph_breaks_and_gradient_of_the_input(models):
    packed, dense = models
    x = torch.randn(3, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    y = torch.compile(packed, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(dense(x).sum(), x)

    assert_close(y, dense(x), tolerance=1e-2)
    assert_close(grad, expected, tolerance=2e-2)


@pytest.mark.parametrize("shape", [(3, 5), (300, 100), (5000, 256), (40_000, 96)])
def test_quantize_weight_with_kernels_matches_torch(shape):
    weight_AN, cov_NN = (tensor.cuda() for tensor in random_layer(*shape, seed=0))
    moments = Moments(cov=cov_NN, tokens=1000)

    found = quantize_weight(weight_AN, moments, rate=3.0, block_step=block_step(weight_AN.device))

    wanted = quantize_weight(weight_AN, moments, rate=3.0)
    # sums run in another order, so a value halfway between two codes may be rounded either way
    assert (found.codes_AN != wanted.codes_AN).double().mean() < 1e-6
    assert_close(found.shrinkage_N, wanted.shrinkage_N, tolerance=1e-9)


@pytest.mark.parametrize("path_rows", [128, 1024])
def test_trellis_on_the_gpu_matches_the_cpu(path_rows):
    pytest.importorskip("numba")
    rows, columns = 5000, 40
    generator = torch.Generator().manual_seed(0)
    scale_N = torch.exp2(2 * torch.randn(columns, generator=generator, dtype=torch.float64))
    target_NA = scale_N[:, None] * torch.randn(
        columns, rows, generator=generator, dtype=torch.float64
    )
    row_class_A = torch.randint(0, 9, (rows,), generator=generator)

    def values(device):
        path = Path(row_class_A.to(device), path_rows)
        trellis = Trellis(search=path_search(device), path=path)
        return torch.stack([trellis.values(y_A, 0.7) for y_A in target_NA.to(device)])

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    found_NA = values(cuda).cpu()

    assert torch.equal(found_NA, values(cpu))
    values_AN = torch.empty(rows, columns, dtype=torch.int32)
    values_AN[row_class_A.argsort(stable=True)] = found_NA.T
    payload = codec.encode(values_AN, path=codec.Path(row_class_A, path_rows))
    assert torch.equal(decode(payload, cuda, "triton").cpu(), values_AN)
