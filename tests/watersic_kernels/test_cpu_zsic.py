import pytest
import torch

from watersic_hf.core.trellis import Trellis, row_path, row_power
from watersic_hf.core.zsic import zsic, zsic_block
from watersic_hf.nn import block_step, path_search

pytest.importorskip("numba")
CPU = torch.device("cpu")


def problem(rows, columns, dtype=torch.float64, seed=0):
    """Targets of very different scales, columns of zeros, and a factor with strong feedback."""
    g = torch.Generator().manual_seed(seed)
    target_AN = 3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)
    target_AN *= 2 ** torch.randn(rows, 1, generator=g, dtype=torch.float64)
    target_AN[:, ::9] *= 1e-3
    root_NN = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    eye_NN = torch.eye(columns, dtype=torch.float64)
    chol_NN = torch.linalg.cholesky(root_NN @ root_NN.T + columns * eye_NN)
    return target_AN.to(dtype), (chol_NN / chol_NN.diagonal().mean()).to(dtype)


def trellis_of(target_AN):
    return Trellis(search=path_search(CPU), path=row_path(row_power(target_AN)))


@pytest.mark.parametrize("lattice", ["scalar", "trellis"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 33), (300, 5), (1500, 100)])
def test_compiled_step_gives_the_codes_of_the_reference(shape, lattice):
    target_AN, chol_NN = problem(*shape)
    trellis = None if lattice == "scalar" else trellis_of(target_AN)

    found = zsic(target_AN, chol_NN, 0.7, block_step=block_step(CPU), trellis=trellis)
    wanted = zsic(target_AN, chol_NN, 0.7, block_step=zsic_block, trellis=trellis)

    assert torch.equal(found[0], wanted[0])
    # sums in another order
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lattice", ["scalar", "trellis"])
def test_float32_targets(lattice):
    target_AN, chol_NN = problem(400, 70, torch.float32)
    trellis = None if lattice == "scalar" else trellis_of(target_AN)

    found = zsic(target_AN, chol_NN, 0.7, block_step=block_step(CPU), trellis=trellis)
    wanted = zsic(target_AN, chol_NN, 0.7, block_step=zsic_block, trellis=trellis)

    # a code at the border between two can fall on either side, which then feeds back
    assert float((found[0] != wanted[0]).float().mean()) < 0.01
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-2, atol=1e-3)


def test_step_writes_what_it_feeds_back():
    target_AN, chol_NN = problem(50, 12)
    target_BA = target_AN.T.contiguous()
    codes_BA = torch.full((12, 50), 0x7F7F7F7F, dtype=torch.int32)
    shrinkage_B = torch.full((12,), float("nan"), dtype=torch.float64)

    block_step(CPU)(target_BA, chol_NN, 0.5, codes_BA, shrinkage_B)

    fed_BA = codes_BA * (shrinkage_B * 0.5 / chol_NN.diagonal())[:, None]
    torch.testing.assert_close(target_BA, fed_BA, rtol=1e-12, atol=1e-12)


def test_columns_of_zeros_have_codes_and_gain_zero():
    target_AN, chol_NN = problem(20, 6)
    target_AN.zero_()
    for trellis in (None, trellis_of(target_AN)):
        codes_AN, shrinkage_N = zsic(
            target_AN, chol_NN, 0.5, block_step=block_step(CPU), trellis=trellis
        )
        assert not bool(codes_AN.any())
        assert not bool(shrinkage_N.any())
