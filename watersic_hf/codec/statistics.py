"""Entropies of a matrix of codes, as a reference for the size of its payload.

Shapes: A = rows, N = columns, K = keys.
"""

from dataclasses import dataclass

import numpy as np

from watersic_hf.codec.fit import Fit, row_blocks

#: Magnitude up to which values are counted in a histogram; the few larger ones are sorted.
COUNTED = 2047


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of the distribution of codes; entropies are in bits per code.

    Attributes:
        pooled_entropy: entropy of the histogram of all codes.
        class_entropy: mean entropy of the histograms of the codes with the same key.
        row_classes, col_classes: number of different classes of the rows and of the columns.
        tables: number of different symbol tables in use.
        escapes: number of codes that are not in the symbol table of their key.
        max_abs: largest magnitude of a code.
    """

    pooled_entropy: float
    class_entropy: float
    row_classes: int
    col_classes: int
    tables: int
    escapes: int
    max_abs: int


def codes_statistics(
    codes_AN: np.ndarray, fit: Fit, quantizer_AN: np.ndarray | None = None
) -> CodeStatistics:
    """Return the statistics of a matrix of int32 codes.

    Args:
        codes_AN: codes.
        fit: their model.
        quantizer_AN: what is added to the keys, if these are codes of a trellis.
    """
    if codes_AN.size == 0:
        return CodeStatistics(0.0, 0.0, 0, 0, 0, 0, 0)
    model = fit.model
    return CodeStatistics(
        pooled_entropy=_entropy(
            codes_AN, np.zeros_like(model.row_class_A), np.zeros_like(model.col_class_N)
        ),
        class_entropy=_entropy(codes_AN, model.row_class_A, model.col_class_N, quantizer_AN),
        row_classes=len(np.unique(model.row_class_A)),
        col_classes=len(np.unique(model.col_class_N)),
        tables=len(np.unique(model.table_K[fit.count_KS.any(1)])),
        escapes=fit.escapes,
        max_abs=max(-int(codes_AN.min()), int(codes_AN.max())),
    )


def _entropy(
    codes_AN: np.ndarray,
    row_class_A: np.ndarray,
    col_class_N: np.ndarray,
    quantizer_AN: np.ndarray | None = None,
) -> float:
    """Return the mean entropy of the histograms of the keys, in bits per code.

    The key of a code is the sum of its row class, its column class and its quantizer, if any.
    """
    keys, width = int(row_class_A.max() + col_class_N.max()) + 2, 2 * COUNTED + 1
    count = np.zeros(keys * width)
    beyond = []
    for rows in row_blocks(codes_AN):
        codes = codes_AN[rows].astype(np.int64)
        key = row_class_A[rows, None] + col_class_N
        if quantizer_AN is not None:
            key = key + quantizer_AN[rows]
        inside = np.abs(codes) <= COUNTED
        index = (key * width + codes + COUNTED)[inside]
        count += np.bincount(index, minlength=len(count))
        beyond.append(np.stack([key[~inside], codes[~inside]]))
    far, far_count = np.unique(np.concatenate(beyond, axis=1), axis=1, return_counts=True)
    total_K = count.reshape(keys, width).sum(1)
    total_K += np.bincount(far[0], weights=far_count, minlength=keys)
    spent = _log_sum(total_K) - _log_sum(count) - _log_sum(far_count)
    return float(spent / codes_AN.size)


def _log_sum(count: np.ndarray) -> float:
    """Return the sum of n log2(n) over counts n."""
    count = count[count > 0].astype(np.float64)
    return float((count * np.log2(count)).sum())
