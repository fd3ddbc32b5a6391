"""Codes of fixed width: the layout of a weight that a GPU multiplies with fastest.

Shapes: A = out_features (rows), N = in_features (columns), B = bands of rows, T = tiles of a band,
        R, C = rows and columns of all tiles, r = rows of a band, K = groups of columns,
        G = words, O = outlier entries, U = rows asked for, j = columns of a tile, w = words of a
        row of a tile.

All codes of a tile (`watersic_hf.nn.tiles`) have one width, 0 to 8 bits, or 7 with a trellis: the
width that takes the fewest bits including outliers.  A code that does not fit is clipped, and the
difference is an outlier.  Of the values of a trellis the codes are stored
(`watersic_hf.nn.paths`).  These are clipped to a code of the same parity, and outliers are
differences of values.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from watersic_hf.codec import Path
from watersic_hf.nn.backends import cpu_kernels
from watersic_hf.nn.paths import bands_codes, fits, quantizers, state_bits, value_of
from watersic_hf.nn.tiles import (
    TILE,
    TiledCodes,
    add_outliers,
    as_int32,
    choose_band,
    compact_order,
    outlier_entries,
    outlier_index,
    pad_to_tiles,
    restore_order,
    sort_by_magnitude,
)

#: Largest width of a tile, in bits; that of a trellis is one less, so that values fit into a byte.
MAX_WIDTH = 8

#: Bits that an outlier is assumed to take: slightly more than one entry, as some need several.
OUTLIER_BITS = 17


@dataclass(frozen=True, kw_only=True)
class PackedCodes(TiledCodes):
    """Integer codes, A x N, in tiles of fixed width."""

    words_G: Tensor
    """int32.  The words of a tile of width w form a w x band matrix.  The w words of a row are one
    little-endian number of 32 w bits; it holds the row's 32 codes, first code lowest, each raised
    by 2^(w-1) to make it non-negative.  Of a trellis, the first word of a row holds the lowest bits
    of the codes, and the others hold the codes without them, raised by 2^(w-2)."""

    tiles_BT: Tensor
    """int32.  The lowest 4 bits are the width of a tile; the bits above are the position of its
    words, in units of `band` words."""

    state_BT3: Tensor
    """int32.  State of a trellis before the first row of each tile; B x T x 0 for codes."""

    row_order_R: Tensor
    """int16 or int32.  The row of the weight that each row of the tiles is; A for padding."""

    column_order_C: Tensor
    """int16 or int32.  The column of the weight that each column of the tiles is; N for padding."""

    outliers_O: Tensor
    """int16.  Outlier entries; see `watersic_hf.nn.tiles`."""

    outlier_first_BK: Tensor
    """int32.  Position of the first outlier entry of each group of columns of each band."""

    outlier_count_BKr: Tensor
    """uint8 or int32.  Number of outlier entries of each row in each group."""

    @property
    def trellis(self) -> bool:
        """Whether these are codes of a trellis."""
        return self.state_BT3.shape[-1] > 0

    @property
    def band(self) -> int:
        """Rows of a tile."""
        return len(self.row_order_R) // len(self.tiles_BT)


def pack_codes(codes_AN: Tensor, path: Path | None = None) -> PackedCodes:
    """Pack integer codes losslessly, on their device.

    Args:
        codes_AN: codes, or the values of a trellis.
        path: path of the values; default: these are codes.

    Raises:
        ValueError: the matrix is empty.
    """
    rows, columns = codes_AN.shape
    band = choose_band(codes_AN)
    kernels = cpu_kernels() if codes_AN.device.type == "cpu" else None
    compiled = None if kernels is None else kernels.pack
    row_order_R, column_order_C = sort_by_magnitude(codes_AN, band, compiled)
    path = path if fits(path, band, rows) else None
    if path is not None:
        row_order_R[:rows] = path.order_A.to(codes_AN.device)
    pack = _packed if compiled is None else functools.partial(_packed_by_compiled, compiled)
    widths_BT, state_BT3, count_BKr, words_G, outliers_O = pack(
        codes_AN, (row_order_R, column_order_C), band, path
    )
    first_BK, count_BKr = outlier_index(count_BKr)
    return PackedCodes(
        rows=rows,
        columns=columns,
        words_G=words_G,
        tiles_BT=(_before(widths_BT) << 4 | widths_BT).int(),
        state_BT3=state_BT3,
        row_order_R=compact_order(row_order_R),
        column_order_C=compact_order(column_order_C),
        outliers_O=outliers_O,
        outlier_first_BK=first_BK,
        outlier_count_BKr=count_BKr,
    )


def _packed(
    codes_AN: Tensor, orders: tuple[Tensor, Tensor], band: int, path: Path | None
) -> tuple[Tensor, ...]:
    """Pack codes band by band.

    Args:
        codes_AN: codes, or the values of a trellis.
        orders: the rows and columns at each place of the tiles.
        band: rows of a tile.
        path: path of the values, or None.

    Returns:
        The widths of the tiles, B x T, `PackedCodes.state_BT3`, the number of outlier entries of
        each group and row, B x K x r, `PackedCodes.words_G` and `PackedCodes.outliers_O`.
    """
    row_order_R, column_order_C = orders
    bands, states, after_3C = [], [], None
    for start, order_r in enumerate(row_order_R[: len(codes_AN)].split(band)):
        codes_rC = pad_to_tiles(codes_AN[order_r], column_order_C, band)
        if path is None:
            bands.append(_pack_band(codes_rC))
            continue
        coded, after_3C = bands_codes(codes_rC[None], path, start, after_3C)
        bands.append(_pack_band(coded.codes_rC[0], coded.quantizer_rC[0]))
        states.append(coded.state_T3[0])
    widths, words, outliers, counts = zip(*bands, strict=True)
    widths_BT = torch.stack(widths)
    return (
        widths_BT,
        torch.stack(states) if states else widths_BT.int()[..., None][..., :0],
        torch.cat(counts),
        torch.cat(words),
        torch.cat(outliers),
    )


def _packed_by_compiled(
    compiled: ModuleType,
    codes_AN: Tensor,
    orders: tuple[Tensor, Tensor],
    band: int,
    path: Path | None,
) -> tuple[Tensor, ...]:
    """Pack codes with compiled code; see `_packed`."""
    trellis = path is not None
    path_bands = -(-path.rows // band) if trellis else 0
    costs = band * TILE, OUTLIER_BITS, MAX_WIDTH - trellis
    found = compiled.measure(codes_AN, *orders, band, costs, path_bands)
    widths_BT, state_BT3, count_BKr = found
    first_BK = _before(count_BKr.sum(-1))
    written = compiled.write(codes_AN, *orders, found, _before(widths_BT), first_BK)
    return widths_BT, state_BT3, count_BKr, *written


def _before(count_BT: Tensor) -> Tensor:
    """Return the sum of all numbers before each one, in the order of rows."""
    return count_BT.flatten().cumsum(0).view_as(count_BT) - count_BT


def unpack_bands(packed: PackedCodes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, band by band, rows of the weight and their codes, rows x N, int32."""
    order_C = packed.column_order_C.long()
    for index, tiles_T in enumerate(packed.tiles_BT):
        start = index * packed.band
        order_r = packed.row_order_R[start : start + packed.band].long()
        yield restore_order(_unpack_band(packed, tiles_T, index), order_r, order_C, like=packed)


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
        codes_UTj[chosen_UT] = _tile_codes(words[slots, within], width, packed.trellis).T
    codes_UC = codes_UTj.flatten(1)
    if packed.trellis:
        codes_UC = value_of(codes_UC, _row_quantizers(packed, tiles_UT, position_U))
    _add_row_outliers(packed, codes_UC, position_U)
    codes_UN = codes_UC.new_empty(len(codes_UC), packed.columns)
    codes_UN[:, order_C[real_C]] = codes_UC[:, real_C]
    return codes_UN


def _row_quantizers(packed: PackedCodes, tiles_UT: Tensor, position_U: Tensor) -> Tensor:
    """Return the quantizers of single rows of the tiles, U x C.

    The parities of all rows before them in their bands are read, a word for 32 columns.
    """
    within_U1 = (position_U % packed.band)[:, None]
    words = packed.words_G.view(-1, packed.band)
    # tiles of width 0 have no words: their codes are even
    words = torch.cat([words, words.new_zeros(1, packed.band)])
    parity_UTr = words[torch.where(tiles_UT & 15 == 0, len(words) - 1, tiles_UT >> 4)]
    this, last, earlier = packed.state_BT3[position_U // packed.band].unbind(-1)
    quantizer_UT = this
    for row in range(packed.band):
        quantizer_UT = torch.where(within_U1 == row, this, quantizer_UT)
        this, last, earlier = last ^ earlier ^ parity_UTr[..., row], this, last
    shift_j = torch.arange(TILE, device=this.device)
    return (quantizer_UT[..., None] >> shift_j & 1).flatten(1).int()


def _add_row_outliers(packed: PackedCodes, codes_UC: Tensor, position_U: Tensor) -> None:
    """Add the outliers of single rows of the tiles to their codes, in place."""
    band_U, within_U = position_U // packed.band, position_U % packed.band
    count_UKr = packed.outlier_count_BKr[band_U].long()
    count_UK = count_UKr[torch.arange(len(within_U), device=within_U.device), :, within_U]
    before_UKr = torch.arange(packed.band, device=within_U.device) < within_U[:, None, None]
    first_UK = packed.outlier_first_BK[band_U].long() + (count_UKr * before_UKr).sum(-1)
    # every row is a band of one row: its entries, group after group
    place_O = torch.repeat_interleave(count_UK.flatten())
    rank_O = torch.arange(len(place_O), device=place_O.device)
    rank_O -= (count_UK.flatten().cumsum(0) - count_UK.flatten())[place_O]
    entry_O = packed.outliers_O[first_UK.flatten()[place_O] + rank_O]
    add_outliers(codes_UC, entry_O, count_UK[..., None])


def _pack_band(
    codes_rC: Tensor, quantizer_rC: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack one band.

    Args:
        codes_rC: codes in the order of the tiles.
        quantizer_rC: their quantizers, if they are those of a trellis.

    Returns:
        The widths of its tiles, their words, the outlier entries, and their numbers, 1 x K x r.
    """
    band, trellis = len(codes_rC), quantizer_rC is not None
    codes_rTj = codes_rC.view(band, -1, TILE)
    bits = []
    for width in range(MAX_WIDTH + 1 - trellis):
        outside_T = (_clipped(codes_rTj, *_range(width), trellis) != codes_rTj).sum((0, 2))
        bits.append(width * band * TILE + OUTLIER_BITS * outside_T)
    if trellis:
        # no odd code can be clipped to a width of 0
        bits[0] = torch.where((codes_rTj & 1).any(2).any(0), torch.iinfo(torch.int64).max, bits[0])
    widths_T = torch.stack(bits).argmin(0)
    low_T1 = -(1 << widths_T >> 1)[:, None]
    clipped_rTj = _clipped(codes_rTj, low_T1, (-low_T1 - 1).clamp(min=0), trellis).int()
    words = codes_rC.new_empty(int(widths_T.sum()), band)
    slot_T = widths_T.cumsum(0) - widths_T
    for width in range(1, MAX_WIDTH + 1):
        chosen_T = widths_T == width
        slots = slot_T[chosen_T][:, None] + torch.arange(width, device=slot_T.device)
        words[slots] = _tile_words(clipped_rTj[:, chosen_T], width, trellis)
    rest_rC = (codes_rTj - clipped_rTj).flatten(1)
    if trellis:
        clipped_rC = clipped_rTj.flatten(1)
        rest_rC = value_of(codes_rC, quantizer_rC) - value_of(clipped_rC, quantizer_rC)
    return widths_T, words.flatten(), *outlier_entries(rest_rC[None])


def _clipped(codes: Tensor, low: Tensor | int, high: Tensor | int, trellis: bool) -> Tensor:
    """Return codes clipped to a range, with a trellis to the nearest code of the same parity."""
    clipped = codes.clamp(low, high)
    if not trellis:
        return clipped
    # one step inwards; a range of one code has no other
    inwards = (clipped < codes).int() - (clipped > codes).int()
    moved = clipped - inwards * ((clipped ^ codes) & 1)
    return torch.where(torch.as_tensor(low == high, device=codes.device), clipped, moved)


def _tile_words(codes_rTj: Tensor, width: int, trellis: bool) -> Tensor:
    """Return the words of tiles of one width, T x width x band, from their codes."""
    if not trellis:
        return _words(codes_rTj - _range(width)[0], width)
    words_Twr = [_words(codes_rTj & 1, 1)]
    if width > 1:
        words_Twr.append(_words((codes_rTj >> 1) - _range(width - 1)[0], width - 1))
    return torch.cat(words_Twr, 1)


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


def _unpack_band(packed: PackedCodes, tiles_T: Tensor, index: int) -> Tensor:
    """Return the codes of one band of tiles, band x C, int32.

    Args:
        packed: the codes of the whole weight.
        tiles_T: the entries of `PackedCodes.tiles_BT` for this band.
        index: number of the band.
    """
    band = packed.band
    words = packed.words_G.view(-1, band)
    widths_T, first_T = tiles_T & 15, tiles_T >> 4
    codes_rTj = words.new_zeros(band, len(tiles_T), TILE)
    for width in range(1, MAX_WIDTH + 1):
        chosen_T = widths_T == width
        slots = first_T[chosen_T][:, None] + torch.arange(width, device=first_T.device)
        words_wTr = words[slots].transpose(0, 1)
        codes_rTj[:, chosen_T] = _tile_codes(words_wTr, width, packed.trellis).permute(2, 1, 0)
    count_1Kr = packed.outlier_count_BKr[index : index + 1]
    first = int(packed.outlier_first_BK[index, 0])
    entry_O = packed.outliers_O[first : first + int(count_1Kr.sum())]
    codes_rC = codes_rTj.flatten(1)
    if packed.trellis:
        state_3C = state_bits(packed.state_BT3[index : index + 1])[:, 0]
        codes_rC = value_of(codes_rC, quantizers(codes_rC & 1, state_3C)[0])
    return add_outliers(codes_rC, entry_O, count_1Kr)


def _tile_codes(words_w: Tensor, width: int, trellis: bool) -> Tensor:
    """Return the `TILE` codes of rows of tiles, as the first dimension, from their words.

    Args:
        words_w: the words, int32, as the first dimension; the other dimensions are kept.
        width: bits of a code.
        trellis: whether the lowest bits have a word of their own.
    """
    if not trellis:
        return _codes(words_w, width)
    parity = _codes(words_w[:1], 1) + 1
    return -parity if width == 1 else 2 * _codes(words_w[1:], width - 1) + parity


def _codes(words_w: Tensor, width: int) -> Tensor:
    """Return the `TILE` codes that words hold, raised by half of their range, as `_words` does."""
    words_w = words_w.long() & 0xFFFFFFFF
    codes = []
    for j in range(TILE):
        word, bit = divmod(j * width, 32)
        value = words_w[word] >> bit
        if bit + width > 32:
            value = value | words_w[word + 1] << (32 - bit)
        codes.append((value & ((1 << width) - 1)) + _range(width)[0])
    return torch.stack(codes).int()
