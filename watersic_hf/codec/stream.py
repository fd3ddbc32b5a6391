"""Encode and decode chunks: the layout of their words around the rANS steps.

The words of a chunk are the start states of its lanes (low word, high word, lane after lane), the
words that the steps read, and the escaped values in reverse: the i-th escape in coding order (step,
then lane) is the i-th value from the end of the chunk.  A value is one word, or a low and a high
word.

Shapes: L = lanes of a span (segment, band, lane), T = steps of a block, C = chunks (segment, band).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from watersic_hf.codec import compiled
from watersic_hf.codec.ans import STATE_MIN, Decoder, Encoder
from watersic_hf.codec.layout import Block, Geometry, Span, blocks
from watersic_hf.codec.model import (
    LIMIT,
    SYMBOLS,
    TOTAL,
    WORD_BITS,
    CodeModel,
    join_values,
    split_values,
    to_symbols,
)
from watersic_hf.codec.trellis import TrellisDecoder

#: Smallest entry of the encoder's table for escaped symbols.
_ESCAPED = 1 << 24


class StreamError(ValueError):
    """A chunk does not end at the right word, or in the right state.

    Attributes:
        chunk: index of the chunk in the matrix that was decoded.
        reason: description of what was found.
    """

    def __init__(self, chunk: int, reason: str):
        super().__init__(f"chunk {chunk}: {reason}")
        self.chunk, self.reason = chunk, reason


@dataclass(frozen=True)
class _Record:
    """The words that one block of steps has emitted, in coding order.

    Attributes:
        words: emitted words, uint16.
        count_MC: number of words per chunk, for each of the M emissions.
        escaped, escaped_chunk: escaped values and their chunks.
    """

    words: np.ndarray
    count_MC: np.ndarray
    escaped: np.ndarray
    escaped_chunk: np.ndarray


def _escape_at(end_C: np.ndarray, chunk: np.ndarray, width: int) -> np.ndarray:
    """Return the index of the first word of every escaped value.

    Args:
        end_C: index after the last word of every chunk.
        chunk: chunk of every escaped value, in coding order.
        width: number of words of an escaped value.
    """
    order = chunk.argsort(kind="stable")
    count_C = np.bincount(chunk, minlength=len(end_C))
    rank = np.empty_like(chunk)
    rank[order] = np.arange(len(chunk)) - (count_C.cumsum() - count_C).repeat(count_C)
    return end_C[chunk] - width * (rank + 1)


def encode_chunks(
    codes_AN: np.ndarray,
    model: CodeModel,
    geometry: Geometry,
    quantizer_AN: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a matrix.

    Args:
        codes_AN: codes, int32.
        model: model of these codes.
        geometry: shape of the matrix and of its chunks.
        quantizer_AN: with a trellis, what is added to the keys, uint8; default: nothing.

    Returns:
        The words of all chunks, uint16, and the number of words of every chunk.
    """
    kernels = compiled.functions()
    if kernels is not None and geometry.chunks:
        return compiled.encode(kernels, codes_AN, model, geometry, quantizer_AN)
    table = model.encoder_table()
    states_SL = np.full((geometry.segments, int(geometry.lanes_B.sum())), STATE_MIN, np.uint32)
    records = []
    for span in reversed(list(geometry.spans())):
        states_L = states_SL[: span.segments, span.active].ravel()
        encoder = Encoder(states_L, span.edges)
        for block in reversed(blocks(span, geometry)):
            keys_TL = block.keys(model.row_class_A, model.col_class_N)
            if quantizer_AN is not None:
                keys_TL += block.gather(quantizer_AN, np.copy, np.uint8)
            if keys_TL.max() < model.first_shifted_key:
                symbols_TL = block.gather(codes_AN, to_symbols, np.uint8)
                low_TL = shift_TL = None
            else:
                shift_TL = model.shift_K[keys_TL].astype(np.uint32)
                codes_TL = block.gather(codes_AN, np.copy, np.int32)
                symbols_TL, low_TL = split_values(codes_TL, shift_TL)
            keys_TL *= SYMBOLS
            keys_TL += symbols_TL
            entries_TL = table.take(keys_TL)
            encoder.steps(entries_TL, low_TL, shift_TL)
            row, col, chunk = block.positions(np.flatnonzero(entries_TL >= _ESCAPED))
            records.append(_record(encoder, codes_AN[row, col], chunk, geometry.chunks))
        states_SL[: span.segments, span.active] = states_L.reshape(span.segments, -1)
    return _assemble(states_SL, records[::-1], geometry.lanes_B, model.escape_words)


def _record(encoder: Encoder, escaped: np.ndarray, chunk: np.ndarray, chunks: int) -> _Record:
    """Move the words of a block from the encoder to a record."""
    count_MC = np.zeros((len(encoder.counts), chunks), np.intp)
    if encoder.counts:
        count_MC[:, : len(encoder.edges) - 1] = encoder.counts[::-1]
    words = np.concatenate([np.empty(0, np.uint16), *encoder.words[::-1]])
    encoder.words.clear()
    encoder.counts.clear()
    return _Record(words, count_MC, escaped, chunk)


def _assemble(
    states_SL: np.ndarray, records: list[_Record], lanes_B: np.ndarray, escape_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of all chunks in the order of the format, and the number per chunk."""
    segments, bands = len(states_SL), len(lanes_B)
    lanes_C = np.tile(lanes_B, segments)
    chunk = np.concatenate([record.escaped_chunk for record in records])
    words_C = sum(record.count_MC.sum(0) for record in records)
    length_C = 2 * lanes_C + words_C + escape_words * np.bincount(chunk, minlength=len(lanes_C))
    length_BS = length_C.reshape(segments, bands).T
    end_C = length_BS.ravel().cumsum().reshape(bands, segments).T.ravel()
    words = np.empty(int(length_C.sum()), np.uint16)
    head = _head_words(end_C - length_C, lanes_C)
    _put(words, head, states_SL.ravel(), 2)
    cursor_C = end_C - length_C + 2 * lanes_C
    for record in records:
        count_MC = record.count_MC
        start_MC = cursor_C + count_MC.cumsum(0) - count_MC
        count, start = count_MC.ravel(), start_MC.ravel()
        index = (start - (count.cumsum() - count)).repeat(count)
        index += np.arange(len(index))
        words[index] = record.words
        cursor_C = cursor_C + count_MC.sum(0)
    escaped = np.concatenate([record.escaped for record in records])
    _put(words, _escape_at(end_C, chunk, escape_words), escaped.view(np.uint32), escape_words)
    return words, length_BS.ravel()


def _put(words: np.ndarray, at: np.ndarray, values: np.ndarray, width: int) -> None:
    """Write uint32 values to words at the given indices, as one word or as low and high word."""
    for i in range(width):
        words[at + i] = (values >> np.uint32(WORD_BITS * i)).astype(np.uint16)


def _get(words: np.ndarray, at: np.ndarray, width: int) -> np.ndarray:
    """Return the int32 values that `_put` has written; a single word is signed."""
    if width == 1:
        return words[at].view(np.int16).astype(np.int32)
    return (words[at] | words[at + 1].astype(np.uint32) << np.uint32(WORD_BITS)).view(np.int32)


def _head_words(start_C: np.ndarray, lanes_C: np.ndarray) -> np.ndarray:
    """Return the index of the low word of the start state, for every lane."""
    first_C = lanes_C.cumsum() - lanes_C
    return (start_C - 2 * first_C).repeat(lanes_C) + 2 * np.arange(int(lanes_C.sum()))


class Output(NamedTuple):
    """The place of a decoded matrix in a larger one."""

    codes: np.ndarray
    """The larger matrix, int32, transposed with a trellis."""
    first: int
    """Its row for the first decoded row."""
    place_N: np.ndarray
    """Its column for each decoded column, int64; -1 leaves a column out."""


def decode_chunks(
    words: np.ndarray,
    offsets: np.ndarray,
    model: CodeModel,
    geometry: Geometry,
    output: Output,
    *,
    trellis: bool,
) -> None:
    """Decode a matrix from its chunks.

    Args:
        words: words that contain those of the chunks, uint16.
        offsets: index of the first word of every chunk, and the index after the last chunk.
        model: model of the codes.
        geometry: shape of the matrix as it is stored, and of its chunks.
        output: where the codes go, or the values of a trellis.
        trellis: whether the matrix is that of a trellis, whose paths are the rows.

    Raises:
        StreamError: a chunk does not end at the right word, or in the right state.
    """
    kernels = compiled.functions()
    if kernels is None:
        read = _decode_paths if trellis else _decode_codes
        codes_AN = np.empty((geometry.rows, geometry.cols), np.int32)
        read(_Reader.at_start(words, offsets, geometry), model, codes_AN)
        wanted_N = output.place_N >= 0
        codes_AU = output.codes.T if trellis else output.codes
        rows = slice(output.first, output.first + geometry.rows)
        codes_AU[rows, output.place_N[wanted_N]] = codes_AN[:, wanted_N]
        return
    given = words, offsets, model, geometry, output
    ends_C3 = compiled.decode(kernels, *given, trellis=trellis)
    for chunk in np.flatnonzero((ends_C3[:, 0] != ends_C3[:, 1]) | (ends_C3[:, 2] != 0))[:1]:
        raise _wrong_end(int(chunk), *ends_C3[chunk])


def _decode_codes(reader: "_Reader", model: CodeModel, codes_AN: np.ndarray) -> None:
    """Decode codes; the reader stands at the start of all chunks."""
    table, escapes = model.decoder_table(), []
    for span in reader.geometry.spans():
        decoder = Decoder(*reader.lanes(span))
        for block in blocks(span, reader.geometry):
            keys_TL, shift_TL = _keys_and_shifts(block, model)
            keys_TL *= TOTAL
            entries_TL, low_TL = decoder.steps(table, keys_TL, shift_TL)
            codes_TL = entries_TL.view(np.int32) >> np.int32(24)
            escapes.append(block.positions(np.flatnonzero(codes_TL == -LIMIT - 1)))
            if shift_TL is not None:
                codes_TL = join_values(codes_TL, low_TL.view(np.int32), shift_TL.view(np.int32))
            block.scatter(codes_TL, codes_AN)
        reader.keep(span, decoder)
    row, col, chunk = np.concatenate(escapes, axis=1)
    escaped_C = model.escape_words * np.bincount(chunk, minlength=len(reader.end_C))
    reader.check_ends(escaped_C)
    at = _escape_at(reader.end_C, chunk, model.escape_words)
    codes_AN[row, col] = _get(reader.words, at, model.escape_words)


def _decode_paths(reader: "_Reader", model: CodeModel, values_AN: np.ndarray) -> None:
    """Decode the values of a trellis, as `_decode_codes` does codes."""
    table, left_C = model.decoder_table(), reader.end_C.copy()
    path_3SL = np.zeros((3, *reader.states_SL.shape), np.intp)
    for span in reader.geometry.spans():
        if span.first == 0:
            path_3SL[:] = 0
        path_3L = path_3SL[:, : span.segments, span.active].reshape(3, -1)
        chunks = len(span.edges) - 1
        decoder = TrellisDecoder(*reader.lanes(span), model.escape_words, left_C[:chunks], path_3L)
        for block in blocks(span, reader.geometry):
            keys_TL, shift_TL = _keys_and_shifts(block, model)
            keys_TL *= TOTAL
            block.scatter(decoder.values(table, keys_TL, shift_TL), values_AN)
        reader.keep(span, decoder)
        path_3SL[:, : span.segments, span.active] = decoder.path_3L.reshape(3, span.segments, -1)
    reader.check_ends(reader.end_C - left_C)


def _wrong_end(chunk: int, left: int, escaped: int, moved: int) -> StreamError:
    """Return the error of a chunk that does not end as it must."""
    return StreamError(
        chunk,
        f"{left} words left, but the escaped values take {escaped}; {moved} lanes do not end in "
        "the start state of the encoder; the chunk is damaged",
    )


def _keys_and_shifts(block: Block, model: CodeModel) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the keys of a block and their shifts, uint32, or None if all shifts are 0."""
    keys_TL = block.keys(model.row_class_A, model.col_class_N)
    if keys_TL.max() < model.first_shifted_key:
        return keys_TL, None
    return keys_TL, model.shift_K[keys_TL].astype(np.uint32)


@dataclass(frozen=True)
class _Reader:
    """The states of all lanes, and the read positions of all chunks.

    Attributes:
        words: words that contain those of the chunks, uint16.
        geometry: shape of the matrix and of its chunks.
        states_SL: states of the lanes of all bands, by segment, uint32.
        cursor_C: index of the next word of every chunk.
        end_C: index after the last word of every chunk.
    """

    words: np.ndarray
    geometry: Geometry
    states_SL: np.ndarray
    cursor_C: np.ndarray
    end_C: np.ndarray

    @classmethod
    def at_start(cls, words: np.ndarray, offsets: np.ndarray, geometry: Geometry) -> "_Reader":
        """Read the start states."""
        start_C, end_C = _by_segment(offsets[:-1], geometry), _by_segment(offsets[1:], geometry)
        lanes_C = np.tile(geometry.lanes_B, geometry.segments)
        head = _head_words(start_C, lanes_C)
        states_SL = _get(words, head, 2).view(np.uint32).reshape(geometry.segments, -1)
        return cls(words, geometry, states_SL, start_C + 2 * lanes_C, end_C)

    def lanes(self, span: Span) -> tuple[np.ndarray, ...]:
        """Return what a decoder of the lanes of a span starts with."""
        states_L = self.states_SL[: span.segments, span.active].ravel()
        return states_L, span.edges, self.words, self.cursor_C[: len(span.edges) - 1]

    def keep(self, span: Span, decoder: Decoder) -> None:
        """Keep the states of a decoder for the next span; it has moved the cursors itself."""
        states_SL = decoder.states_L.reshape(span.segments, -1)
        self.states_SL[: span.segments, span.active] = states_SL

    def check_ends(self, escaped_C: np.ndarray) -> None:
        """Check that all words are read, and that every lane ends in `STATE_MIN`.

        Args:
            escaped_C: number of words that the escaped values of every chunk take.
        """
        lanes_C = np.tile(self.geometry.lanes_B, self.geometry.segments)
        left_C = self.end_C - self.cursor_C
        moved = np.append(0, (self.states_SL.ravel() != STATE_MIN).cumsum())
        upto_C = lanes_C.cumsum()
        moved_C = moved[upto_C] - moved[upto_C - lanes_C]
        for at in np.flatnonzero((left_C != escaped_C) | (moved_C != 0))[:1]:
            segment, band = divmod(int(at), self.geometry.bands)
            chunk = band * self.geometry.segments + segment
            raise _wrong_end(chunk, left_C[at], escaped_C[at], moved_C[at])


def _by_segment(values: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Reorder values of chunks from (band, segment), as in the payload, to (segment, band)."""
    return values.reshape(geometry.bands, geometry.segments).T.ravel()
