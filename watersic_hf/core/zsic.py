r"""Round to a lattice or a trellis by successive interference cancellation, with gains.

Shapes: A = out_features (rows), N = in_features (columns), B = columns of one block.
Units:  targets and `step` are in whitened units, the values that are fed back in weight units.
Transposed copies (`_NA`) keep one column of the weight contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from watersic_hf.core.moments import not_finite
from watersic_hf.core.trellis import Trellis

#: Number of columns that the plain recursion handles; everything else is matrix products.
BLOCK = 32
#: Largest code magnitude that is allowed in int32.
LARGEST_CODE = 2**30

#: ``block_step(target_BA, chol_BB, step, codes_BA, shrinkage_B, trellis=...)``: see `zsic_block`.
#: It is called without the last argument if there is no trellis.
BlockStep = Callable[..., None]


def zsic_block(
    target_NA: Tensor,
    chol_NN: Tensor,
    step: float,
    codes_NA: Tensor,
    shrinkage_N: Tensor,
    trellis: Trellis | None = None,
) -> None:
    r"""Quantize columns from last to first, and cancel the error of each in the remaining ones.

    .. math:: z = \operatorname{round}(Y_i / c), \quad
              \gamma_i = \frac{\langle z, Y_i \rangle}{c \langle z, z \rangle}, \quad
              Y \leftarrow Y - \gamma_i \alpha_i z L_{i,:}, \quad \alpha_i = c / \ell_{ii}.

    A column whose codes are all zero has gain 0 and changes no other column.

    Args:
        target_NA: target Y, one row per column of the weight.  It is overwritten: on return, row i
            holds :math:`\gamma_i \alpha_i z`, which the caller subtracts from preceding columns.
        chol_NN: lower Cholesky factor L of these columns, in the dtype of the target.
        step: lattice step c.
        codes_NA: output, codes z, int32.
        shrinkage_N: output, gains :math:`\gamma`, in the dtype of the target.
        trellis: chooses z instead of rounding; default: z is rounded.
    """
    for i in reversed(range(len(target_NA))):
        y_A = target_NA[i]
        z_A = (y_A / step).round_() if trellis is None else trellis.values(y_A, step)
        codes_NA[i] = z_A
        z_A = z_A.to(y_A.dtype)
        # codes are integers: the energy is 0 or at least 1, and z @ y is 0 where the energy is
        gain = z_A.dot(y_A) / (step * z_A.dot(z_A).clamp(min=1))
        shrinkage_N[i] = gain
        torch.mul(z_A, gain * step / chol_NN[i, i], out=y_A)
        target_NA[:i].addr_(chol_NN[i, :i], y_A, alpha=-1)


def zsic(
    target_AN: Tensor,
    chol: Tensor,
    step: float,
    *,
    block_step: BlockStep = zsic_block,
    trellis: Trellis | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the codes and gains of `zsic_block`, with nearly all the work in matrix products.

    The columns are halved recursively: the right half is quantized, its values are subtracted from
    the left half with one matrix product, and then the left half is quantized.  Arithmetic is done
    in the dtype of the target.  The function allocates a copy of the target and the codes.

    Args:
        target_AN: target Y, any memory layout; it is not changed.
        chol: lower Cholesky factor L, in the dtype of the target.  A 1-D factor is a diagonal; the
            columns are then independent, and the recursion is plain rounding.
        step: lattice step c.
        block_step: function that quantizes up to `BLOCK` columns, with the contract of
            `zsic_block`; default: `zsic_block`.  It gets a trellis as a keyword argument.
        trellis: chooses values instead of rounding; default: codes are rounded.

    Returns:
        The codes, or the values of the trellis, (A, N), int32, and the gains (N,), in the dtype of
        the target.

    Raises:
        RuntimeError: a gain is not finite, which is how a `block_step` kernel reports a failure.
        ValueError: the step is so fine that the codes would not fit into int32.
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
    order_A = None if trellis is None else trellis.path.order_A
    if chol.ndim == 1:
        for start in range(0, N, BLOCK):
            block = slice(start, start + BLOCK)
            target_BA = target_AN.T[block] if order_A is None else target_AN.T[block, order_A]
            _round_columns(target_BA, step, codes_NA[block], shrinkage_N[block], trellis)
        return _in_order(codes_NA, order_A), shrinkage_N
    if trellis is None:
        work_NA = target_AN.T.clone(memory_format=torch.contiguous_format)
    else:
        work_NA = target_AN[order_A].T.contiguous()
        block_step = functools.partial(block_step, trellis=trellis)
    _quantize_columns(work_NA, chol, step, codes_NA, shrinkage_N, block_step)
    bad = not_finite(shrinkage_N)
    if bad:
        raise RuntimeError(
            f"zsic: the gains of {bad} columns are not finite at step {step:g}, which means that "
            f"the kernel failed. Set WATERSIC_BACKEND=reference to quantize without it."
        )
    return _in_order(codes_NA, order_A), shrinkage_N


def _in_order(codes_NA: Tensor, order_A: Tensor | None) -> Tensor:
    """Return codes (A, N) in the order of the rows of the weight."""
    return codes_NA.T if order_A is None else codes_NA.T[order_A.argsort()]


def _quantize_columns(
    target_NA: Tensor,
    chol: Tensor,
    step: float,
    codes_NA: Tensor,
    shrinkage_N: Tensor,
    block_step: BlockStep,
) -> None:
    """Quantize columns in place, the right half first.

    This is not a nested function of `zsic`: a nested function that calls itself is a reference
    cycle, and would keep the tensors alive until the garbage collector runs.
    """
    N = len(target_NA)
    if N <= BLOCK:
        block_step(target_NA, chol, step, codes_NA, shrinkage_N)
        return
    # the right half is a multiple of BLOCK, so that at most one block is smaller
    middle = N - BLOCK * max(1, N // (2 * BLOCK))
    left, right = slice(0, middle), slice(middle, N)
    for half in (right, left):
        _quantize_columns(
            target_NA[half], chol[half, half], step, codes_NA[half], shrinkage_N[half], block_step
        )
        if half is right:
            target_NA[left].addmm_(chol[right, left].T, target_NA[right], alpha=-1)


def _round_columns(
    target_BA: Tensor,
    step: float,
    codes_BA: Tensor,
    shrinkage_B: Tensor,
    trellis: Trellis | None,
) -> None:
    """Quantize columns that are independent of each other."""
    if trellis is None:
        z_BA = (target_BA / step).round_()
    else:
        z_BA = torch.stack([trellis.values(y_A, step) for y_A in target_BA])
    codes_BA.copy_(z_BA)
    z_BA = z_BA.to(target_BA.dtype)
    energy_B = z_BA.square().sum(1).clamp(min=1)
    shrinkage_B.copy_(z_BA.mul_(target_BA).sum(1) / (step * energy_B))
