"""What the layouts of codes in device memory share: tiles of sorted rows and columns, and outliers.

Shapes: A = out_features (rows), N = in_features (columns), R, C = rows and columns of all tiles,
        r = rows of a band of tiles, O = entries for outliers.

Rows and columns are sorted by the size of their codes, filled up, and cut into tiles of `band` x 32
codes.  What a tile cannot hold of a code is an outlier, and lies beside the tiles.  An entry has 16
bits: in the low 8 bits the gap to the column of the row's entry before, at first to column 0 of the
tiles; then 2 bits p and, with sign, 6 bits d, for d * 32^p.  An entry whose d is 0 is a gap alone,
of 32^p times as many columns.  A gap or a number that is too large takes several entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

#: Columns in a tile: as many codes of w bits as fill w words.
TILE = 32

#: Rows in a tile.  The wider band decodes with fewer instructions; it is taken where it fills up
#: rows by no more than `MAX_FILLING`.
BANDS = (128, 64)
MAX_FILLING = 0.04

#: Largest gap between two entries, and bits from one place of a digit to the next.
MAX_GAP = 255
DIGIT_BITS = 5

#: Codes above this count as this for the order of rows and columns.
LARGE = 64


@dataclass(frozen=True, kw_only=True)
class TiledCodes:
    """Integer codes, A x N, in tiles; a subclass says in which tensors, its remaining fields."""

    rows: int
    """A."""

    columns: int
    """N."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @classmethod
    def names(cls) -> list[str]:
        """Names of the tensors, in their order."""
        return [field.name for field in fields(cls) if field.name not in ("rows", "columns")]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, rows: int, columns: int):
        """The codes that `tensors`, those of `tensors()` in their order, are of."""
        return cls(rows=rows, columns=columns, **dict(zip(cls.names(), tensors, strict=True)))


def band_of(codes_AN: Tensor) -> int:
    """Rows in a tile of these codes.

    Raises:
        ValueError: there is no code.
    """
    rows, columns = codes_AN.shape
    if codes_AN.numel() == 0:
        raise ValueError(f"the codes are {rows} x {columns}; to be packed there must be some")
    return next((b for b in BANDS if -rows % b <= MAX_FILLING * rows), BANDS[-1])


def sorted_orders(codes_AN: Tensor, band: int) -> tuple[Tensor, Tensor]:
    """Rows and columns by the mean size of their codes, filled up to whole tiles."""
    size_A, size_N = [], 0
    for codes_rN in codes_AN.split(band):
        size_rN = codes_rN.abs().clamp(max=LARGE).double()
        size_A.append(size_rN.mean(1))
        size_N = size_N + (size_rN / (size_A[-1][:, None] + 1e-3)).sum(0)
    orders = []
    for size, multiple in ((torch.cat(size_A), band), (size_N, TILE)):
        filling = torch.full((-len(size) % multiple,), len(size), device=size.device)
        orders.append(torch.cat([size.argsort(stable=True), filling]))
    return orders[0], orders[1]


def filled(codes_rN: Tensor, column_order_C: Tensor, rows: int) -> Tensor:
    """Rows with their columns in the order of the tiles, filled up with zeros, int32."""
    found, columns = codes_rN.shape
    codes_rC = codes_rN.new_zeros(rows, len(column_order_C), dtype=torch.int32)
    codes_rC[:found, :columns] = codes_rN[:, column_order_C[:columns]].int()
    return codes_rC


def outlier_entries(rest_rC: Tensor) -> tuple[Tensor, Tensor]:
    """Entries for all that is not zero, int16, and their number in every row."""
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
    # a gap that is too large takes entries without a digit first, which count by 32
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
    """Undo `outlier_entries`: add to the codes, in place, what the entries of their rows say."""
    entry_O = entry_O.int()
    row_O = torch.repeat_interleave(count_r)
    digit_O, place_O = entry_O >> 10, (entry_O >> 8 & 3) * DIGIT_BITS
    column_O = ((entry_O & MAX_GAP) << torch.where(digit_O == 0, place_O, 0)).cumsum(0)
    before_r = torch.cat([column_O.new_zeros(1), column_O])[count_r.cumsum(0) - count_r]
    return codes_rC.index_put_(
        (row_O, column_O - before_r[row_O]), digit_O << place_O, accumulate=True
    )


def in_order(codes_rC: Tensor, row_order_r: Tensor, column_order_C: Tensor, *, like: TiledCodes):
    """The rows of the weight among rows of tiles, and their codes, rows x N, as in the weight."""
    real_r, real_C = row_order_r < like.rows, column_order_C < like.columns
    codes_rN = codes_rC.new_empty(int(real_r.sum()), like.columns)
    codes_rN[:, column_order_C[real_C]] = codes_rC[real_r][:, real_C]
    return row_order_r[real_r], codes_rN


def narrow(order: Tensor) -> Tensor:
    """Numbers of rows or columns in the smallest type that holds them."""
    return order.short() if len(order) < 1 << 15 else order.int()


def as_int32(words: Tensor) -> Tensor:
    """The low 32 bits of non-negative int64 as signed numbers of 32 bits."""
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def _leading_digit(value_O: Tensor) -> tuple[Tensor, Tensor]:
    """The highest digit of numbers to the base of 32 as the byte of an entry, and its value."""
    place_O = sum(
        ((value_O >> DIGIT_BITS * place) > 31) | ((value_O >> DIGIT_BITS * place) < -32)
        for place in range(3)
    )
    digit_O = (value_O >> DIGIT_BITS * place_O).clamp(-32, 31)
    return digit_O << 2 | place_O, digit_O << DIGIT_BITS * place_O
