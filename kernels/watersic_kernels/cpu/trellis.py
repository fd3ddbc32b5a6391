"""The search for the cheapest path through the trellis, down one column.

Shapes: A = rows in the order of the path, P = rows of a path; K, Q, V = levels, quantizers and
        magnitudes of the costs.

A state holds three bits: bit 0 is the quantizer Q(t) of row t, bit 1 the sum Q(t - 1) + Q(t - 2),
which p(t) completes to Q(t + 1), and bit 2 is Q(t - 1).  Two states differ in bit 1 only, and their
codes of either parity lead to the same two states: the search is four such butterflies per row.
"""

import numba
import numpy as np
from numpy import float64, int64, uint8

#: Cost of a state that cannot be reached.
UNREACHED = 1e300


@numba.njit(cache=True, nogil=True, inline="always")
def _cheapest(size, quantizer, price_V, priced):
    """Return the cheapest even and odd code for a target of some size: costs and magnitudes."""
    nearest = int64((size + quantizer) * 0.5 + 0.5)
    cost_0, cost_1, code_0, code_1 = UNREACHED, UNREACHED, int64(0), int64(0)
    for i in range(4):
        code = nearest - 1 + i if i < 3 else int64(0)
        if code < 0:
            continue
        away = size - (2 * code - quantizer if code > 0 else 0)
        cost = away * away
        if priced:
            cost += price_V[min(code, len(price_V) - 1)]
        if code & 1:
            if cost < cost_1:
                cost_1, code_1 = cost, code
        elif cost < cost_0:
            cost_0, code_0 = cost, code
    return cost_0, cost_1, code_0, code_1


@numba.njit(cache=True, nogil=True, inline="always")
def _butterfly(first, second, even, odd):
    """Return the costs of the two states that two others lead to, and which lead there, in bits.

    An even code leads from the first to the first, and from the second to the second.
    """
    stay, leave, choice = first + even, first + odd, 0
    if second + odd < stay:
        stay, choice = second + odd, 1
    if second + even < leave:
        leave, choice = second + even, choice | 2
    return stay, leave, choice


def search_path(
    target_A: np.ndarray, level_A: np.ndarray, cost_KQV: np.ndarray, path_rows: int
) -> np.ndarray:
    """Return the values of the cheapest path, int32.

    Args:
        target_A: target of every row in units of the step, float64.
        level_A: level of every row in `cost_KQV`, int64.  Levels below 0 count as 0; beyond the
            last, codes cost nothing.
        cost_KQV: cost of a code by level, quantizer and magnitude, in squared steps, float64; the
            last magnitude stands for all larger ones.
        path_rows: rows of a path; the next one starts after them.
    """
    values_A = np.empty(len(target_A), np.int32)
    find_path(target_A, level_A, cost_KQV, path_rows, values_A)
    return values_A


@numba.njit(cache=True, nogil=True)
def find_path(target_A, level_A, cost_KQV, path_rows, values_A):
    """Find the cheapest path; `values_A` receives its values.  See `search_path`."""
    # for every row: which predecessor each state has, and the codes by quantizer and parity
    length = min(path_rows, len(target_A))
    choice_P = np.empty(length, uint8)
    code_P4 = np.empty((length, 4), int64)
    for start in range(0, len(target_A), path_rows):
        stop = min(start + path_rows, len(target_A))
        c0 = float64(0.0)
        c1 = c2 = c3 = c4 = c5 = c6 = c7 = float64(UNREACHED)
        for row in range(start, stop):
            size = abs(target_A[row])
            level = max(level_A[row], 0)
            priced = level < len(cost_KQV)
            price_QV = cost_KQV[level if priced else 0]
            b0, b1, k0, k1 = _cheapest(size, 0, price_QV[0], priced)
            b2, b3, k2, k3 = _cheapest(size, 1, price_QV[1], priced)
            t = row - start
            code_P4[t, 0], code_P4[t, 1], code_P4[t, 2], code_P4[t, 3] = k0, k1, k2, k3
            n0, n1, choice_01 = _butterfly(c0, c2, b0, b1)
            n2, n3, choice_23 = _butterfly(c4, c6, b0, b1)
            n4, n5, choice_45 = _butterfly(c5, c7, b2, b3)
            n6, n7, choice_67 = _butterfly(c1, c3, b2, b3)
            choice_P[t] = choice_01 | choice_23 << 2 | choice_45 << 4 | choice_67 << 6
            c0, c1, c2, c3, c4, c5, c6, c7 = n0, n1, n2, n3, n4, n5, n6, n7
        costs = (c0, c1, c2, c3, c4, c5, c6, c7)
        state = 0
        for other in range(8):
            if costs[other] < costs[state]:
                state = other
        for row in range(stop - 1, start - 1, -1):
            t = row - start
            bit_0, bit_1, quantizer = state & 1, state >> 1 & 1, state >> 2
            second = choice_P[t] >> state & 1
            code = code_P4[t, 2 * quantizer + (bit_0 ^ second)]
            value = 2 * code - quantizer if code > 0 else 0
            values_A[row] = -value if target_A[row] < 0 else value
            state = quantizer | second << 1 | (bit_1 ^ quantizer) << 2
