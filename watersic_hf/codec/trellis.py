"""The trellis of rule 2: two quantizers, and which of them every code belongs to.

Quantizer 0 has the values 0, +-2, +-4, ..., quantizer 1 the values 0, +-1, +-3, ...; the code k of
quantizer q has the value ``2 k - q sign(k)``.  A path runs down a column, over rows in the order of
their classes, and starts with quantizer 0.  The quantizer of row t is

    Q(t) = Q(t - 2) + Q(t - 3) + p(t - 1)   mod 2,

where p is the parity of a code, and terms before the start are 0.

Shapes: A = rows in the order of the path, N = columns, T = steps of a block, L = lanes,
        C = chunks.
"""

from dataclasses import dataclass

import numpy as np

from watersic_hf.codec import compiled
from watersic_hf.codec.ans import Decoder
from watersic_hf.codec.model import LIMIT, TOTAL, join_values


class PathError(ValueError):
    """Values are not those of any path through the trellis."""


def row_order(row_class_A: np.ndarray) -> np.ndarray:
    """Return the rows in the order of the paths: by class, and within a class by number."""
    return row_class_A.argsort(kind="stable")


def codes_of(
    values_AN: np.ndarray, path_rows: int, order_A: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of values, int32, and their quantizers, uint8, in the order of the path.

    Args:
        values_AN: values, int32.
        path_rows: rows of a path; the next one starts after them.
        order_A: the rows in the order of the path, as `row_order` returns them; default: they are
            in that order.

    Raises:
        PathError: a value is not one of its quantizer.
    """
    order_A = np.arange(len(values_AN)) if order_A is None else order_A
    kernels = compiled.functions()
    if kernels is not None:
        found = compiled.path_codes(kernels, values_AN, order_A, path_rows)
        if found is not None:
            return found
    # also where the compiled function has found that values are on no path: the error names one
    values_AN = values_AN[order_A]
    size_AN = np.abs(values_AN)
    codes_AN = np.sign(values_AN) * ((size_AN >> 1) + (size_AN & 1))
    quantizer_AN = quantizers(codes_AN, path_rows)
    wrong = np.flatnonzero(value_of(codes_AN, quantizer_AN) != values_AN)
    if len(wrong):
        row, column = divmod(int(wrong[0]), values_AN.shape[1])
        raise PathError(
            f"{len(wrong)} of {values_AN.size} values are on no path of the trellis; the first is "
            f"{values_AN[row, column]} in place {row} of the path of column {column}"
        )
    return codes_AN, quantizer_AN


def quantizers(codes_AN: np.ndarray, path_rows: int) -> np.ndarray:
    """Return the quantizer of every code, uint8; rows are in the order of the path."""
    A, N = codes_AN.shape
    paths = -(-A // path_rows) if A else 0
    parity_PTN = np.zeros((paths * path_rows, N), np.uint8)
    parity_PTN[:A] = codes_AN & 1
    parity_PTN = parity_PTN.reshape(paths, path_rows, N)
    quantizer_PTN = np.zeros_like(parity_PTN)
    for t in range(1, min(path_rows, A)):
        quantizer_PTN[:, t] = parity_PTN[:, t - 1]
        for lag in (2, 3):
            if t >= lag:
                quantizer_PTN[:, t] ^= quantizer_PTN[:, t - lag]
    return quantizer_PTN.reshape(paths * path_rows, N)[:A]


def value_of(codes: np.ndarray, quantizer: np.ndarray) -> np.ndarray:
    """Return the values of codes, int32."""
    return 2 * codes - np.sign(codes) * quantizer


@dataclass
class TrellisDecoder(Decoder):
    """A decoder whose lanes walk down columns, each along the path of its column.

    Attributes:
        escape_words: number of words of an escaped value.
        end_C: index after the last word of every chunk that is not read yet from its end, where the
            escaped values are; changed in place.
        path_3L: the quantizers of the next step and of the two steps before it, intp, changed in
            place.
    """

    escape_words: int
    end_C: np.ndarray
    path_3L: np.ndarray

    def values(
        self, table: np.ndarray, offset_TL: np.ndarray, shift_TL: np.ndarray | None
    ) -> np.ndarray:
        """Decode a block of steps; return the values, int32 [T, L].

        Args:
            table: result of `CodeModel.decoder_table`.
            offset_TL: first entry of the table of quantizer 0, which is 4096 times the key, intp.
            shift_TL: number of low bits, uint32, or None if no code of the block has any.
        """
        codes_TL = np.empty(offset_TL.shape, np.int32)
        quantizer_TL = np.empty(offset_TL.shape, np.int32)
        shifted_T = np.zeros(len(offset_TL), bool) if shift_TL is None else shift_TL.any(1)
        entry_L = np.empty_like(self.states_L)
        for t, code_L in enumerate(codes_TL):
            this_L, last_L, earlier_L = self.path_3L
            quantizer_TL[t] = this_L
            self.symbols(table, offset_TL[t] + TOTAL * this_L, entry_L)
            symbol_L = entry_L.view(np.int32) >> np.int32(24)
            code_L[:] = symbol_L
            if shifted_T[t]:
                shift_L = shift_TL[t]
                low_L = self.low_bits(shift_L)
                code_L[:] = join_values(symbol_L, low_L.view(np.int32), shift_L.view(np.int32))
            if symbol_L.min() < -LIMIT:
                self._escaped(np.flatnonzero(symbol_L < -LIMIT), code_L)
            self.path_3L = np.stack([last_L ^ earlier_L ^ (code_L & 1), this_L, last_L])
        return value_of(codes_TL, quantizer_TL)

    def _escaped(self, lane: np.ndarray, code_L: np.ndarray) -> None:
        """Read the escaped values of some lanes from the ends of their chunks."""
        upto = lane.searchsorted(self.edges)
        count_C = upto[1:] - upto[:-1]
        rank = np.arange(len(lane)) - upto[:-1].repeat(count_C)
        index = self.end_C.repeat(count_C) - self.escape_words * (rank + 1)
        word = self.words.take(index, mode="clip")
        if self.escape_words == 2:
            high = self.words.take(index + 1, mode="clip").astype(np.uint32)
            code_L[lane] = (word.astype(np.uint32) | high << np.uint32(16)).view(np.int32)
        else:
            code_L[lane] = word.view(np.int16)
        self.end_C -= self.escape_words * count_C
