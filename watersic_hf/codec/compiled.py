"""Compiled functions in the place of those of `stream` and `fit`, if somebody has provided them.

This package knows no kernels: `use` tells it where to get them.  They give the same bytes.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from watersic_hf.codec.layout import Geometry
from watersic_hf.codec.model import SYMBOLS, CodeModel

#: Codes below which starting threads takes longer than the work.
ALONE = 1 << 17

_loader: Callable[[], ModuleType | None] | None = None


def use(loader: Callable[[], ModuleType | None]) -> None:
    """Set the function that returns the compiled functions, or None if there are none.

    Args:
        loader: returns a module like `watersic_kernels.cpu.rans`; it is called at every use, so
            that nothing is imported before the first.
    """
    global _loader
    _loader = loader


def functions() -> ModuleType | None:
    """Return the compiled functions, or None."""
    return None if _loader is None else _loader()


def decode(
    kernels: ModuleType,
    words: np.ndarray,
    offsets: np.ndarray,
    model: CodeModel,
    geometry: Geometry,
    output: tuple[np.ndarray, int, np.ndarray],
    *,
    trellis: bool,
) -> np.ndarray:
    """Decode all chunks of a matrix.

    The arguments are those of `watersic_hf.codec.stream.decode_chunks`.

    Returns:
        For every chunk: the words left, the words of its escaped values, and the number of lanes
        that end in a wrong state; int64 [C, 3].
    """
    pages, page_K = model.decoder_pages()
    first_shifted = model.first_shifted_key
    codes, first, place_N = output
    ends_C3 = np.zeros((geometry.chunks, 3), np.int64)

    def work(chunk: int, rows: slice, cols: slice) -> None:
        ends_C3[chunk] = kernels.decode_chunk(
            words[offsets[chunk] : offsets[chunk + 1]],
            page_K,
            pages,
            model.shift_K,
            first_shifted,
            model.row_class_A[rows],
            model.col_class_N[cols],
            geometry.rows_per_lane,
            model.escape_words,
            trellis,
            first + rows.start,
            place_N[cols],
            codes,
        )

    _for_each_chunk(kernels, work, geometry)
    return ends_C3


def encode(
    kernels: ModuleType,
    codes_AN: np.ndarray,
    model: CodeModel,
    geometry: Geometry,
    quantizer_AN: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a matrix as `watersic_hf.codec.stream.encode_chunks` does."""
    entry_KS = model.encoder_table().reshape(-1, SYMBOLS)
    quantizer_AN = _or_none(quantizer_AN, codes_AN)
    words: list[np.ndarray] = [np.empty(0, np.uint16)] * geometry.chunks
    per_code = 2 + model.escape_words

    def work(chunk: int, rows: slice, cols: slice) -> None:
        part_AN = codes_AN[rows, cols]
        out = np.empty(128 + per_code * part_AN.size, np.uint16)
        start, escaped = kernels.encode_chunk(
            part_AN,
            quantizer_AN[rows, cols],
            entry_KS,
            model.shift_K,
            model.row_class_A[rows],
            model.col_class_N[cols],
            geometry.rows_per_lane,
            model.escape_words,
            out,
        )
        words[chunk] = np.concatenate([out[start:], out[:escaped]])

    _for_each_chunk(kernels, work, geometry)
    return np.concatenate(words), np.array([len(part) for part in words])


def count(
    kernels: ModuleType, codes_AN: np.ndarray, model: CodeModel, quantizer_AN: np.ndarray | None
) -> np.ndarray:
    """Return the number of codes of every key by symbol, float64 [K, 256]."""
    count_KS = np.zeros((len(model.shift_K), SYMBOLS), np.int64)
    kernels.count_symbols(
        codes_AN,
        _or_none(quantizer_AN, codes_AN),
        model.shift_K,
        model.row_class_A,
        model.col_class_N,
        count_KS,
    )
    return count_KS.astype(np.float64)


def _or_none(quantizer_AN: np.ndarray | None, codes_AN: np.ndarray) -> np.ndarray:
    """Return the quantizers, or for none an array of no columns, as compiled code has one type."""
    if quantizer_AN is None:
        return np.empty((len(codes_AN), 0), np.uint8)
    return quantizer_AN


def _for_each_chunk(
    kernels: ModuleType, work: Callable[[int, slice, slice], None], geometry: Geometry
) -> None:
    """Call a function with the index of every chunk, its rows and its columns, in threads."""

    def chunks(first: int, stop: int) -> None:
        for index in range(first, stop):
            band, segment = divmod(index, geometry.segments)
            top, left = band * geometry.band_rows, segment * geometry.cols_per_chunk
            rows = slice(top, min(top + geometry.band_rows, geometry.rows))
            work(index, rows, slice(left, min(left + geometry.cols_per_chunk, geometry.cols)))

    alone = geometry.rows * geometry.cols < ALONE
    kernels.in_parts(chunks, geometry.chunks, 1 if alone else torch.get_num_threads())
