"""Codes of fixed width: the layout of a weight that a GPU multiplies with fastest.

Shapes: A = out_features (rows), N = in_features (columns), B = bands of rows, T = tiles of a band,
        R, C = rows and columns of all tiles, r = rows of a band, G = words, O = outlier entries,
        U = rows asked for, j = columns of a tile, w = words of a row of a tile.

All codes of a tile (`watersic_hf.nn.tiles`) have one width, 0 to 8 bits: the width that takes the
fewest bits including outliers.  A code that does not fit is clipped, and the difference is an
outlier.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.nn.tiles import (
    TILE,
    TiledCodes,
    add_outliers,
    as_int32,
    choose_band,
    compact_order,
    outlier_entries,
    pad_to_tiles,
    restore_order,
    sort_by_magnitude,
)

#: Largest width of a tile, in bits.
MAX_WIDTH = 8

#: Bits that an outlier is assumed to take: slightly more than one entry, as some need several.
OUTLIER_BITS = 17


@dataclass(frozen=True, kw_only=True)
class PackedCodes(TiledCodes):
    """Integer codes, A x N, in tiles of fixed width."""

    words_G: Tensor
    """int32.  The words of a tile of width w form a w x band matrix.  The w words of a row are one
    little-endian number of 32 w bits; it holds the row's 32 codes, first code lowest, each raised
    by 2^(w-1) to make it non-negative."""

    tiles_BT: Tensor
    """int32.  The lowest 4 bits are the width of a tile; the bits above are the position of its
    words, in units of `band` words."""

    row_order_R: Tensor
    """int16 or int32.  The row of the weight that each row of the tiles is; A for padding."""

    column_order_C: Tensor
    """int16 or int32.  The column of the weight that each column of the tiles is; N for padding."""

    outliers_O: Tensor
    """int16.  Outlier entries, row after row of the tiles; see `watersic_hf.nn.tiles`."""

    outlier_start_R: Tensor
    """int32, R + 1 entries.  Position of the first outlier entry of each row of the tiles."""

    @property
    def band(self) -> int:
        """Rows of a tile."""
        return len(self.row_order_R) // len(self.tiles_BT)


def pack_codes(codes_AN: Tensor) -> PackedCodes:
    """Pack integer codes losslessly, on their device.

    Raises:
        ValueError: the matrix is empty.
    """
    rows, columns = codes_AN.shape
    band = choose_band(codes_AN)
    row_order_R, column_order_C = sort_by_magnitude(codes_AN, band)
    bands = [
        _pack_band(pad_to_tiles(codes_AN[order_r], column_order_C, band))
        for order_r in row_order_R[:rows].split(band)
    ]
    widths_BT = torch.stack([widths_T for widths_T, *_ in bands])
    first_BT = widths_BT.flatten().cumsum(0).view_as(widths_BT) - widths_BT
    count_R = torch.cat([count_r for *_, count_r in bands])
    return PackedCodes(
        rows=rows,
        columns=columns,
        words_G=torch.cat([words for _, words, *_ in bands]),
        tiles_BT=(first_BT << 4 | widths_BT).int(),
        row_order_R=compact_order(row_order_R),
        column_order_C=compact_order(column_order_C),
        outliers_O=torch.cat([outliers for *_, outliers, _ in bands]),
        outlier_start_R=torch.cat([count_R.new_zeros(1), count_R.cumsum(0)]).int(),
    )


def unpack_bands(packed: PackedCodes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, band by band, rows of the weight and their codes, rows x N, int32."""
    order_C = packed.column_order_C.long()
    for index, tiles_T in enumerate(packed.tiles_BT):
        start = index * packed.band
        order_r = packed.row_order_R[start : start + packed.band].long()
        yield restore_order(_unpack_band(packed, tiles_T, start), order_r, order_C, like=packed)


def unpack_rows(packed: PackedCodes, index_U: Tensor) -> Tensor:
    """Return the codes of some rows, U x N, int32.

    Args:
        packed: the codes of the whole weight.
        index_U: rows of the weight, int64; a row may occur several times.
    """
    order_C = packed.column_order_C.long()
    real_C = order_C < packed.columns
    order_R = packed.row_order_R.long()
    position_A = torch.empty(packed.rows, dtype=torch.int64, device=order_R.device)
    position_A[order_R[order_R < packed.rows]] = (order_R < packed.rows).nonzero()[:, 0]
    position_U = position_A[index_U]
    tiles_UT = packed.tiles_BT[position_U // packed.band]
    within_UT = (position_U % packed.band)[:, None].expand_as(tiles_UT)
    words = packed.words_G.view(-1, packed.band)
    codes_UTj = words.new_zeros(*tiles_UT.shape, TILE)
    # tiles of one width at a time: their words have the same number of bits
    for width in range(1, MAX_WIDTH + 1):
        chosen_UT = (tiles_UT & 15) == width
        first, within = tiles_UT[chosen_UT] >> 4, within_UT[chosen_UT]
        slots = first + torch.arange(width, device=first.device)[:, None]
        codes_UTj[chosen_UT] = _codes(words[slots, within], width).T
    start_U, stop_U = (packed.outlier_start_R[position_U + i].long() for i in (0, 1))
    count_U = stop_U - start_U
    row_O = torch.repeat_interleave(count_U)
    entry = start_U[row_O] + torch.arange(len(row_O), device=row_O.device)
    entry -= (count_U.cumsum(0) - count_U)[row_O]
    codes_UC = add_outliers(codes_UTj.flatten(1), packed.outliers_O[entry], count_U)
    codes_UN = codes_UC.new_empty(len(codes_UC), packed.columns)
    codes_UN[:, order_C[real_C]] = codes_UC[:, real_C]
    return codes_UN


def _pack_band(codes_rC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack one band.

    Returns:
        The widths of its tiles, their words, the outlier entries, and their number in each row.
    """
    band = len(codes_rC)
    codes_rTj = codes_rC.view(band, -1, TILE)
    bits = []
    for width in range(MAX_WIDTH + 1):
        low, high = _range(width)
        outside_T = ((codes_rTj < low) | (codes_rTj > high)).sum((0, 2))
        bits.append(width * band * TILE + OUTLIER_BITS * outside_T)
    widths_T = torch.stack(bits).argmin(0)
    low_T = -(1 << widths_T >> 1)
    high_T = (-low_T - 1).clamp(min=0)
    clipped_rTj = codes_rTj.clamp(low_T[:, None], high_T[:, None])
    stored_rTj = (clipped_rTj - low_T[:, None]).int()
    words = codes_rC.new_empty(int(widths_T.sum()), band)
    slot_T = widths_T.cumsum(0) - widths_T
    for width in range(1, MAX_WIDTH + 1):
        chosen_T = widths_T == width
        slots = slot_T[chosen_T][:, None] + torch.arange(width, device=slot_T.device)
        words[slots] = _words(stored_rTj[:, chosen_T], width)
    return widths_T, words.flatten(), *outlier_entries((codes_rTj - clipped_rTj).flatten(1))


def _range(width: int) -> tuple[int, int]:
    """Return the smallest and the largest code of a width."""
    half = 1 << width >> 1
    return -half, max(half - 1, 0)


def _words(stored_rTj: Tensor, width: int) -> Tensor:
    """Return the words of tiles of one width, T x width x band, from their raised codes."""
    rows, tiles, _ = stored_rTj.shape
    words_Twr = stored_rTj.new_zeros(tiles, width, rows, dtype=torch.int64)
    for j in range(TILE):
        word, bit = divmod(j * width, 32)
        value_Tr = stored_rTj[..., j].T.long() << bit
        words_Twr[:, word] |= value_Tr & 0xFFFFFFFF
        if bit + width > 32:
            words_Twr[:, word + 1] |= value_Tr >> 32
    return as_int32(words_Twr)


def _unpack_band(packed: PackedCodes, tiles_T: Tensor, start: int) -> Tensor:
    """Return the codes of one band of tiles, band x C, int32.

    Args:
        packed: the codes of the whole weight.
        tiles_T: the entries of `PackedCodes.tiles_BT` for this band.
        start: first row of the band in the order of the tiles.
    """
    band = packed.band
    words = packed.words_G.view(-1, band)
    widths_T, first_T = tiles_T & 15, tiles_T >> 4
    codes_rTj = words.new_zeros(band, len(tiles_T), TILE)
    for width in range(1, MAX_WIDTH + 1):
        chosen_T = widths_T == width
        slots = first_T[chosen_T][:, None] + torch.arange(width, device=first_T.device)
        words_wTr = words[slots].transpose(0, 1)
        codes_rTj[:, chosen_T] = _codes(words_wTr, width).permute(2, 1, 0)
    start_r = packed.outlier_start_R[start : start + band + 1].long()
    entry_O = packed.outliers_O[start_r[0] : start_r[-1]]
    return add_outliers(codes_rTj.flatten(1), entry_O, start_r.diff())


def _codes(words_w: Tensor, width: int) -> Tensor:
    """Return the `TILE` codes of rows of tiles, as the first dimension, from their words.

    Args:
        words_w: the words, int32, as the first dimension; the other dimensions are kept.
        width: bits of a code.
    """
    words_w = words_w.long() & 0xFFFFFFFF
    codes = []
    for j in range(TILE):
        word, bit = divmod(j * width, 32)
        value = words_w[word] >> bit
        if bit + width > 32:
            value = value | words_w[word + 1] << (32 - bit)
        codes.append((value & ((1 << width) - 1)) + _range(width)[0])
    return torch.stack(codes).int()
