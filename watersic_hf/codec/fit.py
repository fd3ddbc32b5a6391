"""Fit the model of a payload to a matrix of codes: classes, tables, and what they cost.

The encoder is free in this choice: a decoder accepts any classes and tables, and the ones that are
chosen here give short payloads.  All sums that a choice depends on are sums of integers, which are
exact in float64, so that neither the order of summation nor the number of threads changes a
payload.

Shapes: A = rows, N = columns, K = keys, S = 256 symbols, T = tables.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from watersic_hf.codec import compiled
from watersic_hf.codec.layout import LARGE
from watersic_hf.codec.model import (
    COST_UNIT,
    EVEN_TABLES,
    MAX_SHIFT,
    SYMBOLS,
    WORD_BITS,
    CodeModel,
    first_tables,
    library,
    split_values,
    to_symbols,
)

#: log2 of the smallest and the largest standard deviation of a column class.
SCALE_RANGE = (-3.0, 31.0)
#: log2 of the smallest and the largest factor of a row class.
ROW_RANGE = (-6.0, 6.0)
#: Bound of a magnitude in the estimate of its column's scale, as a multiple of the column's mean.
COL_BOUND = 8
#: Bound of a magnitude in the estimate of its row's factor, as a multiple of the column's bound.
ROW_BOUND = 8
#: Number of iterations for the bounds of the columns, and number of codes in the sample for them.
COL_ROUNDS, SAMPLE = 2, 1 << 20
#: Number of codes that are processed at a time.
BLOCK = 1 << 15
#: Classes per octave with a trellis, whose row classes are chosen before the codes.
TRELLIS_RESOLUTION = 8
#: Largest class of a row with a trellis, so that there are not too many keys.
MAX_ROW_CLASS = 96


def rounded_magnitude(scale: np.ndarray) -> np.ndarray:
    """Return E|round(scale * g)| for a standard normal g."""
    tails = np.zeros_like(scale)
    for i in range(40):
        tails += [math.erfc((i + 0.5) / (s * math.sqrt(2))) for s in np.minimum(scale, 4.0)]
    return np.where(scale < 4, tails, scale * math.sqrt(2 / math.pi))


@functools.lru_cache(maxsize=1)
def _magnitude_curve() -> tuple[np.ndarray, np.ndarray]:
    """Return log2 of a range of scales, in ascending order, and their `rounded_magnitude`."""
    log_scale = np.arange(-80, 32 * 16) / 16
    return log_scale, rounded_magnitude(2.0**log_scale)


def row_blocks(codes_AN: np.ndarray) -> list[slice]:
    """Return blocks of consecutive rows that are small enough for the cache."""
    size = max(1, BLOCK // max(1, codes_AN.shape[1]))
    return [slice(i, i + size) for i in range(0, codes_AN.shape[0], size)]


def _magnitudes(codes_AN: np.ndarray, bound_N: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of rows, and min(|code|, bound) for them, float64."""
    for rows in row_blocks(codes_AN):
        magnitude = np.abs(codes_AN[rows].astype(np.float64))
        yield rows, np.minimum(magnitude, bound_N, out=magnitude)


def _column_means(codes_AN: np.ndarray, bound_N: np.ndarray, step: int = 1) -> np.ndarray:
    """Return the mean of the bounded magnitudes of every column; the sums are exact.

    Args:
        codes_AN: codes, int32.
        bound_N: bounds of the magnitudes, whole numbers in float64.
        step: distance of the rows that are used; default: 1, for all rows.
    """
    kernels = compiled.functions()
    if kernels is not None:
        sum_N = compiled.column_sums(kernels, codes_AN, bound_N, step)
    else:
        sum_N = sum(block.sum(0) for _, block in _magnitudes(codes_AN[::step], bound_N))
    return sum_N / len(range(0, len(codes_AN), step))


def _row_sums(codes_AN: np.ndarray, bound_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Return the weighted sums of the bounded magnitudes of every row; they are exact."""
    kernels = compiled.functions()
    if kernels is not None:
        return compiled.row_sums(kernels, codes_AN, bound_N, weight_N)
    sum_A = np.empty(len(codes_AN))
    for rows, magnitude_BN in _magnitudes(codes_AN, bound_N):
        sum_A[rows] = magnitude_BN @ weight_N
    return sum_A


def _column_bounds(codes_AN: np.ndarray) -> np.ndarray:
    """Return the bound of the magnitudes of every column, found by iteration on a sample."""
    A, N = codes_AN.shape
    bound_N = np.full(N, 2.0**31)
    step = max(1, A * N // SAMPLE)
    for _ in range(COL_ROUNDS):
        bound_N = np.rint(COL_BOUND * _column_means(codes_AN, bound_N, step)) + 2
    return bound_N


def scale_classes(codes_AN: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Return integers r_A, c_N such that a code has scale 2^((r_i + c_j) / resolution).

    The scales are estimated from mean magnitudes: first those of the columns, then those of the
    rows, as factors relative to the columns.  A few huge codes must not raise the class of a whole
    row or column, so magnitudes are bounded by a multiple of the column's mean.  The bounds depend
    on the means and are found by iteration.

    Args:
        codes_AN: codes, int32, not empty.
        resolution: number of classes per octave.
    """
    log_scale, magnitude = _magnitude_curve()
    bound_N = _column_bounds(codes_AN)
    mean_N = _column_means(codes_AN, bound_N)
    level_N = np.interp(mean_N, magnitude, log_scale).clip(*SCALE_RANGE)
    col_class_N = np.rint(resolution * level_N).astype(np.int64)
    # whole numbers, so that the sums are exact; capped, as nearly empty columns say little of a row
    weight_N = np.rint(4096 * 2.0 ** -np.maximum(level_N, -2))
    sum_A = _row_sums(codes_AN, ROW_BOUND * bound_N, weight_N)
    first = col_class_N.min()
    mass_C = np.bincount(col_class_N - first, weights=weight_N)
    factor = np.arange(int(resolution * ROW_RANGE[0]), int(resolution * ROW_RANGE[1]) + 1)
    level = (factor[:, None] + first + np.arange(len(mass_C))) / resolution
    expected = np.interp(level, log_scale, magnitude) @ mass_C
    row_class_A = np.rint(np.interp(sum_A, expected, factor)).astype(np.int64)
    return row_class_A, col_class_N


@dataclass(frozen=True)
class Fit:
    """A model of codes, and the frequencies of the symbols.

    Attributes:
        model: classes, tables and shifts.
        count_KS: number of codes of each key by symbol byte, whole numbers in float64; codes with
            |symbol| > 127 count as escapes.
    """

    model: CodeModel
    count_KS: np.ndarray

    @property
    def code_bits(self) -> float:
        """Size of all codes in bits, including low bits and escaped values."""
        cost_KS = _costs(self.model.escape_words)[:, self.model.table_K].T
        count_K = self.count_KS.sum(1)
        return float((self.count_KS * cost_KS).sum() / COST_UNIT + count_K @ self.model.shift_K)

    @property
    def escapes(self) -> int:
        """Number of codes that are not in the symbol table of their key."""
        return int(self.count_KS[library().outside_ST[:, self.model.table_K].T].sum())


def _costs(escape_words: int) -> np.ndarray:
    """Return the cost of every symbol in every table, float64 [256, T], in units of 2^-16 bit."""
    return library().cost_ST + COST_UNIT * WORD_BITS * escape_words * library().outside_ST


def fit_model(codes_AN: np.ndarray, cells: int) -> Fit:
    """Return a model for a matrix of codes, and the frequencies of its symbols.

    Args:
        codes_AN: all codes of the matrix or a sample of its rows, int32.
        cells: number of codes of the whole matrix.
    """
    A, N = codes_AN.shape
    if A * N == 0:
        return _empty_fit(np.zeros(A, np.int64), N)
    # twice the resolution costs one more bit per row and column, and saves 0.005 bit per code
    resolution = 8 if cells >= LARGE else 4
    row_class_A, col_class_N = scale_classes(codes_AN, resolution)
    lowest = int(row_class_A.min() + col_class_N.min())
    row_class_A -= row_class_A.min()
    col_class_N -= col_class_N.min()
    keys = int(row_class_A.max() + col_class_N.max()) + 1
    shift_K = _shifts((lowest + np.arange(keys)) / resolution)
    model = CodeModel(
        row_class_A, col_class_N, np.zeros(keys, np.int64), shift_K, _escape_words(codes_AN)
    )
    count_KS = _count(codes_AN, model)
    table_K = (count_KS @ _costs(model.escape_words)[:, :EVEN_TABLES]).argmin(1)
    return Fit(dataclasses.replace(model, table_K=table_K), count_KS)


def fit_trellis_model(
    codes_AN: np.ndarray, quantizer_AN: np.ndarray, row_class_A: np.ndarray
) -> Fit:
    """Return a model for codes of a trellis, and the frequencies of its symbols.

    A key is twice the sum of the classes, plus the quantizer; the model has doubled classes.

    Args:
        codes_AN: all codes of the matrix or a sample of its rows, int32, in the order of the path.
        quantizer_AN: their quantizers, uint8.
        row_class_A: classes of these rows, int64, not negative; `TRELLIS_RESOLUTION` per octave.
    """
    A, N = codes_AN.shape
    if A * N == 0:
        return _empty_fit(2 * row_class_A, N)
    col_class_N = _trellis_column_classes(codes_AN, row_class_A)
    lowest = int(col_class_N.min())
    col_class_N -= lowest
    sums = int(row_class_A.max() + col_class_N.max()) + 1
    shift_K = _shifts((lowest + np.arange(sums)) / TRELLIS_RESOLUTION).repeat(2)
    model = CodeModel(
        2 * row_class_A,
        2 * col_class_N,
        np.zeros(2 * sums, np.int64),
        shift_K,
        _escape_words(codes_AN),
    )
    count_KS = _count(codes_AN, model, quantizer_AN)
    cost_ST, table_K = _costs(model.escape_words), np.empty(2 * sums, np.int64)
    first_K = first_tables(shift_K)
    for first in (0, EVEN_TABLES):
        chosen_K = first_K == first
        cost_KT = count_KS[chosen_K] @ cost_ST[:, first : first + EVEN_TABLES]
        table_K[chosen_K] = first + cost_KT.argmin(1)
    return Fit(dataclasses.replace(model, table_K=table_K), count_KS)


def _empty_fit(row_class_A: np.ndarray, columns: int) -> Fit:
    """Return the fit of a matrix without codes."""
    none = np.zeros(0, np.int64)
    model = CodeModel(row_class_A, np.zeros(columns, np.int64), none, none.astype(np.uint8), 1)
    return Fit(model, np.zeros((0, SYMBOLS)))


def _escape_words(codes_AN: np.ndarray) -> int:
    """Return the number of words in which every code fits."""
    # torch reads the codes once, on its threads
    low, high = torch.from_numpy(codes_AN).aminmax()
    return 1 if low >= -(2**15) and high < 2**15 else 2


@functools.lru_cache(maxsize=1)
def _trellis_magnitude_curve() -> tuple[np.ndarray, np.ndarray]:
    """Return log2 of a range of scales, and the mean magnitudes of codes of a trellis.

    A scale s is that of codes, half of that of values.  The code of the nearest value of quantizer
    0 has the magnitude of a rounded number; quantizer 1 has its decision levels at 1/4, 1, 2, ....
    """
    log_scale, even = _magnitude_curve()
    scale = np.minimum(2.0**log_scale, 4.0)
    uneven = np.zeros_like(scale)
    for level in (0.25, *range(1, 40)):
        uneven += [math.erfc(level / (s * math.sqrt(2))) for s in scale]
    uneven = np.where(log_scale < 2, uneven, even + 0.25)
    return log_scale, (even + uneven) / 2


def _trellis_column_classes(codes_AN: np.ndarray, row_class_A: np.ndarray) -> np.ndarray:
    """Return integers c_N such that codes have the scale 2^((row class + c) / resolution)."""
    A = len(codes_AN)
    log_scale, magnitude = _trellis_magnitude_curve()
    bound_N = _column_bounds(codes_AN)
    mean_N = _column_means(codes_AN, bound_N)
    count_R = np.bincount(row_class_A)
    low, high = (int(TRELLIS_RESOLUTION * end) for end in SCALE_RANGE)
    classes = np.arange(low - len(count_R), high + 1)
    level = (classes[:, None] + np.arange(len(count_R))) / TRELLIS_RESOLUTION
    expected = np.interp(level, log_scale, magnitude) @ (count_R / A)
    return np.rint(np.interp(mean_N, expected, classes)).astype(np.int64)


def _shifts(level_K: np.ndarray) -> np.ndarray:
    """Return the number of low bits for scales 2^level, so that symbols have a scale up to 8."""
    shift_K = np.ceil(level_K - 3).clip(0, None)
    # at scales beyond the largest shift, codes are escaped
    shift_K[shift_K > MAX_SHIFT] = 0
    return shift_K.astype(np.uint8)


def _count(
    codes_AN: np.ndarray, model: CodeModel, quantizer_AN: np.ndarray | None = None
) -> np.ndarray:
    """Return the number of codes of every key by symbol, float64 [K, 256].

    `quantizer_AN` is added to the keys, if it is given.
    """
    kernels = compiled.functions()
    if kernels is not None:
        return compiled.count(kernels, codes_AN, model, quantizer_AN)
    count = np.zeros(len(model.shift_K) * SYMBOLS)
    for rows in row_blocks(codes_AN):
        keys = model.row_class_A[rows, None] + model.col_class_N
        if quantizer_AN is not None:
            keys += quantizer_AN[rows]
        if keys.max() < model.first_shifted_key:
            symbols = to_symbols(codes_AN[rows])
        else:
            symbols, _ = split_values(codes_AN[rows], model.shift_K[keys])
        keys *= SYMBOLS
        keys += symbols
        count += np.bincount(keys.ravel(), minlength=len(count))
    return count.reshape(-1, SYMBOLS)
