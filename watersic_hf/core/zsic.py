r"""Successive interference cancellation on the integer lattice, with a least-squares gain.

Shapes: A = out_features (rows), N = in_features (columns), B = columns of one block.
Units:  targets and `step` are in whitened units, the fed-back values in weight units.
Transposed copies (`_NA`) keep one column of the weight contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from watersic_hf.core.moments import not_finite

#: Columns that the plain recursion handles at a time; the rest of the work is matrix products.
BLOCK = 32
#: Largest code magnitude that is still safe in int32.
LARGEST_CODE = 2**30

#: ``block_step(target_BA, chol_BB, step, codes_BA, shrinkage_B)``: see `zsic_block`.
BlockStep = Callable[[Tensor, Tensor, float, Tensor, Tensor], None]


def zsic_block(
    target_NA: Tensor, chol_NN: Tensor, step: float, codes_NA: Tensor, shrinkage_N: Tensor
) -> None:
    r"""Quantize columns from last to first, each cancelling its error from those still to come.

    .. math:: z = \operatorname{round}(Y_i / c), \quad
              \gamma_i = \frac{\langle z, Y_i \rangle}{c \langle z, z \rangle}, \quad
              Y \leftarrow Y - \gamma_i \alpha_i z L_{i,:}, \quad \alpha_i = c / \ell_{ii}.

    A column whose codes are all zero has gain 0 and cancels nothing.

    Args:
        target_NA: Y, one row per column of the weight.  Overwritten: on return row i holds
            :math:`\gamma_i \alpha_i z`, which the caller feeds back to the columns before these.
        chol_NN: lower Cholesky factor L.
        step: c.
        codes_NA: receives z, int32.
        shrinkage_N: receives :math:`\gamma`, in the dtype of the target.
    """
    for i in reversed(range(len(target_NA))):
        y_A = target_NA[i]
        z_A = (y_A / step).round_()
        # codes are integers: the energy is 0 or at least 1, and z @ y is 0 where the energy is
        gain = z_A.dot(y_A) / (step * z_A.dot(z_A).clamp(min=1))
        codes_NA[i] = z_A
        shrinkage_N[i] = gain
        torch.mul(z_A, gain * step / chol_NN[i, i], out=y_A)
        target_NA[:i].addr_(chol_NN[i, :i], y_A, alpha=-1)


def zsic(
    target_AN: Tensor, chol: Tensor, step: float, *, block_step: BlockStep = zsic_block
) -> tuple[Tensor, Tensor]:
    """Return the codes and gains of `zsic_block`, with nearly all work in matrix products.

    The columns are halved recursively: the right half is quantized, its values are fed back to the
    left half with one product, then the left half follows.  Arithmetic is in the dtype of the
    target; besides it, one copy of it and the codes are held.

    Args:
        target_AN: Y, any layout; not changed.
        chol: lower Cholesky factor L in the dtype of the target.  A 1-D factor is a diagonal: no
            column disturbs another, and plain rounding is the recursion.
        step: c.
        block_step: quantizes up to `BLOCK` columns with the contract of `zsic_block`.

    Returns:
        codes_AN (int32) and shrinkage_N (dtype of the target).

    Raises:
        RuntimeError: a gain is not finite, as a kernel says that it did not work.
        ValueError: the step is so fine that the codes leave int32.
    """
    largest = float(target_AN.abs().max()) / step if target_AN.numel() else 0.0
    if not largest < LARGEST_CODE:
        raise ValueError(
            f"zsic: step {step:g} gives codes up to {largest:.3g}, beyond {LARGEST_CODE}; use a "
            f"lower rate."
        )
    A, N = target_AN.shape
    codes_NA = torch.empty(N, A, dtype=torch.int32, device=target_AN.device)
    shrinkage_N = target_AN.new_empty(N)
    if chol.ndim == 1:
        for start in range(0, N, BLOCK):
            block = slice(start, start + BLOCK)
            _round_columns(target_AN.T[block], step, codes_NA[block], shrinkage_N[block])
        return codes_NA.T, shrinkage_N
    work_NA = target_AN.T.clone(memory_format=torch.contiguous_format)

    _quantize_columns(work_NA, chol, step, codes_NA, shrinkage_N, block_step)
    bad = not_finite(shrinkage_N)
    if bad:
        raise RuntimeError(
            f"zsic: the gains of {bad} columns are not finite at step {step:g}, as those of a "
            f"kernel whose programs do not meet. Quantize without it: WATERSIC_BACKEND=reference."
        )
    return codes_NA.T, shrinkage_N


def _quantize_columns(
    target_NA: Tensor,
    chol: Tensor,
    step: float,
    codes_NA: Tensor,
    shrinkage_N: Tensor,
    block_step: BlockStep,
) -> None:
    """Quantize columns, the right half first.

    No function within `zsic`: one that calls itself holds all of this in memory until the garbage
    collector finds it.
    """
    N = len(target_NA)
    if N <= BLOCK:
        block_step(target_NA, chol, step, codes_NA, shrinkage_N)
        return
    # the right half is a multiple of BLOCK, so that only one block is ragged
    middle = N - BLOCK * max(1, N // (2 * BLOCK))
    left, right = slice(0, middle), slice(middle, N)
    for half in (right, left):
        _quantize_columns(
            target_NA[half], chol[half, half], step, codes_NA[half], shrinkage_N[half], block_step
        )
        if half is right:
            target_NA[left].addmm_(chol[right, left].T, target_NA[right], alpha=-1)


def _round_columns(target_BA: Tensor, step: float, codes_BA: Tensor, shrinkage_B: Tensor) -> None:
    """Quantize columns that do not disturb each other."""
    z_BA = (target_BA / step).round_()
    energy_B = z_BA.square().sum(1).clamp(min=1)
    codes_BA.copy_(z_BA)
    shrinkage_B.copy_(z_BA.mul_(target_BA).sum(1) / (step * energy_B))
