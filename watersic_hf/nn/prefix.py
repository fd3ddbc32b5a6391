"""Prefix-coded codes: a layout of about the stored size that a GPU can multiply with.

Shapes: A = out_features (rows), N = in_features (columns), B = bands of rows, S = segments of a
        band, T = tiles of a band, R, C = rows and columns of all tiles, r = rows of a band,
        K = groups of columns, G = words, O = outlier entries, j = pairs of columns, V = values of
        a symbol.
        A lower-case b or t is a part of B or T.

A tile (`watersic_hf.nn.tiles`) has a symbol table (`watersic_hf.nn.prefix_tables`) and a shift.  A
symbol is a pair of codes in adjacent columns without their lowest `shift` bits, which follow the
symbol uncoded.  Adjacent tiles form a segment, and every row of a segment is a bit stream of its
own.  So each lane of a GPU decodes one row of a segment, and all lanes of a warp use the same
table at the same time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.codec import Path
from watersic_hf.nn.paths import bands_codes, fits, quantizers, state_bits, value_of
from watersic_hf.nn.prefix_tables import LIMIT, WINDOW, PrefixTables, prefix_tables
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

#: Largest number of low bits that follow a symbol uncoded.
MAX_SHIFT = 8

#: Bits of the number of a table in an entry of `PrefixCodes.tiles_BT`; the shift is above them.
TABLE_BITS = 8

#: The streams of a block begin at this bit of its first word.  A decoder's window starts as many
#: bits early, which multiplies its value by four: the offset of a table entry in bytes.
FIRST_BIT = 2

#: Columns of a stream, about.  A stream is decoded step by step, so short ones keep a GPU busier;
#: each takes 8 bits or slightly more for its length.
STREAM_COLUMNS = 256

#: Words after the last stream: as many as a decoder can read ahead within one tile, whatever the
#: bits are.
PADDING = math.ceil(TILE // 2 * (WINDOW + 2 * MAX_SHIFT) / 32) + 4

#: Number of codes that are encoded or decoded at a time, which bounds the temporary memory.
CHUNK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class PrefixCodes(TiledCodes):
    """Integer codes, A x N, prefix-coded in tiles."""

    words_G: Tensor
    """int32.  A block is one segment of one band.  The streams of its rows follow one another
    without a gap, from bit `FIRST_BIT` of the block on, lowest bit of a word first; the next block
    begins at a word.  For every pair of columns a stream holds the code word, the low bits of the
    first code, and the low bits of the second."""

    first_BS: Tensor
    """int32.  First word of each block."""

    shortest_BS: Tensor
    """int32.  The low 16 bits are the length in bits of a block's shortest stream; the bits above
    are the log2 of the unit of `bits_BSr`."""

    bits_BSr: Tensor
    """uint8.  How much longer a stream is than the block's shortest, in units of a power of two
    bits, rounded up: the last bits of a stream may be padding."""

    tiles_BT: Tensor
    """int16.  The lowest 8 bits are the number of a tile's table, the bits above its shift s.  A
    code is ``value * 2^s + low - 2^(s-1)``."""

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
    def tiles_per_segment(self) -> int:
        """Tiles of a segment; the last segment of a band may have fewer."""
        return -(-self.tiles_BT.shape[1] // self.first_BS.shape[1])


def encode_codes(codes_AN: Tensor, path: Path | None = None) -> PrefixCodes:
    """Encode integer codes losslessly, on their device.

    Args:
        codes_AN: codes, or the values of a trellis.
        path: path of the values; default: these are codes.

    Raises:
        ValueError: the matrix is empty.
    """
    rows, columns = codes_AN.shape
    band = choose_band(codes_AN)
    row_order_R, column_order_C = sort_by_magnitude(codes_AN, band)
    trellis = fits(path, band, rows)
    if trellis:
        row_order_R[:rows] = path.order_A.to(codes_AN.device)
    bands, tiles = len(row_order_R) // band, len(column_order_C) // TILE
    tiles_per_segment = math.ceil(tiles / max(1, round(tiles * TILE / STREAM_COLUMNS)))
    tables = prefix_tables(codes_AN.device, trellis)
    step = max(1, CHUNK // (band * len(column_order_C)))
    parts, states, after_3C = [], [], None
    for start in range(0, bands, step):
        order_r = row_order_R[start * band : (start + step) * band]
        codes_rC = pad_to_tiles(codes_AN[order_r[order_r < rows]], column_order_C, len(order_r))
        codes_brC, quantizer_brC = codes_rC.view(-1, band, codes_rC.shape[1]), None
        if trellis:
            coded, after_3C = bands_codes(codes_brC, path, start, after_3C)
            codes_brC, quantizer_brC = coded.codes_rC, coded.quantizer_rC
            states.append(coded.state_T3)
        codes_brTj = codes_brC.view(-1, band, tiles, TILE)
        parts.append(
            _encode_bands(codes_brTj, order_r < rows, tiles_per_segment, tables, quantizer_brC)
        )
    words, first, shortest, bits, tiles_BT, outliers, counts = zip(*parts, strict=True)
    # each part counts its words from its own start
    sizes = torch.tensor([0, *map(len, words)]).cumsum(0).tolist()
    first_BK, count_BKr = outlier_index(torch.cat(counts))
    return PrefixCodes(
        rows=rows,
        columns=columns,
        words_G=torch.cat([*words, words[0].new_zeros(PADDING)]),
        first_BS=torch.cat([f + s for f, s in zip(first, sizes[:-1], strict=True)]).int(),
        shortest_BS=torch.cat(shortest),
        bits_BSr=torch.cat(bits),
        tiles_BT=torch.cat(tiles_BT),
        state_BT3=torch.cat(states) if trellis else torch.cat(tiles_BT).int()[..., None][..., :0],
        row_order_R=compact_order(row_order_R),
        column_order_C=compact_order(column_order_C),
        outliers_O=torch.cat(outliers),
        outlier_first_BK=first_BK,
        outlier_count_BKr=count_BKr,
    )


def decode_bands(coded: PrefixCodes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, some bands at a time, rows of the weight and their codes, rows x N, int32."""
    order_C = coded.column_order_C.long()
    bands, band = len(coded.tiles_BT), coded.bits_BSr.shape[-1]
    step = max(1, CHUNK // (band * len(order_C)))
    for start in range(0, bands, step):
        stop = min(start + step, bands)
        codes_rC = _decode_bands(coded, start, stop)
        if coded.trellis:
            codes_rbC = codes_rC.view(stop - start, band, -1).transpose(0, 1)
            quantizer_rbC, _ = quantizers(codes_rbC & 1, state_bits(coded.state_BT3[start:stop]))
            codes_rC = value_of(codes_rbC, quantizer_rbC).transpose(0, 1).flatten(0, 1)
        count_bKr = coded.outlier_count_BKr[start:stop]
        first = int(coded.outlier_first_BK[start, 0])
        entry_O = coded.outliers_O[first : first + int(count_bKr.sum())]
        add_outliers(codes_rC, entry_O, count_bKr)
        order_r = coded.row_order_R[start * band : stop * band].long()
        yield restore_order(codes_rC, order_r, order_C, like=coded)


def _encode_bands(
    codes_brTj: Tensor,
    real_r: Tensor,
    tiles_per_segment: int,
    tables: PrefixTables,
    quantizer_brC: Tensor | None,
) -> tuple[Tensor, ...]:
    """Encode some bands.

    Args:
        codes_brTj: codes in the order of the tiles, int32.
        real_r: which rows are rows of the weight; the others are padding and take no bits.
        tiles_per_segment: tiles of a segment.
        tables: the symbol tables.
        quantizer_brC: quantizers of the codes, if they are those of a trellis.

    Returns:
        The tensors of these bands that `PrefixCodes` holds as `words_G`, `first_BS`, counted from
        the first of these words, `shortest_BS`, `bits_BSr`, `tiles_BT`, `outliers_O` and
        `outlier_count_BKr`.
    """
    bands, band, tiles, _ = codes_brTj.shape
    table_bT, shift_bT = _choose(codes_brTj, tables)
    shift_b1T1 = shift_bT[:, None, :, None]
    half_b1T1 = 1 << shift_b1T1 >> 1
    symbol_brTj, low_brTj = _split(codes_brTj, shift_b1T1, half_b1T1)
    index_brTj = _index(symbol_brTj)
    pair = (table_bT[:, None, :, None], index_brTj[..., ::2], index_brTj[..., 1::2])
    kept_brTj = tables.kept_TVV[pair].flatten(-2)
    coded_brTj = (kept_brTj << shift_b1T1) + low_brTj - half_b1T1
    rest_brTj = codes_brTj - coded_brTj
    if quantizer_brC is not None:
        quantizer_brTj = quantizer_brC.view_as(codes_brTj)
        rest_brTj = value_of(codes_brTj, quantizer_brTj) - value_of(coded_brTj, quantizer_brTj)
    rest_brTj *= real_r.view(bands, band, 1, 1)
    outliers_O, count_bKr = outlier_entries(rest_brTj.view(bands, band, -1))

    length = tables.lengths_TVV[pair].long()
    value = tables.words_TVV[pair].long() | low_brTj[..., ::2].long() << length
    value |= low_brTj[..., 1::2].long() << length + shift_b1T1
    length += 2 * shift_b1T1
    length *= real_r.view(bands, band, 1, 1)

    segments = -(-tiles // tiles_per_segment)
    padding = (0, 0, 0, segments * tiles_per_segment - tiles)
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
    # first bit of each pair; the bits of two pairs never overlap, so adding them is an `or`
    at = (length.cumsum(-1) - length + start_bSr[..., None]).flatten()
    value = value.flatten() << (at & 31)
    # two more words: pairs of no bits may stand behind the last word
    words = value.new_zeros(int(words_bS.sum()) + 2)
    words.index_add_(0, at >> 5, value & 0xFFFFFFFF)
    words.index_add_(0, (at >> 5) + 1, value >> 32)
    tiles_bT = (table_bT | shift_bT << TABLE_BITS).short()
    return as_int32(words[:-2]), first_bS, shortest_bS, count_bSr, tiles_bT, outliers_O, count_bKr


def _stream_bits(bits_bSr: Tensor) -> tuple[Tensor, Tensor]:
    """Return `PrefixCodes.shortest_BS` and `PrefixCodes.bits_BSr` for streams of these lengths."""
    shortest_bS = bits_bSr.amin(-1)
    range_bS = bits_bSr.amax(-1) - shortest_bS
    power_bS = ((range_bS / 255).clamp(min=1).log2().ceil()).long()
    more_bSr = bits_bSr - shortest_bS[..., None] + (1 << power_bS)[..., None] - 1
    count_bSr = more_bSr >> power_bS[..., None]
    return (shortest_bS | power_bS << 16).int(), count_bSr.to(torch.uint8)


def _bits(shortest_bS: Tensor, count_bSr: Tensor) -> Tensor:
    """Return the lengths of the streams in bits, int64: the inverse of `_stream_bits`."""
    shortest_bS1 = shortest_bS[..., None].long()
    return (shortest_bS1 & 0xFFFF) + (count_bSr.long() << (shortest_bS1 >> 16))


def _choose(codes_brTj: Tensor, tables: PrefixTables) -> tuple[Tensor, Tensor]:
    """Return the table and the shift that take the fewest bits for every tile."""
    bands, _, tiles, _ = codes_brTj.shape
    codes_tk = codes_brTj.transpose(1, 2).reshape(bands * tiles, -1)
    mean_t = codes_tk.abs().clamp(max=LIMIT << MAX_SHIFT).float().mean(1)
    best_t = torch.full_like(mean_t, math.inf)
    table_t, shift_t = torch.zeros_like(mean_t, dtype=torch.long), torch.zeros_like(mean_t).long()
    for shift in range(MAX_SHIFT + 1):
        # tiles of smaller codes take fewer bits with a smaller shift
        worth_t = (mean_t >= 0.5 * (1 << shift)) if shift else torch.ones_like(mean_t).bool()
        symbol_tk, _ = _split(codes_tk[worth_t], shift, 1 << shift >> 1)
        index_tk, bins = _index(symbol_tk), len(tables.price_VT)
        # one histogram for all tiles
        index_tk += bins * torch.arange(len(index_tk), device=index_tk.device)[:, None]
        count_tV = torch.bincount(index_tk.flatten(), minlength=bins * len(index_tk)).view(-1, bins)
        bits_tT = count_tV.float() @ tables.price_VT + shift * codes_tk.shape[1]
        bits_t, found_t = bits_tT.min(1)
        better_t = bits_t < best_t[worth_t]
        for old_t, new_t in ((best_t, bits_t), (table_t, found_t)):
            old_t[worth_t] = torch.where(better_t, new_t, old_t[worth_t])
        shift_t[worth_t] = torch.where(better_t, shift, shift_t[worth_t])
    return table_t.view(bands, tiles), shift_t.view(bands, tiles)


def _index(symbol: Tensor) -> Tensor:
    """Return the indices of values in the tables: those that no table holds share one by parity."""
    other = 2 * LIMIT + 1 + (symbol & 1)
    return torch.where(symbol.abs() > LIMIT, other, symbol + LIMIT)


def _split(codes: Tensor, shift: Tensor | int, half: Tensor | int) -> tuple[Tensor, Tensor]:
    """Split codes into symbols and their low bits."""
    raised = codes + half
    symbol = raised >> shift
    return symbol, raised - (symbol << shift)


def _decode_bands(coded: PrefixCodes, start: int, stop: int) -> Tensor:
    """Return the codes of some bands without their outliers, rows x C, int32.

    All streams advance in lockstep, one pair of codes at a time.

    Args:
        coded: the codes of the whole weight.
        start: first band.
        stop: end of the bands.
    """
    tables = prefix_tables(coded.words_G.device, coded.trellis)
    entries_W = tables.entries_TW.flatten().long() & 0xFFFFFFFF
    words_G = coded.words_G.long() & 0xFFFFFFFF
    bits_bSr = _bits(coded.shortest_BS[start:stop], coded.bits_BSr[start:stop])
    bands, segments, band = bits_bSr.shape
    tiles_per_segment, tiles = coded.tiles_per_segment, coded.tiles_BT.shape[1]
    at = bits_bSr.cumsum(-1) - bits_bSr + FIRST_BIT
    at += coded.first_BS[start:stop, :, None].long() << 5
    tiles_bST = coded.tiles_BT[start:stop].long()
    columns = tiles_per_segment * TILE
    tiles_bST = torch.nn.functional.pad(tiles_bST, (0, segments * tiles_per_segment - tiles))
    tiles_bST = tiles_bST.view(bands, segments, tiles_per_segment)
    codes = words_G.new_empty(columns, bands, segments, band, dtype=torch.int32)
    limit = len(words_G) - PADDING << 5
    for tile in range(tiles_per_segment):
        # padding rows have no stream of their own and read on into those of others
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
    codes = codes.view(columns, bands, segments, band).permute(1, 3, 2, 0)
    return codes.reshape(bands * band, segments * columns)[:, : tiles * TILE].contiguous()
