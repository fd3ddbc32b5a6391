"""Tiles of sorted rows and columns, and outliers: the common part of the layouts in device memory.

Shapes: A = out_features (rows), N = in_features (columns), R, C = rows and columns of all tiles,
        r = rows of a band of tiles, O = outlier entries.

Rows and columns are sorted by the magnitude of their codes, padded, and cut into tiles of band x 32
codes, where a band is 64 or 128 rows.  The part of a code that its tile cannot hold is an outlier
and is stored separately.

An outlier entry has 16 bits.  The low 8 bits are the gap to the column of the row's previous entry
(for the first entry: to column 0 of the tiles).  Above them are an exponent p of 2 bits and a
signed digit d of 6 bits, which add d * 32^p to the code in that column.  An entry with d = 0 only
moves on, by the gap times 32^p columns.  A gap or a value that is too large takes several entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

#: Columns of a tile: 32 codes of w bits fill exactly w words.
TILE = 32

#: Rows of a tile.  The taller band decodes with fewer instructions; it is used if the padding adds
#: at most the fraction `MAX_PADDING` of the rows.
BANDS = (128, 64)
MAX_PADDING = 0.04

#: Largest gap that one entry holds.
MAX_GAP = 255

#: log2 of the base of the digits.
DIGIT_BITS = 5

#: Magnitudes are clamped to this when rows and columns are sorted, so that no outlier decides.
LARGE = 64


@dataclass(frozen=True, kw_only=True)
class TiledCodes:
    """Integer codes, A x N, in tiles; a subclass adds the tensors of a layout as fields."""

    rows: int
    """A."""

    columns: int
    """N."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of `names`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the tensors, in the order of the fields."""
        return [field.name for field in fields(cls) if field.name not in ("rows", "columns")]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, rows: int, columns: int):
        """Rebuild the codes from their tensors.

        Args:
            tensors: the values of `tensors()`, in the same order.
            rows: A.
            columns: N.
        """
        return cls(rows=rows, columns=columns, **dict(zip(cls.names(), tensors, strict=True)))


def choose_band(codes_AN: Tensor) -> int:
    """Return the number of rows of a tile for these codes, one of `BANDS`.

    Raises:
        ValueError: the matrix is empty.
    """
    rows, columns = codes_AN.shape
    if codes_AN.numel() == 0:
        raise ValueError(f"the codes are {rows} x {columns}, but an empty matrix cannot be packed")
    return next((b for b in BANDS if -rows % b <= MAX_PADDING * rows), BANDS[-1])


def sort_by_magnitude(codes_AN: Tensor, band: int) -> tuple[Tensor, Tensor]:
    """Return the order of the rows and of the columns in the tiles: by the mean magnitude of codes.

    Both are padded to whole tiles, rows with the index A and columns with the index N.

    Args:
        codes_AN: integer codes.
        band: rows of a tile.

    Returns:
        The row order, of R entries, and the column order, of C entries, int64.
    """
    size_A, size_N = [], 0
    for codes_rN in codes_AN.split(band):
        size_rN = codes_rN.abs().clamp(max=LARGE).double()
        size_A.append(size_rN.mean(1))
        # relative to its row, so that large rows do not decide the order of the columns
        size_N = size_N + (size_rN / (size_A[-1][:, None] + 1e-3)).sum(0)
    orders = []
    for size, multiple in ((torch.cat(size_A), band), (size_N, TILE)):
        padding = torch.full((-len(size) % multiple,), len(size), device=size.device)
        orders.append(torch.cat([size.argsort(stable=True), padding]))
    return orders[0], orders[1]


def pad_to_tiles(codes_rN: Tensor, column_order_C: Tensor, rows: int) -> Tensor:
    """Return rows with their columns in the order of the tiles, padded with zeros, int32.

    Args:
        codes_rN: at most `rows` rows of codes.
        column_order_C: as `sort_by_magnitude` returns it.
        rows: rows after padding, a multiple of the band.
    """
    found, columns = codes_rN.shape
    codes_rC = codes_rN.new_zeros(rows, len(column_order_C), dtype=torch.int32)
    codes_rC[:found, :columns] = codes_rN[:, column_order_C[:columns]].int()
    return codes_rC


def outlier_entries(rest_rC: Tensor) -> tuple[Tensor, Tensor]:
    """Encode all nonzero values as outlier entries.

    Returns:
        The entries, int16, row after row, and the number of entries in each row.
    """
    rest_rC = rest_rC.long()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        row_O, column_O = rest_rC.nonzero(as_tuple=True)
        found.append((row_O, column_O, *_leading_digit(rest_rC[row_O, column_O])))
        if not len(row_O):
            break
        rest_rC = rest_rC.index_put((row_O, column_O), -found[-1][3], accumulate=True)
    row_O, column_O, byte_O, _ = (torch.cat(parts) for parts in zip(*found, strict=True))
    order_O = (row_O * rest_rC.shape[1] + column_O).argsort(stable=True)
    row_O, column_O, byte_O = row_O[order_O], column_O[order_O], byte_O[order_O]

    before_O = torch.where(row_O[1:] == row_O[:-1], column_O[:-1], 0)
    gap_O = column_O - torch.cat([column_O.new_zeros(min(len(row_O), 1)), before_O])
    # a gap that is too large starts with entries without a digit, which count by 32 columns
    far_O = torch.where(gap_O > MAX_GAP, gap_O >> DIGIT_BITS, 0)
    steps_O = -(-far_O // MAX_GAP)
    of_E = torch.repeat_interleave(steps_O + 1)
    entry_E = torch.full_like(of_E, 1 << 8 | MAX_GAP)
    last_O = (steps_O + 1).cumsum(0) - 1
    rest_O = far_O - MAX_GAP * (steps_O - 1)
    entry_E[last_O[steps_O > 0] - 1] = (1 << 8 | rest_O)[steps_O > 0]
    entry_E[last_O] = byte_O << 8 | (gap_O - (far_O << DIGIT_BITS))
    return entry_E.short(), torch.bincount(row_O[of_E], minlength=len(rest_rC))


def add_outliers(codes_rC: Tensor, entry_O: Tensor, count_r: Tensor) -> Tensor:
    """Add the outliers to the codes of tiles, in place: the inverse of `outlier_entries`.

    Args:
        codes_rC: codes in the order of the tiles, int32.
        entry_O: the entries of these rows, row after row, int16.
        count_r: number of entries in each row.

    Returns:
        `codes_rC`.
    """
    entry_O = entry_O.int()
    row_O = torch.repeat_interleave(count_r)
    digit_O, shift_O = entry_O >> 10, (entry_O >> 8 & 3) * DIGIT_BITS
    column_O = ((entry_O & MAX_GAP) << torch.where(digit_O == 0, shift_O, 0)).cumsum(0)
    # the sum runs through all rows: subtract what it was at the start of each
    before_r = torch.cat([column_O.new_zeros(1), column_O])[count_r.cumsum(0) - count_r]
    return codes_rC.index_put_(
        (row_O, column_O - before_r[row_O]), digit_O << shift_O, accumulate=True
    )


def restore_order(
    codes_rC: Tensor, row_order_r: Tensor, column_order_C: Tensor, *, like: TiledCodes
) -> tuple[Tensor, Tensor]:
    """Undo the sorting and the padding of some rows of tiles.

    Args:
        codes_rC: codes in the order of the tiles.
        row_order_r: rows of the weight that these rows are, int64; A or more for padding.
        column_order_C: columns of the weight that the columns are, int64; N or more for padding.
        like: the codes of the whole weight, for A and N.

    Returns:
        The rows of the weight that are among them, and the codes of these rows, rows x N.
    """
    real_r, real_C = row_order_r < like.rows, column_order_C < like.columns
    codes_rN = codes_rC.new_empty(int(real_r.sum()), like.columns)
    codes_rN[:, column_order_C[real_C]] = codes_rC[real_r][:, real_C]
    return row_order_r[real_r], codes_rN


def compact_order(order: Tensor) -> Tensor:
    """Return the indices of a row or column order as int16 if they fit, else as int32."""
    return order.short() if len(order) < 1 << 15 else order.int()


def as_int32(words: Tensor) -> Tensor:
    """Reinterpret the values of non-negative int64 below 2^32 as int32 with the same bits."""
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def _leading_digit(value_O: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading base-32 digit of values: as the high byte of an entry, and its value."""
    exponent_O = sum(
        ((value_O >> DIGIT_BITS * exponent) > 31) | ((value_O >> DIGIT_BITS * exponent) < -32)
        for exponent in range(3)
    )
    digit_O = (value_O >> DIGIT_BITS * exponent_O).clamp(-32, 31)
    return digit_O << 2 | exponent_O, digit_O << DIGIT_BITS * exponent_O
