import pytest
import torch

from watersic_hf.core import inplace
from watersic_hf.core.inplace import factorize_lower_, restore_lower_, select_


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(inplace, "PANEL", 16)


def symmetric(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_TN = torch.randn(3 * size, size, generator=g, dtype=torch.float64)
    product_NN = x_TN.T @ x_TN / len(x_TN)
    return (product_NN + product_NN.T) / 2


@pytest.mark.parametrize("size", [1, 16, 50])
def test_lower_triangle_holds_the_cholesky_factor(size):
    matrix_NN = symmetric(size)
    expected = torch.linalg.cholesky(matrix_NN)
    above = matrix_NN.triu(1)

    assert factorize_lower_(matrix_NN)

    torch.testing.assert_close(matrix_NN.tril(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(matrix_NN.triu(1), above)


@pytest.mark.parametrize("size", [1, 16, 50])
def test_restored_matrix_has_the_same_bits(size):
    matrix_NN = symmetric(size)
    before, diagonal_N = matrix_NN.clone(), matrix_NN.diagonal().clone()

    factorize_lower_(matrix_NN)
    restore_lower_(matrix_NN, diagonal_N)

    assert torch.equal(matrix_NN, before)


def test_indefinite_matrix_is_reported_and_can_be_restored():
    matrix_NN = symmetric(50)
    matrix_NN[40, 40] = -1.0
    before, diagonal_N = matrix_NN.clone(), matrix_NN.diagonal().clone()

    assert not factorize_lower_(matrix_NN)
    restore_lower_(matrix_NN, diagonal_N)

    assert torch.equal(matrix_NN, before)


def test_selected_columns_stay_in_the_memory_of_the_matrix():
    matrix_NN = torch.randn(50, 50)
    live_N = torch.rand(50) > 0.3
    expected, memory = matrix_NN[live_N][:, live_N], matrix_NN.data_ptr()

    found = select_(matrix_NN, live_N)

    assert torch.equal(found, expected)
    assert found.data_ptr() == memory
    assert select_(found, torch.ones(len(found), dtype=torch.bool)) is found
