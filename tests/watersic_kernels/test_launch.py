import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from watersic_kernels import packed, prefix, product, rans, trellis, zsic
from watersic_kernels.launch import on_device_of_tensors

LAUNCHERS = (
    packed.packed_linear,
    prefix.prefix_linear,
    rans.decode_chunks,
    trellis.search_path,
    zsic.quantize_block,
)
KERNELS = (packed._gemv_kernel, packed._gemm_kernel, packed._decode_kernel, prefix._gemv_kernel)


@pytest.fixture
def entered(monkeypatch):
    """Devices that were made the current one."""
    devices = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            devices.append(self.device)

        def __exit__(self, *details):
            devices.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    return devices


def test_kernels_run_on_the_device_of_their_tensors(entered):
    @on_device_of_tensors
    def launch(layout, x, *, y=None):
        assert entered == [torch.device("cuda:1")]
        return x

    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")

    assert launch([], x) is x
    assert entered == [torch.device("cuda:1"), "left"]


def test_nothing_is_entered_on_a_cpu(entered):
    on_device_of_tensors(lambda x: x)(torch.empty(2))

    assert entered == []


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_everything_that_launches_is_guarded(launcher):
    assert launcher.__wrapped__.__name__ == launcher.__name__


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_sizes_of_layers_do_not_compile_again(kernel):
    names = kernel.arg_names
    sizes = {"tiles", "slots", "entries", "tiles_per_split", "words", "last_table"} & set(names)
    # a compiled function; in the interpreter there is nothing to specialize
    if hasattr(kernel, "params"):
        assert sizes <= {p.name for p in kernel.params if p.do_not_specialize}


def test_inputs_and_results_beyond_two_to_the_31():
    columns, far = 3, 1 << 30
    # pages that nobody touches take no memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16)
    x_MN = memory.as_strided((1, columns), (1, far))
    folded_CM = memory.as_strided((columns, 1), (far, 1), 8)
    x_MN.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    order_C, scale_N = torch.arange(columns, dtype=torch.int16), torch.full((columns,), 2.0)
    sizes = (*x_MN.shape, columns, *x_MN.stride(), far, 1, 1)

    product._fold_kernel[(1, 1)](
        x_MN, order_C, scale_N, folded_CM, *sizes, BLOCK_C=4, BLOCK_M=1, TF32=False
    )

    assert folded_CM[:, 0].tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("by_token", [False, True])
def test_fold_rounds_to_tf32(by_token):
    # 1 + 2^-11 is halfway between two numbers of TF32, of which the even one is 1
    x_MN = torch.tensor([[1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, -1 - 2**-11 - 2**-20]])
    order_C, scale_N = torch.arange(5, dtype=torch.int16), torch.ones(5)
    options = {"dtype": torch.float32, "tf32": True, "by_token": by_token}

    folded_CM = product.fold(x_MN, order_C, scale_N, 1, **options)

    assert folded_CM.T.tolist() == [[1.0, 1.0, 1 + 2**-9, 1.0, -1 - 2**-10]]


@pytest.mark.parametrize("splits", [1, 2, 16, 21])
def test_finish_adds_all_splits(splits):
    sums_SMR = torch.randn(splits, 4, 100)
    order_R = torch.randperm(100).short()
    scale_A, y_MA = torch.rand(90), torch.full((3, 90), float("nan"))

    product.finish(sums_SMR, order_R, scale_A, y_MA)

    wanted_MR = sums_SMR.sum(0)[:3]
    here_R = order_R < 90
    wanted_MA = torch.empty(3, 90)
    wanted_MA[:, order_R[here_R].long()] = wanted_MR[:, here_R]
    torch.testing.assert_close(y_MA, wanted_MA * scale_A, rtol=1e-5, atol=1e-5)
