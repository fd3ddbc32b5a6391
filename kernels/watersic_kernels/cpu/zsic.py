"""Quantize a block of columns with feedback, compiled for CPUs: to a lattice, or to a trellis.

Shapes: B = columns of the block, A = rows of the weight, in the order of the path for a trellis;
        K, Q, V = levels, quantizers and magnitudes of the costs.

Columns are quantized from the last to the first.  What earlier ones feed back is subtracted from a
column when it is its turn, `ROWS` rows at a time, so that these stay in the innermost cache.
"""

import math

import numba
import numpy as np
from numpy import int64

from watersic_kernels.cpu.trellis import find_path

#: Rows whose feedback is subtracted at a time.
ROWS = 512
#: Sums may be reordered, so that several rows are added at a time.
_VECTORS = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True, nogil=True)
def quantize_block(target_BA, chol_BB, step, codes_BA, shrinkage_B):
    """Round the columns of a block; the contract is that of `watersic_hf.core.zsic_block`."""
    for i in range(len(target_BA) - 1, -1, -1):
        _subtract_feedback(target_BA, chol_BB, i)
        _round(target_BA[i], step, codes_BA[i])
        _feed_back(target_BA, chol_BB, i, step, codes_BA, shrinkage_B)


@numba.njit(cache=True, nogil=True)
def quantize_block_by_path(
    target_BA, chol_BB, step, codes_BA, shrinkage_B, level_A, cost_KQV, path_rows, levels
):
    """Quantize the columns of a block by a search through the trellis.

    Args:
        target_BA, chol_BB, step, codes_BA, shrinkage_B: as those of `quantize_block`.
        level_A: levels of the rows relative to that of the column, int64.
        cost_KQV: cost of a code, as that of `watersic_kernels.cpu.trellis.search_path`.
        path_rows: rows of a path.
        levels: levels per octave, and log2 of the scale of the first one in steps.
    """
    per_octave, first = levels
    scaled_A, price_A = np.empty(len(level_A)), np.empty_like(level_A)
    for i in range(len(target_BA) - 1, -1, -1):
        _subtract_feedback(target_BA, chol_BB, i)
        power = _scale(target_BA[i], step, scaled_A)
        if power > 0:
            level = int64(np.rint(per_octave * (math.log2(power) / 2 - first)))
            for a in range(len(level_A)):
                price_A[a] = level_A[a] + level
            find_path(scaled_A, price_A, cost_KQV, path_rows, codes_BA[i])
        else:
            for a in range(len(level_A)):
                codes_BA[i, a] = 0
        _feed_back(target_BA, chol_BB, i, step, codes_BA, shrinkage_B)


@numba.njit(cache=True, nogil=True, fastmath=_VECTORS)
def _subtract_feedback(target_BA, chol_BB, i):
    # rows k > i of the target hold the values that columns k feed back
    for start in range(0, target_BA.shape[1], ROWS):
        y_R = target_BA[i, start : start + ROWS]
        for k in range(i + 1, len(target_BA)):
            factor, fed_R = chol_BB[k, i], target_BA[k, start : start + ROWS]
            for a in range(len(y_R)):
                y_R[a] -= factor * fed_R[a]


@numba.njit(cache=True, nogil=True)
def _round(y_A, step, z_A):
    for a in range(len(y_A)):
        z_A[a] = np.rint(y_A[a] / step)


@numba.njit(cache=True, nogil=True, fastmath=_VECTORS)
def _scale(y_A, step, scaled_A):
    # the mean square of the scaled targets
    power = 0.0
    for a in range(len(y_A)):
        scaled_A[a] = y_A[a] / step
        power += scaled_A[a] * scaled_A[a]
    return power / max(1, len(y_A))


@numba.njit(cache=True, nogil=True, fastmath=_VECTORS)
def _feed_back(target_BA, chol_BB, i, step, codes_BA, shrinkage_B):
    y_A, z_A = target_BA[i], codes_BA[i]
    product, energy = 0.0, 0.0
    for a in range(len(y_A)):
        product += z_A[a] * y_A[a]
        energy += float(z_A[a]) * z_A[a]
    # codes are integers: the energy is 0 or at least 1, and the product is 0 where the energy is
    gain = product / (step * max(energy, 1.0))
    shrinkage_B[i] = gain
    spacing = gain * step / chol_BB[i, i]
    for a in range(len(y_A)):
        y_A[a] = z_A[a] * spacing
