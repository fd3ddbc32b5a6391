"""Prefix-coded codes: the form of a weight of about the stored size that a GPU multiplies with.

Shapes: A = out_features (rows), N = in_features (columns), B = bands of rows, S = segments of a
        band, T = tiles of a band, R, C = rows and columns of all tiles, r = rows of a band,
        G = words, O = entries for outliers, j = pairs of columns.

A tile (`tiles.py`) has a symbol table (`prefix_tables.py`), whose symbols are pairs of codes of two
columns side by side, and a shift: so many low bits of a code follow its symbol as they are.  Tiles
side by side make up a segment, and every row of a segment is a stream of bits of its own, so that a
lane of a GPU decodes a row of a segment, and all lanes of a warp have the same table at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.nn.prefix_tables import LIMIT, WINDOW, PrefixTables, prefix_tables
from watersic_hf.nn.tiles import (
    TILE,
    TiledCodes,
    add_outliers,
    as_int32,
    band_of,
    filled,
    in_order,
    narrow,
    outlier_entries,
    sorted_orders,
)

#: Most low bits of a code that follow its symbol.
MAX_SHIFT = 8

#: Bits of the number of a table; the shift of a tile is above.
TABLE_BITS = 8

#: A block's streams begin at this bit of its first word: a decoder's window starts as many bits
#: early, where it makes the offset of a table's entry in bytes.
FIRST_BIT = 2

#: Streams that a layer is cut into, as far as a stream has the columns for it: fewer cost less
#: memory, more keep a GPU busier.  Not yet measured on one.
STREAMS = 1 << 16
STREAM_COLUMNS = (512, 1024)

#: Words behind the last stream: as many as a decoder can read ahead within one tile, whatever the
#: bits are.
PADDING = math.ceil(TILE // 2 * (WINDOW + 2 * MAX_SHIFT) / 32) + 4

#: Codes that are encoded or decoded at a time.
CHUNK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class PrefixCodes(TiledCodes):
    """Integer codes, A x N, prefix-coded in tiles."""

    words_G: Tensor
    """int32.  The streams of a block, one segment of one band, row after row without a gap, from
    bit `FIRST_BIT` on, the lowest bit of a word first; then the next block, at a word.  A stream
    has for every pair the code word, the low bits of the first code and those of the second."""

    first_BS: Tensor
    """int32.  First word of a block."""

    shortest_BS: Tensor
    """int32.  In the low 16 bits a number of bits, above a power of two, for `bits_BSr`."""

    bits_BSr: Tensor
    """uint8.  A stream has so many bits, times the block's power of two, more than the shortest;
    a few of them mean nothing where that is no multiple."""

    tiles_BT: Tensor
    """int16.  The number of a tile's table in the lowest 8 bits, its shift above.  With the shift s
    a code is ``value * 2^s + low - 2^(s-1)``."""

    row_order_R: Tensor
    """int16 or int32.  Which row of the weight a row of the tiles is; A where filled up."""

    column_order_C: Tensor
    """int16 or int32.  Which column of the weight a column of the tiles is; N where filled up."""

    outliers_O: Tensor
    """int16.  By rows of the tiles, what is to be added to the codes; see `tiles.py`."""

    outlier_first_B: Tensor
    """int32.  Where the outliers of a band begin."""

    outlier_count_R: Tensor
    """uint8 or int32.  Entries of a row."""

    @property
    def share(self) -> int:
        """Tiles of a segment; the last one may have fewer."""
        return -(-self.tiles_BT.shape[1] // self.first_BS.shape[1])


def encode_codes(codes_AN: Tensor) -> PrefixCodes:
    """Encode integer codes, without loss, on their device.

    Raises:
        ValueError: there is no code.
    """
    rows, columns = codes_AN.shape
    band = band_of(codes_AN)
    row_order_R, column_order_C = sorted_orders(codes_AN, band)
    bands, tiles = len(row_order_R) // band, len(column_order_C) // TILE
    target = min(max(rows * columns / STREAMS, STREAM_COLUMNS[0]), STREAM_COLUMNS[1])
    share = math.ceil(tiles / max(1, round(tiles * TILE / target)))
    tables = prefix_tables(codes_AN.device)
    step = max(1, CHUNK // (band * len(column_order_C)))
    parts = []
    for start in range(0, bands, step):
        order_r = row_order_R[start * band : (start + step) * band]
        codes_rC = filled(codes_AN[order_r[order_r < rows]], column_order_C, len(order_r))
        codes_brTj = codes_rC.view(-1, band, tiles, TILE)
        parts.append(_encode_bands(codes_brTj, order_r < rows, share, tables))
    words, first, shortest, bits, tiles_BT, outliers, counts = zip(*parts, strict=True)
    sizes = torch.tensor([0, *map(len, words)]).cumsum(0).tolist()
    count_R = torch.cat(counts)
    per_band_B = count_R.view(bands, band).sum(1)
    return PrefixCodes(
        rows=rows,
        columns=columns,
        words_G=torch.cat([*words, words[0].new_zeros(PADDING)]),
        first_BS=torch.cat([f + s for f, s in zip(first, sizes[:-1], strict=True)]).int(),
        shortest_BS=torch.cat(shortest),
        bits_BSr=torch.cat(bits),
        tiles_BT=torch.cat(tiles_BT),
        row_order_R=narrow(row_order_R),
        column_order_C=narrow(column_order_C),
        outliers_O=torch.cat(outliers),
        outlier_first_B=(per_band_B.cumsum(0) - per_band_B).int(),
        outlier_count_R=count_R.to(torch.uint8 if int(count_R.max()) < 256 else torch.int32),
    )


def decode_bands(coded: PrefixCodes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of the weight of some bands at a time, and their codes, rows x N, int32."""
    order_C = coded.column_order_C.long()
    bands, band = len(coded.tiles_BT), coded.bits_BSr.shape[-1]
    count_R = coded.outlier_count_R.long()
    step = max(1, CHUNK // (band * len(order_C)))
    for start in range(0, bands, step):
        stop = min(start + step, bands)
        codes_rC = _decode_bands(coded, start, stop)
        count_r = count_R[start * band : stop * band]
        first = int(coded.outlier_first_B[start])
        entry_O = coded.outliers_O[first : first + int(count_r.sum())]
        add_outliers(codes_rC, entry_O, count_r)
        order_r = coded.row_order_R[start * band : stop * band].long()
        yield in_order(codes_rC, order_r, order_C, like=coded)


def _encode_bands(
    codes_brTj: Tensor, real_r: Tensor, share: int, tables: PrefixTables
) -> tuple[Tensor, ...]:
    """The words, and what else a `PrefixCodes` has, of some bands.

    Rows that are not `real_r` are filled up: they have no bits.
    """
    bands, band, tiles, _ = codes_brTj.shape
    table_bT, shift_bT = _choose(codes_brTj, tables)
    shift_b1T1 = shift_bT[:, None, :, None]
    half_b1T1 = 1 << shift_b1T1 >> 1
    symbol_brTj, low_brTj = _split(codes_brTj, shift_b1T1, half_b1T1)
    index_brTj = symbol_brTj.clamp(-LIMIT - 1, LIMIT + 1) + LIMIT
    # both ends stand for all values that no table holds
    index_brTj = torch.where(index_brTj < 0, 2 * LIMIT + 1, index_brTj)
    pair = (table_bT[:, None, :, None], index_brTj[..., ::2], index_brTj[..., 1::2])
    kept_brTj = tables.kept_TVV[pair].flatten(-2)
    rest_brTj = codes_brTj - ((kept_brTj << shift_b1T1) + low_brTj - half_b1T1)
    rest_brTj *= real_r.view(bands, band, 1, 1)
    outliers_O, count_r = outlier_entries(rest_brTj.view(bands * band, -1))

    length = tables.lengths_TVV[pair].long()
    value = tables.words_TVV[pair].long() | low_brTj[..., ::2].long() << length
    value |= low_brTj[..., 1::2].long() << length + shift_b1T1
    length += 2 * shift_b1T1
    length *= real_r.view(bands, band, 1, 1)

    segments = -(-tiles // share)
    padding = (0, 0, 0, segments * share - tiles)
    length, value = (
        torch.nn.functional.pad(part, padding)
        .view(bands, band, segments, -1)
        .transpose(1, 2)
        .contiguous()
        for part in (length, value)
    )
    shortest_bS, count_bSr = _stream_bits(length.sum(-1))
    bits_bSr = _bits(shortest_bS, count_bSr)
    words_bS = (bits_bSr.sum(-1) + FIRST_BIT + 31) >> 5
    first_bS = (words_bS.flatten().cumsum(0)).view_as(words_bS) - words_bS
    start_bSr = bits_bSr.cumsum(-1) - bits_bSr + FIRST_BIT + (first_bS[..., None] << 5)
    at = (length.cumsum(-1) - length + start_bSr[..., None]).flatten()
    value = value.flatten() << (at & 31)
    # two more words for pairs of no bits behind the last one
    words = value.new_zeros(int(words_bS.sum()) + 2)
    words.index_add_(0, at >> 5, value & 0xFFFFFFFF)
    words.index_add_(0, (at >> 5) + 1, value >> 32)
    tiles_bT = (table_bT | shift_bT << TABLE_BITS).short()
    return as_int32(words[:-2]), first_bS, shortest_bS, count_bSr, tiles_bT, outliers_O, count_r


def _stream_bits(bits_bSr: Tensor) -> tuple[Tensor, Tensor]:
    """`PrefixCodes.shortest_BS` and `bits_BSr` that leave room for so many bits."""
    shortest_bS = bits_bSr.amin(-1)
    range_bS = bits_bSr.amax(-1) - shortest_bS
    power_bS = ((range_bS / 255).clamp(min=1).log2().ceil()).long()
    more_bSr = bits_bSr - shortest_bS[..., None] + (1 << power_bS)[..., None] - 1
    count_bSr = more_bSr >> power_bS[..., None]
    return (shortest_bS | power_bS << 16).int(), count_bSr.to(torch.uint8)


def _bits(shortest_bS: Tensor, count_bSr: Tensor) -> Tensor:
    """Bits of the streams, int64."""
    shortest_bS1 = shortest_bS[..., None].long()
    return (shortest_bS1 & 0xFFFF) + (count_bSr.long() << (shortest_bS1 >> 16))


def _choose(codes_brTj: Tensor, tables: PrefixTables) -> tuple[Tensor, Tensor]:
    """The table and the shift of least bits for every tile."""
    bands, _, tiles, _ = codes_brTj.shape
    codes_tk = codes_brTj.transpose(1, 2).reshape(bands * tiles, -1)
    mean_t = codes_tk.abs().clamp(max=LIMIT << MAX_SHIFT).float().mean(1)
    best_t = torch.full_like(mean_t, math.inf)
    table_t, shift_t = torch.zeros_like(mean_t, dtype=torch.long), torch.zeros_like(mean_t).long()
    for shift in range(MAX_SHIFT + 1):
        # a smaller mean is better off without so many low bits
        worth_t = (mean_t >= 0.5 * (1 << shift)) if shift else torch.ones_like(mean_t).bool()
        symbol_tk, _ = _split(codes_tk[worth_t], shift, 1 << shift >> 1)
        symbol_tk = symbol_tk.clamp(-LIMIT - 1, LIMIT + 1) + LIMIT
        symbol_tk = torch.where(symbol_tk < 0, 2 * LIMIT + 1, symbol_tk)
        symbol_tk += torch.arange(len(symbol_tk), device=symbol_tk.device)[:, None] << 5
        count_tV = torch.bincount(symbol_tk.flatten(), minlength=len(symbol_tk) << 5).view(-1, 32)
        bits_tT = count_tV.float() @ tables.price_VT + shift * codes_tk.shape[1]
        bits_t, found_t = bits_tT.min(1)
        better_t = bits_t < best_t[worth_t]
        for old_t, new_t in ((best_t, bits_t), (table_t, found_t)):
            old_t[worth_t] = torch.where(better_t, new_t, old_t[worth_t])
        shift_t[worth_t] = torch.where(better_t, shift, shift_t[worth_t])
    return table_t.view(bands, tiles), shift_t.view(bands, tiles)


def _split(codes: Tensor, shift: Tensor | int, half: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes as symbols and low bits."""
    raised = codes + half
    symbol = raised >> shift
    return symbol, raised - (symbol << shift)


def _decode_bands(coded: PrefixCodes, start: int, stop: int) -> Tensor:
    """The codes of some bands of tiles but the outliers, rows x C, int32, all streams in step."""
    tables = prefix_tables(coded.words_G.device)
    entries_W = tables.entries_TW.flatten().long() & 0xFFFFFFFF
    words_G = coded.words_G.long() & 0xFFFFFFFF
    bits_bSr = _bits(coded.shortest_BS[start:stop], coded.bits_BSr[start:stop])
    bands, segments, band = bits_bSr.shape
    share, tiles = coded.share, coded.tiles_BT.shape[1]
    at = bits_bSr.cumsum(-1) - bits_bSr + FIRST_BIT
    at += coded.first_BS[start:stop, :, None].long() << 5
    tiles_bST = coded.tiles_BT[start:stop].long()
    tiles_bST = torch.nn.functional.pad(tiles_bST, (0, segments * share - tiles))
    tiles_bST = tiles_bST.view(bands, segments, share)
    codes = words_G.new_empty(share * TILE, bands, segments, band, dtype=torch.int32)
    limit = len(words_G) - PADDING << 5
    for tile in range(share):
        # rows that are filled up have no stream of their own, and read on in others
        at = at.clamp(max=limit)
        table = (tiles_bST[..., tile, None] & ((1 << TABLE_BITS) - 1)) << WINDOW
        shift = tiles_bST[..., tile, None] >> TABLE_BITS
        half, ones = 1 << shift >> 1, (1 << shift) - 1
        for j in range(tile * TILE, (tile + 1) * TILE, 2):
            word = at >> 5
            ahead = (words_G[word] | words_G[word + 1] << 32) >> (at & 31)
            entry = entries_W[table + (ahead & ((1 << WINDOW) - 1))]
            length = entry & 15
            low = ahead >> length
            for index, value in ((j, entry >> 16), (j + 1, entry & 0xFFF0)):
                whole = (value << 16).int().view(torch.float32).long()
                codes[index] = (whole << shift) + (low & ones) - half
                low = low >> shift
            at = at + length + 2 * shift
    codes = codes.view(share * TILE, bands, segments, band).permute(1, 3, 2, 0)
    return codes.reshape(bands * band, segments * share * TILE)[:, : tiles * TILE].contiguous()
