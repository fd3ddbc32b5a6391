"""Tiles of sorted rows and columns, and outliers: the common part of the layouts in device memory.

Shapes: A = out_features (rows), N = in_features (columns), R, C = rows and columns of all tiles,
        B = bands of tiles, b = some of them, r = rows of a band, K = groups of columns,
        O = outlier entries.

Rows and columns are sorted by the magnitude of their codes, padded, and cut into tiles of band x 32
codes, where a band is 64 or 128 rows.  The part of a code that its tile cannot hold is an outlier
and is stored separately.

Outliers are stored by band, group of `GROUP` columns, row and column, so that every group of a
band can be read on its own, all its rows at a time.  An entry has 16 bits: the low 8 are the column
within the group; above them are an exponent p of 2 bits and a signed digit d of 6 bits, which add
d * 32^p to the code in that column.  A value that is too large takes several entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor

#: Columns of a tile: 32 codes of w bits fill exactly w words.
TILE = 32

#: Rows of a tile.  The taller band decodes with fewer instructions; it is used if the padding adds
#: at most the fraction `MAX_PADDING` of the rows.
BANDS = (128, 64)
MAX_PADDING = 0.04

#: Columns of a group of outliers.
GROUP = 256

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


def sort_by_magnitude(
    codes_AN: Tensor, band: int, compiled: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """Return the order of the rows and of the columns in the tiles: by the mean magnitude of codes.

    Both are padded to whole tiles, rows with the index A and columns with the index N.

    Args:
        codes_AN: integer codes.
        band: rows of a tile.
        compiled: compiled functions that pack codes, or None.

    Returns:
        The row order, of R entries, and the column order, of C entries, int64.
    """
    sizes = _sizes(codes_AN, band) if compiled is None else compiled.sizes(codes_AN, LARGE)
    orders = []
    for size, multiple in zip(sizes, (band, TILE), strict=True):
        padding = torch.full((-len(size) % multiple,), len(size), device=size.device)
        orders.append(torch.cat([size.argsort(stable=True), padding]))
    return orders[0], orders[1]


def _sizes(codes_AN: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the size of every row and of every column, some rows at a time."""
    size_A, size_N = [], 0
    for codes_rN in codes_AN.split(rows):
        size_rN = codes_rN.abs().clamp(max=LARGE).double()
        size_A.append(size_rN.mean(1))
        # relative to its row, so that large rows do not decide the order of the columns
        size_N = size_N + (size_rN / (size_A[-1][:, None] + 1e-3)).sum(0)
    return torch.cat(size_A), size_N


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


def outlier_entries(rest_brC: Tensor) -> tuple[Tensor, Tensor]:
    """Encode all nonzero values of some bands as outlier entries.

    Returns:
        The entries, int16, and their number in each group and row, b x K x r, int64.
    """
    bands, band, columns = rest_brC.shape
    groups = -(-columns // GROUP)
    rest_RC = rest_brC.reshape(-1, columns).long()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    while True:
        row_O, column_O = rest_RC.nonzero(as_tuple=True)
        if not len(row_O) and found:
            break
        byte_O, value_O = _leading_digit(rest_RC[row_O, column_O])
        found.append((row_O, column_O, byte_O))
        rest_RC = rest_RC.index_put((row_O, column_O), -value_O, accumulate=True)
    row_O, column_O, byte_O = (torch.cat(parts) for parts in zip(*found, strict=True))
    # band, group, row within the band
    place_O = (row_O // band * groups + column_O // GROUP) * band + row_O % band
    order_O = (place_O * GROUP + column_O % GROUP).argsort(stable=True)
    entry_O = (byte_O << 8 | column_O % GROUP)[order_O]
    count = torch.bincount(place_O, minlength=bands * groups * band)
    return entry_O.short(), count.view(bands, groups, band)


def outlier_index(count_BKr: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each group of a band begins, B x K, int32, and the counts, uint8 or int32."""
    per_group_BK = count_BKr.sum(-1)
    first_BK = per_group_BK.flatten().cumsum(0).view_as(per_group_BK) - per_group_BK
    small = int(count_BKr.max()) < 256
    return first_BK.int(), count_BKr.to(torch.uint8 if small else torch.int32)


def add_outliers(codes_RC: Tensor, entry_O: Tensor, count_bKr: Tensor) -> Tensor:
    """Add the outliers to the codes of some bands, in place: the inverse of `outlier_entries`.

    Args:
        codes_RC: codes of all rows of these bands in the order of the tiles, int32.
        entry_O: the entries of these bands, int16.
        count_bKr: number of entries in each group and row.

    Returns:
        `codes_RC`.
    """
    _, groups, band = count_bKr.shape
    entry_O = entry_O.int()
    place_O = torch.repeat_interleave(count_bKr.flatten().long())
    group_O = place_O // band
    row_O = group_O // groups * band + place_O % band
    column_O = group_O % groups * GROUP + (entry_O & GROUP - 1)
    digit_O, shift_O = entry_O >> 10, (entry_O >> 8 & 3) * DIGIT_BITS
    return codes_RC.index_put_((row_O, column_O), digit_O << shift_O, accumulate=True)


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
