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
#: Columns of paths that one thread walks down at a time.
STRIP = 64

_loader: Callable[[], ModuleType | None] | None = None


def use(loader: Callable[[], ModuleType | None]) -> None:
    """Set the function that returns the compiled functions, or None if there are none.

    Args:
        loader: returns a module like `watersic_kernels.cpu.codec`; it is called at every use, so
            that nothing is imported before the first.
    """
    global _loader
    _loader = loader


def functions() -> ModuleType | None:
    """Return the compiled functions, or None."""
    return None if _loader is None else _loader()


def share(run: Callable[[int, int], None], count: int, codes: int) -> None:
    """Call ``run(first, stop)`` for parts of a number of items, in any order.

    Args:
        run: releases Python's lock while it computes.
        count: number of items.
        codes: number of codes in them, or of words; few are not shared out on threads.
    """
    kernels = functions()
    if kernels is None or codes < ALONE:
        run(0, count)
    else:
        kernels.in_parts(run, count, torch.get_num_threads())


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
        own = words[offsets[chunk] : offsets[chunk + 1]]
        ends_C3[chunk] = kernels.decode_chunk(
            np.concatenate([own, own[-1:].repeat(kernels.LANES)]),
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
            codes.reshape(-1),
            codes.shape[1],
        )

    _for_each_chunk(work, geometry)
    return ends_C3


def encode(
    kernels: ModuleType,
    codes_AN: np.ndarray,
    model: CodeModel,
    geometry: Geometry,
    quantizer_AN: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a matrix as `watersic_hf.codec.stream.encode_chunks` does."""
    entries, trellis = model.encoder_table(), quantizer_AN is not None
    if trellis:
        # the matrix as it is stored is transposed
        codes, quantizers = _in_one_dimension(codes_AN.T), _in_one_dimension(quantizer_AN.T)
    else:
        codes, quantizers = _in_one_dimension(codes_AN), _in_one_dimension(None)
    first_shifted = model.first_shifted_key
    words: list[np.ndarray] = [np.empty(0, np.uint16)] * geometry.chunks
    per_code = 2 + model.escape_words
    row_class_A, col_class_N = _short(model.row_class_A), _short(model.col_class_N)

    def work(chunk: int, rows: slice, cols: slice) -> None:
        size = (rows.stop - rows.start) * (cols.stop - cols.start)
        out = np.empty(128 + per_code * size, np.uint16)
        start, escaped = kernels.encode_chunk(
            codes,
            quantizers,
            trellis,
            geometry.rows if trellis else geometry.cols,
            rows.start,
            cols.start,
            entries,
            model.shift_K,
            first_shifted,
            row_class_A[rows],
            _padded(col_class_N[cols]),
            cols.stop - cols.start,
            geometry.rows_per_lane,
            model.escape_words,
            out,
        )
        words[chunk] = np.concatenate([out[start:], out[:escaped]])

    _for_each_chunk(work, geometry)
    return np.concatenate(words), np.array([len(part) for part in words])


def count(
    kernels: ModuleType, codes_AN: np.ndarray, model: CodeModel, quantizer_AN: np.ndarray | None
) -> np.ndarray:
    """Return the number of codes of every key by symbol, float64 [K, 256]."""
    codes, quantizers = _in_one_dimension(codes_AN), _in_one_dimension(quantizer_AN)
    keys, first_shifted = len(model.shift_K), model.first_shifted_key
    row_class_A, col_class_N = _short(model.row_class_A), _padded(_short(model.col_class_N))
    parts = []

    def work(first: int, stop: int) -> None:
        counts = np.zeros(2 * keys * SYMBOLS, np.uint32)
        kernels.count_symbols(
            codes,
            quantizers,
            quantizer_AN is not None,
            model.shift_K,
            first_shifted,
            row_class_A,
            col_class_N,
            codes_AN.shape[1],
            first,
            stop,
            counts,
        )
        parts.append(counts)

    share(work, len(codes_AN), codes_AN.size)
    count_KS = np.zeros((keys, SYMBOLS))
    for counts in parts:
        count_KS += counts.reshape(2, keys, SYMBOLS).sum(0, dtype=np.float64)
    return count_KS


def column_sums(
    kernels: ModuleType, codes_AN: np.ndarray, bound_N: np.ndarray, step: int
) -> np.ndarray:
    """Return the sums over every `step`-th row of min(|code|, bound), float64 [N]."""
    codes, bounds = _in_one_dimension(codes_AN), _bounds(bound_N)
    A, N = codes_AN.shape
    parts = []

    def work(first: int, stop: int) -> None:
        sums = np.zeros(len(bounds), np.int64)
        kernels.add_columns(codes, bounds, N, first * step, min(stop * step, A), step, sums)
        parts.append(sums[:N])

    share(work, -(-A // step), A * N // step)
    return sum(parts).astype(np.float64)


def row_sums(
    kernels: ModuleType, codes_AN: np.ndarray, bound_N: np.ndarray, weight_N: np.ndarray
) -> np.ndarray:
    """Return the sums of min(|code|, bound) * weight of every row, float64 [A]."""
    codes, bounds = _in_one_dimension(codes_AN), _bounds(bound_N)
    A, N = codes_AN.shape
    weights, sums = _padded(weight_N.astype(np.uint32)), np.empty(A, np.int64)

    def work(first: int, stop: int) -> None:
        kernels.sum_rows(codes, bounds, weights, N, first, stop, sums)

    share(work, A, A * N)
    return sums.astype(np.float64)


def path_codes(
    kernels: ModuleType, values_AN: np.ndarray, order_A: np.ndarray, path_rows: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what `watersic_hf.codec.trellis.codes_of` does, or None if values are on no path."""
    A, N = values_AN.shape
    values = _in_one_dimension(values_AN)
    codes, quantizers = np.empty(A * N, np.int32), np.empty(A * N, np.uint8)
    found = []

    def work(first: int, stop: int) -> None:
        cols = first * STRIP, min(stop * STRIP, N)
        found.append(
            kernels.find_path_codes(values, order_A, path_rows, N, *cols, codes, quantizers)
        )

    share(work, -(-N // STRIP), A * N)
    return (codes.reshape(A, N), quantizers.reshape(A, N)) if all(found) else None


def _bounds(bound_N: np.ndarray) -> np.ndarray:
    """Return bounds as uint32; no magnitude exceeds 2^31."""
    return _padded(np.minimum(bound_N, 2.0**31).astype(np.uint32))


def _short(classes: np.ndarray) -> np.ndarray:
    """Return classes as int32."""
    return classes.astype(np.int32)


def _padded(numbers_N: np.ndarray) -> np.ndarray:
    """Return numbers of columns with zeros up to the next multiple of eight columns."""
    padded = np.zeros(-(-len(numbers_N) // 8) * 8, numbers_N.dtype)
    padded[: len(numbers_N)] = numbers_N
    return padded


def _in_one_dimension(part_AN: np.ndarray | None) -> np.ndarray:
    """Return a matrix row by row; or for none an array of length 0, as types must not vary."""
    if part_AN is None:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(part_AN).reshape(-1)


def _for_each_chunk(work: Callable[[int, slice, slice], None], geometry: Geometry) -> None:
    """Call a function with the index of every chunk, its rows and its columns, in threads."""

    def chunks(first: int, stop: int) -> None:
        for index in range(first, stop):
            band, segment = divmod(index, geometry.segments)
            top, left = band * geometry.band_rows, segment * geometry.cols_per_chunk
            rows = slice(top, min(top + geometry.band_rows, geometry.rows))
            work(index, rows, slice(left, min(left + geometry.cols_per_chunk, geometry.cols)))

    share(chunks, geometry.chunks, geometry.rows * geometry.cols)
