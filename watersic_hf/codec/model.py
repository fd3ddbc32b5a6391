"""The probability model of format version 1: a fixed library of symbol tables, in integers.

A symbol is one byte: a value -127 .. 127 in two's complement, or -128, the escape.  A table is a
discrete Gaussian, or a mixture of it with Gaussians of 2 and 4 times its standard deviation.  All
symbols of its support have non-zero frequencies, which sum to exactly 2^12, and no symbol has
probability one.  The second half of the library is for quantizer 1 of the trellis
(`watersic_hf.codec.trellis`), whose values 0, +-1, +-3, ... are not evenly spaced.

The tables are computed in Python's integer arithmetic, so they are identical on all machines.
FORMAT.md defines the computation.

Shapes: A = rows, N = columns, K = keys (row class + column class), T = tables, S = 256 symbols.
"""

import dataclasses
import functools
import itertools
import math
import operator
from dataclasses import dataclass

import numpy as np

PRECISION = 12
TOTAL = 1 << PRECISION
SYMBOLS = 256
#: Byte of the escape symbol: -128 in two's complement.
ESCAPE = 0x80
#: Largest magnitude that a symbol can hold.
LIMIT = 127
#: Largest number of low bits of a code.
MAX_SHIFT = 16
#: Bits of a word; an escaped value takes one or two words at the end of its chunk.
WORD_BITS = 16

#: Heights of the Gaussians with 1, 2 and 4 times the standard deviation of a table.
SHAPES = ((1, 0, 0), (16, 1, 0), (128, 16, 1), (64, 16, 1), (4, 2, 1))
#: Exponent e(s) = m / 2^k of the Gaussian 2^(-e v^2): m = 7, 6, 5, 4 for every k = -1..10.
SCALES = 48
#: Number of tables for evenly spaced values; as many follow for quantizer 1 of the trellis.
EVEN_TABLES = SCALES * len(SHAPES)
#: Widths of the values 0, +-1 and all others of quantizer 1, by which its weights are multiplied.
UNEVEN_WIDTHS = (7, 13, 16)
#: Exponents are integers in units of 2^-15.
FRACTION_BITS = 15
#: A symbol belongs to the support if its weight is at least 2^-16 of the sum of all weights.
SUPPORT_BITS = 16
#: Largest magnitude that enters the sum of the weights.
SUM_LIMIT = 511


@functools.lru_cache(maxsize=1)
def _roots() -> tuple[int, ...]:
    """Return c_i = 2^(64 - 2^-i), rounded down in each step, for i = 0 .. FRACTION_BITS."""
    roots = [1 << 63]
    for _ in range(FRACTION_BITS):
        roots.append(math.isqrt(roots[-1] << 64))
    return tuple(roots)


def power(exponent: int) -> int:
    """Return 2^62 * 2^(-exponent / 2^15), rounded down in each step."""
    whole, fraction = exponent >> FRACTION_BITS, exponent & ((1 << FRACTION_BITS) - 1)
    if whole > 62:
        return 0
    value = 1 << 62
    for i, root in enumerate(_roots()):
        if i and fraction >> (FRACTION_BITS - i) & 1:
            value = value * root >> 64
    return value >> whole


@functools.lru_cache(maxsize=8)
def _gaussian(scale: int, doublings: int, uneven: bool) -> list[int]:
    """Return ``power(e v^2 / 4^doublings)`` for v = 0 .. SUM_LIMIT, with e of a scale.

    For uneven values, v^2 is replaced by ``(2 v - 1)^2 / 2``, and by 0 for v = 0.
    """
    unit = (7 - scale % 4) << (FRACTION_BITS + 1 - scale // 4)
    if not uneven:
        return [power(unit * v * v >> 2 * doublings) for v in range(SUM_LIMIT + 1)]
    tail = [power(unit * (2 * v - 1) ** 2 >> 1 + 2 * doublings) for v in range(1, SUM_LIMIT + 1)]
    return [power(0), *tail]


def table_frequencies(table: int) -> list[int]:
    """Return the frequencies of a table in coding order: the escape, then -limit .. limit.

    The weight of a value v is the sum of ``height * power(e v^2 / width^2)`` over the widths 1, 2
    and 4.  The weight of the escape is the sum over the values outside the support.  Weights below
    1/4096 of the sum are raised to it, so that no frequency becomes 0 when the cumulative sum is
    rounded.

    Args:
        table: number of the table in the library; from `EVEN_TABLES` on, it is for uneven values.
    """
    uneven, number = divmod(table, EVEN_TABLES)
    scale, heights = number // len(SHAPES), SHAPES[number % len(SHAPES)]
    parts = [_gaussian(scale, i, bool(uneven)) for i in range(len(heights))]
    weights = [sum(map(operator.mul, heights, values)) for values in zip(*parts, strict=True)]
    if uneven:
        zero, one, other = UNEVEN_WIDTHS
        weights = [zero * weights[0], one * weights[1], *(other * w for w in weights[2:])]
    total = 2 * sum(weights) - weights[0]
    limit = max(v for v in range(LIMIT + 1) if weights[v] << SUPPORT_BITS >= total)
    inside = [weights[abs(v)] for v in range(-limit, limit + 1)]
    weights = [total - sum(inside), *inside]
    while True:
        least = -(-sum(weights) >> PRECISION)
        if min(weights) >= least:
            break
        weights = [max(w, least) for w in weights]
    total, upto, edges = sum(weights), 0, [0]
    for w in weights:
        upto += w
        edges.append((upto << PRECISION) // total)
    return [b - a for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Library:
    """The symbol tables as arrays.

    Attributes:
        frequency_TS: frequency by symbol byte, uint16; 0 outside the support of the table.
        start_TS: sum of the frequencies of the preceding symbols, uint16.
        limit_T: largest magnitude in the support, int64.
        outside_ST: bool, True for symbols that are escaped: those outside the support, and the
            escape itself.
        cost_ST: cost of a symbol in units of 2^-16 bit, without the words of an escaped value;
            float64 whole numbers, so that their sums are exact in any order.
    """

    frequency_TS: np.ndarray
    start_TS: np.ndarray
    limit_T: np.ndarray
    outside_ST: np.ndarray
    cost_ST: np.ndarray


#: Units of `Library.cost_ST` per bit.
COST_UNIT = 1 << 16


@functools.lru_cache(maxsize=1)
def library() -> Library:
    """Return the library of symbol tables, which is built on the first call."""
    tables = 2 * EVEN_TABLES
    frequency_TS = np.zeros((tables, SYMBOLS), np.uint16)
    start_TS = np.zeros((tables, SYMBOLS), np.uint16)
    limit_T = np.zeros(tables, np.int64)
    for table in range(tables):
        row = table_frequencies(table)
        limit_T[table] = (len(row) - 2) // 2
        symbols = symbols_in_order(int(limit_T[table]))
        frequency_TS[table, symbols] = row
        start_TS[table, symbols] = np.cumsum([0, *row[:-1]])
    used_TS = np.where(frequency_TS == 0, frequency_TS[:, ESCAPE, None], frequency_TS)
    bits_TS = PRECISION - np.log2(used_TS.astype(np.float64))
    cost_ST = np.ascontiguousarray(np.rint(COST_UNIT * bits_TS).T)
    outside_ST = (frequency_TS.T == 0) | (np.arange(SYMBOLS) == ESCAPE)[:, None]
    return Library(frequency_TS, start_TS, limit_T, outside_ST, cost_ST)


@functools.cache
def _decoder_page(table: int) -> np.ndarray:
    """Return the entries of `CodeModel.decoder_table` for one table, uint32."""
    tables = library()
    symbols = symbols_in_order(int(tables.limit_T[table]))
    frequency = tables.frequency_TS[table, symbols].astype(np.uint32)
    start = tables.start_TS[table, symbols].astype(np.uint32)
    page = np.repeat((symbols.astype(np.uint32) << 24) | frequency, frequency)
    page += (np.arange(TOTAL, dtype=np.uint32) - np.repeat(start, frequency)) << PRECISION
    return page


def symbols_in_order(limit: int) -> np.ndarray:
    """Return the symbols of a support in coding order: the escape, then -limit .. limit."""
    return np.r_[ESCAPE, np.arange(-limit, limit + 1) & 0xFF].astype(np.uint8)


@dataclass(frozen=True)
class CodeModel:
    """The model of the distribution of codes that a payload holds.

    Attributes:
        row_class_A, col_class_N: classes of the rows and columns, int64, not negative; the sum of
            both is the key of a code.
        table_K: library table of every key, int64.
        shift_K: number of low bits that are stored separately from the symbol, by key, uint8.
        escape_words: number of words of an escaped value, 1 or 2.
    """

    row_class_A: np.ndarray
    col_class_N: np.ndarray
    table_K: np.ndarray
    shift_K: np.ndarray
    escape_words: int

    def rows(self, rows: slice | np.ndarray) -> "CodeModel":
        """Return the model of some of the rows."""
        return dataclasses.replace(self, row_class_A=self.row_class_A[rows])

    @property
    def first_shifted_key(self) -> int:
        """The first key with low bits, or the number of keys if none has any."""
        return int(np.flatnonzero(np.append(self.shift_K, 1))[0])

    def decoder_table(self) -> np.ndarray:
        """Return the lookup table for decoding, with an entry for every key and slot.

        An entry is symbol << 24 | (slot - start) << 12 | frequency; uint32 [K * 4096].
        """
        pages, page_K = self.decoder_pages()
        return pages.reshape(-1, TOTAL)[page_K // TOTAL].ravel()

    def decoder_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of `decoder_table` once for every table, and where each key's begin.

        Returns:
            The entries, uint32, and the index of the first entry of every key, int64.
        """
        distinct, index_K = np.unique(self.table_K, return_inverse=True)
        pages = [_decoder_page(int(table)) for table in distinct]
        return np.concatenate([np.empty(0, np.uint32), *pages]), TOTAL * index_K.astype(np.int64)

    def encoder_table(self) -> np.ndarray:
        """Return the lookup table for encoding, with an entry for every key and symbol.

        An entry is escaped << 24 | start << 12 | frequency; uint32 [K * 256].
        """
        tables = library()
        frequency_KS = tables.frequency_TS[self.table_K].astype(np.uint32)
        start_KS = tables.start_TS[self.table_K].astype(np.uint32)
        entry_KS = (start_KS << PRECISION) | frequency_KS
        escaped_KS = tables.outside_ST[:, self.table_K].T
        escape_K1 = entry_KS[:, ESCAPE, None] | np.uint32(1 << 24)
        return np.where(escaped_KS, escape_K1, entry_KS).ravel()


def first_tables(shift_K: np.ndarray) -> np.ndarray:
    """Return the first table of the part of the library that a key of a trellis uses.

    Odd keys are those of quantizer 1.  With low bits, its values are evenly spaced but for the
    smallest, and it shares the tables of quantizer 0.
    """
    return np.where((np.arange(len(shift_K)) % 2 == 1) & (shift_K == 0), EVEN_TABLES, 0)


def split_values(values: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split codes into symbols (uint8) and low bits (uint32); `join_values` is the inverse.

    A code is rounded to the nearest multiple of 2^shift.  If the multiple does not fit into a
    symbol, the symbol is the escape.
    """
    # numpy 1.26 would compute a scalar shifted by uint8 in uint8
    shift = np.asarray(shift, np.int64)
    raised = values + ((1 << shift) >> 1)
    low = raised & ((1 << shift) - 1)
    return to_symbols(raised >> shift), low.astype(np.uint32)


def to_symbols(values: np.ndarray) -> np.ndarray:
    """Return the symbols of values, uint8; values beyond +-127 become the escape."""
    # -128 and 128 have the same byte
    return np.clip(values, -LIMIT - 1, LIMIT + 1).astype(np.uint8)


def join_values(symbols: np.ndarray, low: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the codes ``(symbol << shift) + low - 2^(shift - 1)``, all int32."""
    half = np.left_shift(np.int32(1), shift) >> 1
    return (symbols << shift) + low - half
