"""The search for the cheapest path through the trellis, down one column.

Shapes: A = rows in the order of the path; K, Q, V = levels, quantizers and magnitudes of the costs;
        4 = the quantizers times the parities of a code, ``2 * quantizer + parity``.

The states and the four butterflies per row are those of `watersic_kernels/cpu/trellis.py`.  All
arithmetic is in float64, in the same order and without fused multiply-adds, so that both searches
return the same values.

The first kernel prepares all rows in parallel: it finds the cheapest codes of either parity.  The
second one has a program of one warp per path.  The rows of a path depend on each other, so its
scalars are the same in all threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.launch import on_device_of_tensors

#: Rows that a program processes at a time, where rows do not depend on each other.
ROWS = 128
#: Cost of a state that cannot be reached.
UNREACHED = tl.constexpr(1e300)


@on_device_of_tensors
def search_path(target_A: Tensor, level_A: Tensor, cost_KQV: Tensor, path_rows: int) -> Tensor:
    """Return the values of the cheapest path, int32, on the device of the target.

    Reference: `watersic_kernels.cpu.trellis.search_path`.

    Args:
        target_A: target of every row in units of the step, float64.
        level_A: level of every row in `cost_KQV`, int64.  Levels below 0 count as 0; beyond the
            last, codes cost nothing.
        cost_KQV: cost of a code by level, quantizer and magnitude, in squared steps, float64; the
            last magnitude stands for all larger ones.
        path_rows: rows of a path; the next one starts after them.
    """
    A = len(target_A)
    K, _, V = cost_KQV.shape
    values_A = target_A.new_empty(A, dtype=torch.int32)
    if A == 0:
        return values_A
    best_A4 = target_A.new_empty(A, 4)
    value_A4 = target_A.new_empty(A, 4, dtype=torch.int32)
    choice_A, chosen_A = target_A.new_empty(2, A, dtype=torch.uint8)
    tensors = (target_A, level_A, cost_KQV)
    inputs = [tensor.to(target_A.device).contiguous() for tensor in tensors]
    _prepare_kernel[(triton.cdiv(A, ROWS),)](
        *inputs, best_A4, value_A4, A, K, V, ROWS=ROWS, num_warps=4, enable_fp_fusion=False
    )
    scratch = (best_A4, value_A4, choice_A, chosen_A)
    _search_kernel[(triton.cdiv(A, path_rows),)](
        *scratch, values_A, A, path_rows, ROWS=ROWS, num_warps=1, enable_fp_fusion=False
    )
    return values_A


@triton.jit(do_not_specialize=["A", "K", "V"])
def _prepare_kernel(target_A, level_A, cost_KQV, best_A4, value_A4, A, K, V, ROWS: tl.constexpr):
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_A + a, a < A, other=0.0)
    level = tl.maximum(tl.load(level_A + a, a < A, other=0), 0)
    priced = (a < A) & (level < K)
    for quantizer in tl.static_range(2):
        price_V = cost_KQV + (2 * level + quantizer) * V
        even, odd, even_code, odd_code = _cheapest(tl.abs(target), quantizer, price_V, priced, V)
        at = 4 * a + 2 * quantizer
        tl.store(best_A4 + at, even, a < A)
        tl.store(best_A4 + at + 1, odd, a < A)
        tl.store(value_A4 + at, _value(target, even_code, quantizer), a < A)
        tl.store(value_A4 + at + 1, _value(target, odd_code, quantizer), a < A)


@triton.jit
def _cheapest(size, quantizer: tl.constexpr, price_V, priced, V):
    # the cheapest even and odd code for targets of some size: costs and magnitudes
    nearest = ((size + quantizer) * 0.5 + 0.5).to(tl.int64)
    even = tl.full(size.shape, UNREACHED, tl.float64)
    odd = tl.full(size.shape, UNREACHED, tl.float64)
    even_code = tl.zeros(size.shape, tl.int64)
    odd_code = tl.zeros(size.shape, tl.int64)
    for i in tl.static_range(4):
        # the last candidate is 0, which is often the cheapest although it is not near
        code = nearest - 1 + i if i < 3 else tl.zeros(size.shape, tl.int64)
        valid = code >= 0
        away = size - tl.where(code > 0, 2 * code - quantizer, 0).to(tl.float64)
        price = tl.load(price_V + tl.minimum(code, V - 1), priced & valid, other=0.0)
        cost = away * away + price
        is_odd = (code & 1) == 1
        is_even = (code & 1) == 0
        better = valid & is_even & (cost < even)
        even = tl.where(better, cost, even)
        even_code = tl.where(better, code, even_code)
        better = valid & is_odd & (cost < odd)
        odd = tl.where(better, cost, odd)
        odd_code = tl.where(better, code, odd_code)
    return even, odd, even_code, odd_code


@triton.jit
def _value(target, code, quantizer: tl.constexpr):
    size = tl.where(code > 0, 2 * code - quantizer, 0)
    return tl.where(target < 0, -size, size).to(tl.int32)


@triton.jit(do_not_specialize=["A", "path_rows"])
def _search_kernel(
    best_A4, value_A4, choice_A, chosen_A, values_A, A, path_rows, ROWS: tl.constexpr
):
    start = tl.program_id(0) * path_rows
    length = tl.minimum(path_rows, A - start)
    best_P4 = best_A4 + 4 * start
    choice_P = choice_A + start
    c0 = tl.full((), 0.0, tl.float64)
    c1 = tl.full((), UNREACHED, tl.float64)
    c2, c3, c4, c5, c6, c7 = c1, c1, c1, c1, c1, c1
    # the costs of a row are loaded while the row before it is processed
    b0, b1, b2, b3 = _costs(best_P4, length > 0)
    for t in range(length):
        best_P4 += 4
        next0, next1, next2, next3 = _costs(best_P4, t + 1 < length)
        n0, n1, choice_01 = _butterfly(c0, c2, b0, b1)
        n2, n3, choice_23 = _butterfly(c4, c6, b0, b1)
        n4, n5, choice_45 = _butterfly(c5, c7, b2, b3)
        n6, n7, choice_67 = _butterfly(c1, c3, b2, b3)
        choice = choice_01 | choice_23 << 2 | choice_45 << 4 | choice_67 << 6
        tl.store(choice_P + t, choice.to(tl.uint8))
        c0, c1, c2, c3, c4, c5, c6, c7 = n0, n1, n2, n3, n4, n5, n6, n7
        b0, b1, b2, b3 = next0, next1, next2, next3
    least = c0
    state = tl.full((), 0, tl.int32)
    costs = (c0, c1, c2, c3, c4, c5, c6, c7)
    for other in tl.static_range(1, 8):
        state = tl.where(costs[other] < least, other, state)
        least = tl.minimum(costs[other], least)
    # one thread has written the choices, and all threads read them
    tl.debug_barrier()
    choice = tl.load(choice_P + length - 1).to(tl.int32)
    for done in range(length):
        t = length - 1 - done
        previous = tl.load(choice_P + t - 1, t > 0, other=0).to(tl.int32)
        quantizer = state >> 2
        second = choice >> state & 1
        tl.store(chosen_A + start + t, (2 * quantizer + (state & 1 ^ second)).to(tl.uint8))
        state = quantizer | second << 1 | ((state >> 1 & 1) ^ quantizer) << 2
        choice = previous
    tl.debug_barrier()
    for first in range(0, length, ROWS):
        p = first + tl.arange(0, ROWS)
        chosen = tl.load(chosen_A + start + p, p < length, other=0).to(tl.int32)
        value = tl.load(value_A4 + 4 * (start + p) + chosen, p < length, other=0)
        tl.store(values_A + start + p, value, p < length)


@triton.jit
def _costs(best_4, wanted):
    b0 = tl.load(best_4, wanted, other=0.0)
    b1 = tl.load(best_4 + 1, wanted, other=0.0)
    b2 = tl.load(best_4 + 2, wanted, other=0.0)
    b3 = tl.load(best_4 + 3, wanted, other=0.0)
    return b0, b1, b2, b3


@triton.jit
def _butterfly(first, second, even, odd):
    # the costs of the two states that two others lead to, and which lead there, in bits
    by_second = second + odd < first + even
    stay = tl.where(by_second, second + odd, first + even)
    choice = by_second.to(tl.int32)
    by_second = second + even < first + odd
    leave = tl.where(by_second, second + even, first + odd)
    return stay, leave, choice | by_second.to(tl.int32) << 1
