"""Factor, restore and shrink a moment in the memory that it occupies, where a copy would not fit.

Shapes: N = in_features, K = live columns.

A symmetric moment needs only one triangle of its matrix.  Its Cholesky factor takes the lower one,
while the upper one keeps the moment, from which the whole matrix is restored to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Number of rows or columns that are processed at a time.
PANEL = 1024


def _panels(size: int) -> Iterator[slice]:
    for start in range(0, size, PANEL):
        yield slice(start, min(start + PANEL, size))


def factorize_lower_(matrix_NN: Tensor) -> bool:
    """Replace the lower triangle of a symmetric matrix, diagonal included, by its Cholesky factor.

    The entries above the diagonal are not changed, so `restore_lower_` can undo this.

    Args:
        matrix_NN: matrix to factor.

    Returns:
        Whether the matrix is positive definite; otherwise the lower triangle is unusable.
    """
    N = len(matrix_NN)
    for here in _panels(N):
        left, below = slice(0, here.start), slice(here.stop, N)
        square = matrix_NN[here, here].clone()
        square.addmm_(matrix_NN[here, left], matrix_NN[here, left].T, alpha=-1)
        chol, info = torch.linalg.cholesky_ex(square)
        if int(info) != 0:
            return False
        matrix_NN[here, here] = chol + matrix_NN[here, here].triu(1)
        column = matrix_NN[below, here]
        column.addmm_(matrix_NN[below, left], matrix_NN[here, left].T, alpha=-1)
        column.copy_(torch.linalg.solve_triangular(chol, column.T, upper=False).T)
    return True


def restore_lower_(matrix_NN: Tensor, diagonal_N: Tensor) -> None:
    """Undo `factorize_lower_`: mirror the upper triangle, and set the diagonal.

    Args:
        matrix_NN: matrix whose entries above the diagonal are those of the symmetric matrix.
        diagonal_N: its diagonal.
    """
    for here in _panels(len(matrix_NN)):
        matrix_NN[here, : here.start] = matrix_NN[: here.start, here].T
        square = matrix_NN[here, here].triu(1)
        matrix_NN[here, here] = square + square.T
    matrix_NN.diagonal().copy_(diagonal_N)


def select_(matrix_NN: Tensor, live_N: Tensor) -> Tensor:
    """Return the rows and columns of the live columns, in the memory of the matrix.

    Args:
        matrix_NN: contiguous matrix; it is overwritten unless all columns are live.
        live_N: bool, True for the columns to keep.
    """
    if bool(live_N.all()):
        return matrix_NN
    kept = live_N.nonzero()[:, 0]
    K, flat = len(kept), matrix_NN.view(-1)
    # row r moves to row at most r and gets shorter, so it overwrites only rows that are done
    for here in _panels(K):
        rows = matrix_NN[kept[here]][:, kept]
        flat[here.start * K : here.stop * K] = rows.view(-1)
    return flat[: K * K].view(K, K)
