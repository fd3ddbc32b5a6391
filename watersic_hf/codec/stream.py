"""Encode and decode chunks: the layout of their words around the rANS steps.

The words of a chunk are the start states of its lanes (low word, high word, lane after lane), the
words that the steps read, and the escaped values in reverse: the i-th escape in coding order (step,
then lane) is the i-th value from the end of the chunk.  A value is one word, or a low and a high
word.

Shapes: L = lanes of a span (segment, band, lane), T = steps of a block, C = chunks (segment, band).
"""

from dataclasses import dataclass

import numpy as np

from watersic_hf.codec.ans import STATE_MIN, Decoder, Encoder
from watersic_hf.codec.layout import Geometry, blocks
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
    codes_AN: np.ndarray, model: CodeModel, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a matrix.

    Args:
        codes_AN: codes, int32.
        model: model of these codes.
        geometry: shape of the matrix and of its chunks.

    Returns:
        The words of all chunks, uint16, and the number of words of every chunk.
    """
    table = model.encoder_table()
    states_SL = np.full((geometry.segments, int(geometry.lanes_B.sum())), STATE_MIN, np.uint32)
    records = []
    for span in reversed(list(geometry.spans())):
        states_L = states_SL[: span.segments, span.active].ravel()
        encoder = Encoder(states_L, span.edges)
        for block in reversed(blocks(span, geometry)):
            keys_TL = block.keys(model.row_class_A, model.col_class_N)
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


def decode_chunks(
    words: np.ndarray,
    offsets: np.ndarray,
    model: CodeModel,
    table: np.ndarray,
    geometry: Geometry,
    codes_AN: np.ndarray,
) -> None:
    """Decode a matrix from its chunks.

    Args:
        words: words that contain those of the chunks, uint16.
        offsets: index of the first word of every chunk, and the index after the last chunk.
        model: model of the codes.
        table: result of `CodeModel.decoder_table`, which is built once for many parts.
        geometry: shape of the matrix and of its chunks.
        codes_AN: output, codes, int32.

    Raises:
        StreamError: a chunk does not end at the right word, or in the right state.
    """
    escapes = []
    start_C, end_C = _by_segment(offsets[:-1], geometry), _by_segment(offsets[1:], geometry)
    lanes_C = np.tile(geometry.lanes_B, geometry.segments)
    head = _head_words(start_C, lanes_C)
    states_SL = _get(words, head, 2).view(np.uint32).reshape(geometry.segments, -1)
    cursor_C = start_C + 2 * lanes_C
    for span in geometry.spans():
        states_L = states_SL[: span.segments, span.active].ravel()
        decoder = Decoder(states_L, span.edges, words, cursor_C[: len(span.edges) - 1])
        for block in blocks(span, geometry):
            keys_TL = block.keys(model.row_class_A, model.col_class_N)
            shifted = keys_TL.max() >= model.first_shifted_key
            shift_TL = model.shift_K[keys_TL].astype(np.uint32) if shifted else None
            keys_TL *= TOTAL
            entries_TL, low_TL = decoder.steps(table, keys_TL, shift_TL)
            codes_TL = entries_TL.view(np.int32) >> np.int32(24)
            escapes.append(block.positions(np.flatnonzero(codes_TL == -LIMIT - 1)))
            if shifted:
                codes_TL = join_values(codes_TL, low_TL.view(np.int32), shift_TL.view(np.int32))
            block.scatter(codes_TL, codes_AN)
        states_SL[: span.segments, span.active] = states_L.reshape(span.segments, -1)
    row, col, chunk = np.concatenate(escapes, axis=1)
    escaped_C = model.escape_words * np.bincount(chunk, minlength=len(end_C))
    _check_ends(states_SL, lanes_C, end_C - cursor_C, escaped_C, geometry)
    at = _escape_at(end_C, chunk, model.escape_words)
    codes_AN[row, col] = _get(words, at, model.escape_words)


def _by_segment(values: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Reorder values of chunks from (band, segment), as in the payload, to (segment, band)."""
    return values.reshape(geometry.bands, geometry.segments).T.ravel()


def _check_ends(
    states_SL: np.ndarray,
    lanes_C: np.ndarray,
    left_C: np.ndarray,
    escaped_C: np.ndarray,
    geometry: Geometry,
) -> None:
    """Check that all words are read, and that every lane ends in `STATE_MIN`."""
    moved = np.append(0, (states_SL.ravel() != STATE_MIN).cumsum())
    upto_C = lanes_C.cumsum()
    moved_C = moved[upto_C] - moved[upto_C - lanes_C]
    for at in np.flatnonzero((left_C != escaped_C) | (moved_C != 0))[:1]:
        segment, band = divmod(int(at), geometry.bands)
        raise StreamError(
            band * geometry.segments + segment,
            f"{left_C[at]} words left, but the escaped values take {escaped_C[at]}; {moved_C[at]} "
            f"lanes do not end in the start state of the encoder; the chunk is damaged",
        )
