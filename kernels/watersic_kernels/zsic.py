"""The ZSIC recursion: quantize a block of columns in one launch.

Shapes: A = out_features (rows), B = columns of the block, P = programs.
Units:  targets and the step are in whitened units, as in `watersic_hf/core/zsic.py`.

Every program has rows of its own and walks through the columns from last to first.  The gain of a
column is a sum over all rows, so after each column all programs wait for each other, at a barrier
in global memory.  This requires all of them to be resident on the device at once, which a
cooperative launch guarantees.  A program that has waited too long continues with NaN as the gain:
if the impossible happens, the result is an error rather than a device that hangs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.launch import on_device_of_tensors

#: Rows that a program processes at a time.
ROWS = 128
#: How often a program polls for the others before it gives up: a few seconds.
PATIENCE = 1 << 23


@on_device_of_tensors
def quantize_block(
    target_BA: Tensor,
    chol_BB: Tensor,
    step: float,
    codes_BA: Tensor,
    shrinkage_B: Tensor,
) -> None:
    """Quantize a block of columns in one launch.

    A gain of NaN means that a program waited in vain for the others.  Reference:
    `watersic_hf.core.zsic_block`.

    Args:
        target_BA: whitened targets, float32 or float64, rows contiguous; overwritten with the
            feedback of each column.
        chol_BB: the block of the Cholesky factor, in the dtype of the target, any strides.
        step: the lattice step.
        codes_BA: int32, rows contiguous; receives the codes.
        shrinkage_B: in the dtype of the target, contiguous; receives the gains.
    """
    columns, rows = target_BA.shape
    # one program in the interpreter: it runs programs one after another, so several never meet
    programs = 1
    if target_BA.is_cuda:
        device = torch.cuda.get_device_properties(target_BA.device)
        programs = min(triton.cdiv(rows, ROWS), device.multi_processor_count)
    sums_B2P = target_BA.new_empty(columns, 2, programs)
    arrived = torch.zeros(1, dtype=torch.int32, device=target_BA.device)
    # a tensor, as Triton passes Python floats as float32
    step_1 = target_BA.new_full((1,), step)
    tensors = (target_BA, chol_BB, step_1, codes_BA, shrinkage_B, sums_B2P, arrived)
    strides = (target_BA.stride(0), codes_BA.stride(0), *chol_BB.stride())
    sizes = (columns, rows, *strides, programs, PATIENCE)
    _block_kernel[(programs,)](
        *tensors,
        *sizes,
        ROWS=ROWS,
        PROGRAMS=triton.next_power_of_2(programs),
        launch_cooperative_grid=True,
    )


@triton.jit(
    do_not_specialize=[
        *("B", "A", "stride_target", "stride_codes", "stride_row", "stride_column"),
        *("programs", "patience"),
    ]
)
def _block_kernel(
    target_BA,
    chol_BB,
    step_1,
    codes_BA,
    shrinkage_B,
    sums_B2P,
    arrived,
    B,
    A,
    stride_target,
    stride_codes,
    stride_row,
    stride_column,
    programs,
    patience,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0)
    others = tl.arange(0, PROGRAMS)
    step = tl.load(step_1)
    for done in range(B):
        i = B - 1 - done
        linear = tl.zeros((ROWS,), target_BA.dtype.element_ty)
        energy = tl.zeros((ROWS,), target_BA.dtype.element_ty)
        for first in range(program * ROWS, A, programs * ROWS):
            a = first + tl.arange(0, ROWS)
            y = tl.load(target_BA + i.to(tl.int64) * stride_target + a, a < A, other=0.0)
            for later in range(done):
                k = B - 1 - later
                fed_back = tl.load(target_BA + k.to(tl.int64) * stride_target + a, a < A, other=0.0)
                y -= fed_back * tl.load(chol_BB + k * stride_row + i * stride_column)
            z = _round(_over(y, step))
            tl.store(codes_BA + i.to(tl.int64) * stride_codes + a, z.to(tl.int32), a < A)
            linear += z * y
            energy += z * z
        sums = sums_B2P + i * 2 * programs
        tl.store(sums + program, tl.sum(linear))
        tl.store(sums + programs + program, tl.sum(energy))
        met = _meet(arrived, (done + 1) * programs, patience)
        # after one failed wait, do not wait again
        patience = tl.where(met, patience, 0)
        # bypass the L1 cache, which does not see what other programs write
        linear_P = tl.load(sums + others, others < programs, other=0.0, cache_modifier=".cg")
        energy_P = tl.load(
            sums + programs + others, others < programs, other=0.0, cache_modifier=".cg"
        )
        gain = _over(tl.sum(linear_P), step * tl.maximum(tl.sum(energy_P), 1.0))
        gain = tl.where(met, gain, float("nan"))
        spacing = _over(gain * step, tl.load(chol_BB + i * (stride_row + stride_column)))
        for first in range(program * ROWS, A, programs * ROWS):
            a = first + tl.arange(0, ROWS)
            z = tl.load(codes_BA + i.to(tl.int64) * stride_codes + a, a < A, other=0)
            out = target_BA + i.to(tl.int64) * stride_target + a
            tl.store(out, z.to(spacing.dtype) * spacing, a < A)
        if program == 0:
            tl.store(shrinkage_B + i, gain)
        # the next column reads the feedback that other threads have written
        tl.debug_barrier()


@triton.jit
def _meet(arrived, expected, patience):
    # release: whoever sees this program arrive also sees what it has written; acquire: the last to
    # arrive, which does not ask again, sees what the others have written
    tl.debug_barrier()
    seen = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") + 1
    asked = 0
    while (seen < expected) & (asked < patience):
        seen = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
        asked += 1
    tl.debug_barrier()
    return seen >= expected


@triton.jit
def _over(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _round(x):
    # to nearest, ties to even: adding this power of two leaves no bits for the fraction
    big: tl.constexpr = 4503599627370496.0 if x.dtype == tl.float64 else 8388608.0
    size = tl.abs(x)
    whole = tl.where(size < big, (size + big) - big, size)
    return tl.where(x < 0, -whole, whole)
