import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from watersic_kernels import (
    layers,
    outliers,
    packed,
    prefix,
    product,
    rans,
    scratch,
    tiles,
    trellis,
    zsic,
)
from watersic_kernels.launch import on_device_of_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHERS = (
    packed.packed_linears,
    packed.packed_gradient,
    prefix.prefix_linears,
    prefix.prefix_gradient,
    rans.decode_chunks,
    trellis.search_path,
    zsic.quantize_block,
)
MODULES = (outliers, packed, prefix, product, rans, tiles, trellis, zsic)
KERNELS = [
    kernel
    for module in MODULES
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
]
#: Arguments of kernels that are neither constants nor sizes.
OTHERS = {
    *("table", "arrived", "cleared", "step_1", "exponents"),
    # two layouts of the result, each with its own code
    "out_stride_c",
    # tuples, of numbers that Triton does not specialize
    *("first_band", "outputs", "slots", "entries", "words"),
}


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


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_sizes_of_layers_do_not_compile_again(kernel):
    if hasattr(kernel, "params"):
        general = {p.name for p in kernel.params if p.do_not_specialize}
    else:
        # Triton's interpreter only keeps the arguments of the decorator
        general = set(kernel.kwargs["do_not_specialize"] or ())

    sizes = {name for name in kernel.arg_names if name.islower() or len(name) == 1}
    others = OTHERS if kernel.fn.__name__ == "_gemv_kernel" else OTHERS - {"entries", "words"}
    assert sizes - others <= general


def test_numbers_in_tuples_are_never_those_that_triton_specializes():
    for number in (0, 1, 8, 15, 16, 1 << 20):
        stored = layers._unspecialized(number)
        assert stored > 1
        assert stored % 2
        assert layers._number.fn((stored,), 0) == number


@pytest.mark.gpu
def test_inputs_and_results_beyond_two_to_the_31():
    columns, far = 3, 1 << 30
    # pages that nobody touches take no memory
    memory = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    x_MN = memory.as_strided((1, columns), (1, far))
    folded_CM = memory.as_strided((columns, 1), (far, 1), 8)
    x_MN.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    order_C = torch.arange(columns, dtype=torch.int16, device=DEVICE)
    scale_N = torch.full((columns,), 2.0, device=DEVICE)
    sizes = (*x_MN.shape, columns, *x_MN.stride(), 0, far, 1, 1, 0)
    tensors = (x_MN, (order_C,), (scale_N,), folded_CM, folded_CM)

    product._fold_kernel[(1, 1, 1)](*tensors, *sizes, BLOCK_C=4, BLOCK_M=1, TF32=False)

    assert folded_CM[:, 0].tolist() == [2.0, 4.0, 6.0]


@pytest.mark.gpu
@pytest.mark.parametrize("by_token", [False, True])
def test_fold_rounds_to_tf32(by_token):
    # 1 + 2^-11 is halfway between two numbers of TF32, of which the even one is 1
    x_MN = torch.tensor([[1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, -1 - 2**-11 - 2**-20]])
    order_C, scale_N = torch.arange(5, dtype=torch.int16), torch.ones(5)
    options = {"dtype": torch.float32, "tf32": True, "by_token": by_token}
    x_MN, order_C, scale_N = (tensor.to(DEVICE) for tensor in (x_MN, order_C, scale_N))

    (folded_CM,) = product.fold(x_MN, [order_C], [scale_N], 1, **options)

    assert folded_CM.T.tolist() == [[1.0, 1.0, 1 + 2**-9, 1.0, -1 - 2**-10]]


@pytest.mark.parametrize("chosen", ["none", "ieee", "tf32"])
def test_tf32_products_keep_the_settings_of_the_program(chosen):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = chosen
    try:
        chosen = settings.fp32_precision
        for wanted, found in ((True, "tf32"), (False, chosen)):
            with scratch._tf32_products(wanted):
                assert settings.fp32_precision == found
            assert settings.fp32_precision == chosen
    finally:
        settings.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
def test_fold_of_several_layers_also_clears_counters(layers):
    x_MN = torch.randn(3, 5, device=DEVICE)
    orders = [torch.randperm(8, device=DEVICE).short() for _ in range(layers)]
    scales = [torch.rand(5, device=DEVICE) for _ in range(layers)]
    counters = torch.ones(300, dtype=torch.int32, device=DEVICE)

    folded_LCM = product.fold(x_MN, orders, scales, 4, dtype=torch.float32, cleared=counters)

    assert not counters.any()
    for folded_CM, order_C, scale_N in zip(folded_LCM, orders, scales, strict=True):
        wanted_MN = torch.zeros(4, 8, device=DEVICE)
        wanted_MN[:3, :5] = x_MN * scale_N
        torch.testing.assert_close(folded_CM.T, wanted_MN[:, order_C.long()])


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 16, 21])
def test_finish_adds_all_splits(splits):
    sums_SMR = torch.randn(splits, 4, 100, device=DEVICE)
    order_R = torch.randperm(100, device=DEVICE).short()
    scale_A = torch.rand(90, device=DEVICE)
    # the outputs of one of several layers
    y_MA = torch.full((3, 95), float("nan"), device=DEVICE)[:, :90]

    product.finish(sums_SMR, order_R, scale_A, y_MA)

    wanted_MR = sums_SMR.sum(0)[:3]
    here_R = order_R < 90
    wanted_MA = torch.empty(3, 90, device=DEVICE)
    wanted_MA[:, order_R[here_R].long()] = wanted_MR[:, here_R]
    torch.testing.assert_close(y_MA, wanted_MA * scale_A, rtol=1e-5, atol=1e-5)
