"""Measure the error of a quantized layer, relative to its output and to the theoretical bound.

Shapes: A = out_features (rows), N = in_features (columns).
"""

from __future__ import annotations

from torch import Tensor

from watersic_hf.core.moments import Moments, times
from watersic_hf.core.waterfill import shannon_rate

#: Number of rows that are processed at a time, to bound the memory of float64 copies.
ROWS_PER_BLOCK = 2048


def relative_output_error(weight_AN: Tensor, dequantized_AN: Tensor, moments: Moments) -> float:
    r"""Return :math:`E |W x - \hat W \hat x|^2 / E |W x|^2`, a ratio of mean squares.

    In drift mode :math:`\hat x` is the drifted input, otherwise it is x.  If only a fraction of the
    drift is corrected, x is the interpolated input of `Moments.with_drift`.  The error of the
    residual stream is not included.  A layer whose output is zero has error 0.

    Args:
        weight_AN: original weight W, any float dtype.
        dequantized_AN: dequantized weight.
        moments: second moments of the layer's input.
    """
    error, energy = output_error(weight_AN, dequantized_AN, moments)
    return max(error, 0.0) / energy if energy > 0 else 0.0


def output_error(
    weight_AN: Tensor, dequantized_AN: Tensor, moments: Moments
) -> tuple[float, float]:
    """Return the two mean squares of `relative_output_error`: of the error and of the output.

    Args:
        weight_AN: original weight, any float dtype.
        dequantized_AN: dequantized weight.
        moments: second moments of the layer's input.
    """
    error = energy = 0.0
    cov = moments.cov.double()
    for start in range(0, len(weight_AN), ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        weight_BN = weight_AN[rows].double()
        dequantized_BN = dequantized_AN[rows].double()
        power = float((times(weight_BN, cov) * weight_BN).sum())
        energy += power
        if moments.drifted_cov_NN is None:
            difference_BN = weight_BN - dequantized_BN
            error += float((times(difference_BN, cov) * difference_BN).sum())
        else:
            gained_BN = dequantized_BN @ moments.drifted_cov_NN.double()
            gained_BN -= 2 * (weight_BN @ moments.cross_cov_NN.double())
            error += power + float((gained_BN * dequantized_BN).sum())
    return error, energy


def gap_to_bound(bits: float, variance_N: Tensor, distortion: float) -> float:
    """Return by how many bits per weight a quantizer exceeds the Gaussian rate-distortion bound.

    Args:
        bits: bits per weight that the quantizer spends.
        variance_N: variances of the independent components, as for `shannon_rate`.
        distortion: mean square error per component.
    """
    return bits - shannon_rate(variance_N, distortion)
