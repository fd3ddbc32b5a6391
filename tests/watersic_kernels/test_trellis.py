import numpy as np
import pytest
import torch

from watersic_hf.core.trellis import LEVELS, code_costs
from watersic_hf.nn import path_search
from watersic_kernels.trellis import ROWS, search_path

pytest.importorskip("numba")
reference = pytest.importorskip("watersic_kernels.cpu.trellis")

# they also run on a CPU, in Triton's interpreter
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def column(rows, scale, seed=0):
    """Targets with outliers and zeros, and levels of the table and beyond both of its ends."""
    rng = np.random.default_rng(seed)
    target_A = scale * rng.standard_t(4, rows)
    target_A[3::7] = 0
    return target_A, np.sort(rng.integers(-5, LEVELS + 5, rows))


def check(target_A, level_A, path_rows, cost_KQV=None):
    cost_KQV = code_costs() if cost_KQV is None else cost_KQV
    tensors = [torch.from_numpy(part).to(DEVICE) for part in (target_A, level_A)]

    found_A = search_path(*tensors, cost_KQV.to(DEVICE), path_rows)

    wanted_A = reference.search_path(target_A, level_A, cost_KQV.numpy(), path_rows)
    assert found_A.dtype == torch.int32
    np.testing.assert_array_equal(found_A.cpu().numpy(), wanted_A)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 20.0, 300.0])
def test_search_matches_the_reference(scale):
    check(*column(120, scale), 120)


@pytest.mark.parametrize(
    ("rows", "path_rows"), [(0, 8), (1, 1), (1, 8), (2, 1), (40, 16), (ROWS + 3, 50), (ROWS, 200)]
)
def test_search_with_several_paths_of_ragged_lengths(rows, path_rows):
    check(*column(rows, 2.0, seed=rows), path_rows)


def test_ties_are_broken_as_in_the_reference():
    # all multiples of 1/2, so that sums of squared errors are exact and many paths cost the same
    target_A, level_A = column(100, 3.0)
    target_A = np.rint(2 * target_A) / 2

    check(target_A, np.full_like(level_A, LEVELS), 64)
    check(np.zeros_like(target_A), level_A, 64)


def test_levels_and_magnitudes_beyond_the_table():
    target_A, level_A = column(60, 5.0)
    cost_KQV = code_costs()[20:24, :, :3].contiguous()

    check(target_A, np.full_like(level_A, np.iinfo(np.int64).min), 60, cost_KQV)
    check(target_A, level_A % 4, 60, cost_KQV)
    check(target_A, np.full_like(level_A, 2**40), 60, cost_KQV)


def test_search_of_strided_tensors():
    target_A, level_A = column(80, 1.0)
    tensors = [torch.from_numpy(part).to(DEVICE)[::2] for part in (target_A, level_A)]
    cost_KQV = code_costs().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)

    found_A = search_path(*tensors, cost_KQV, 40)

    parts = (target_A[::2].copy(), level_A[::2].copy(), code_costs().numpy())
    np.testing.assert_array_equal(found_A.cpu().numpy(), reference.search_path(*parts, 40))


def test_cuda_devices_search_with_the_kernel_unless_the_backend_is_the_reference(monkeypatch):
    monkeypatch.setenv("WATERSIC_BACKEND", "auto")
    assert path_search(torch.device("cuda")) is search_path
    assert path_search(torch.device("cpu")) is not search_path
    monkeypatch.setenv("WATERSIC_BACKEND", "reference")
    search = path_search(torch.device("cuda"))
    assert search is not search_path
    target_A, level_A = column(30, 1.0)

    found_A = search(torch.from_numpy(target_A), torch.from_numpy(level_A), code_costs(), 30)

    wanted_A = reference.search_path(target_A, level_A, code_costs().numpy(), 30)
    np.testing.assert_array_equal(found_A.numpy(), wanted_A)
