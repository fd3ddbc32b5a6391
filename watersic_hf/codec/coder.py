"""The functions of the codec: a matrix of integers <-> one self-contained payload.

With rule 1 the integers are codes, and the payload holds them as they are.  With rule 2 they are
the values of a trellis (`watersic_hf.codec.trellis`); the payload holds their codes transposed, and
the rows of the matrix in the order of the path.

Shapes: A = rows, N = columns, U = single rows to decode; C = chunks.
"""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from watersic_hf.codec.fit import MAX_ROW_CLASS, fit_model, fit_trellis_model
from watersic_hf.codec.header import CodecError, Header
from watersic_hf.codec.layout import Geometry, choose_geometry, choose_path_geometry
from watersic_hf.codec.model import CodeModel
from watersic_hf.codec.payload import EncodedCodes, build, head_bits, rebind
from watersic_hf.codec.statistics import CodeStatistics, codes_statistics
from watersic_hf.codec.stream import Output, StreamError, decode_chunks, encode_chunks
from watersic_hf.codec.trellis import PathError, codes_of, row_order

#: Cost of a lane beyond its codes, in bits: 16 for the state in which the encoder starts, and about
#: 8 by which the 32 bits of the start state exceed the information in it.
LANE_BITS = 24


def _codes_array(codes_AN: Tensor) -> np.ndarray:
    """Return codes as an int32 array on the CPU.

    Raises:
        CodecError: the codes are not a matrix of integers, or a value does not fit into 32 bits.
    """
    if codes_AN.ndim != 2 or codes_AN.dtype.is_floating_point or codes_AN.dtype.is_complex:
        raise CodecError(
            f"codes: found {codes_AN.dtype} of shape {tuple(codes_AN.shape)}, but a matrix of "
            "integers is needed"
        )
    codes = codes_AN.detach().cpu().numpy()
    if codes.size and codes.dtype.itemsize >= 4 and codes.dtype != np.int32:
        low, high = codes.min(), codes.max()
        if low < -(2**31) or high >= 2**31:
            raise CodecError(
                f"codes: found values from {low} to {high}, but they must fit into 32-bit integers"
            )
    return codes.astype(np.int32, copy=False)


class Path(NamedTuple):
    """The order in which the trellis of a matrix visits its rows.

    A path visits the rows by class, and rows of one class by number.  All columns have the same.
    """

    row_class_A: Tensor
    """Classes of the rows, any integer dtype, from 0 to 96: eighths of an octave of the scale of
    the values."""
    rows: int
    """Rows of a path; the next one starts after them."""

    @property
    def order_A(self) -> Tensor:
        """The rows in the order of the path."""
        return self.row_class_A.argsort(stable=True)


def _path_codes(values: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes and quantizers, rows in the order of the path, and their classes.

    Raises:
        CodecError: the classes do not fit the matrix, or the values are on no path.
    """
    row_class_A = path.row_class_A.detach().cpu().numpy().astype(np.int64)
    low, high = (row_class_A.min(), row_class_A.max()) if len(row_class_A) else (0, 0)
    if row_class_A.shape != values.shape[:1] or low < 0 or high > MAX_ROW_CLASS:
        raise CodecError(
            f"path: found {len(row_class_A)} row classes from {low} to {high}, but the matrix has "
            f"{len(values)} rows, each of which needs a class from 0 to {MAX_ROW_CLASS}"
        )
    order_A = row_order(row_class_A)
    try:
        codes_AN, quantizer_AN = codes_of(values, path.rows, order_A)
    except PathError as error:
        raise CodecError(f"values: {error}") from error
    return codes_AN, quantizer_AN, row_class_A[order_A]


def _payload_array(payload: Tensor) -> np.ndarray:
    """Return a payload as a contiguous uint8 array on the CPU."""
    if payload.ndim != 1 or payload.dtype != torch.uint8:
        raise CodecError(
            f"payload: found {payload.dtype} of shape {tuple(payload.shape)}, but a payload is 1-D "
            "uint8"
        )
    return payload.detach().cpu().contiguous().numpy()


def encode(codes_AN: Tensor, *, path: Path | None = None, associated: bytes = b"") -> Tensor:
    """Encode a matrix of codes, or of the values of a trellis, without loss.

    Args:
        codes_AN: codes or values, any integer dtype; they must fit into 32 bits.
        path: the path of the values of a trellis; default: the matrix holds codes.
        associated: bytes that belong to the codes but are stored elsewhere.  The payload holds
            their checksum, which `verify` checks.  Default: none.

    Returns:
        The payload, 1-D uint8 on the CPU.  It is deterministic: equal codes give equal bytes.

    Raises:
        CodecError: `codes_AN` is not a matrix of 32-bit integers, or its values are on no path.
    """
    codes, quantizer = _codes_array(codes_AN), None
    if path is None:
        geometry, model = choose_geometry(*codes.shape), fit_model(codes, codes.size).model
        stored_model = model
    else:
        geometry = choose_path_geometry(*codes.shape, path.rows)
        codes, quantizer, row_class_A = _path_codes(codes, path)
        stored_model = _transposed(fit_trellis_model(codes, quantizer, row_class_A).model)
        natural_A = 2 * path.row_class_A.cpu().numpy().astype(np.int64)
        model = dataclasses.replace(
            stored_model, row_class_A=natural_A, col_class_N=stored_model.row_class_A
        )
        codes, quantizer = codes.T, quantizer.T
    groups = []
    for band, part in geometry.groups():
        rows = slice(band * geometry.band_rows, band * geometry.band_rows + part.rows)
        of_rows = None if quantizer is None else quantizer[rows]
        groups.append(encode_chunks(codes[rows], stored_model.rows(rows), part, of_rows))
    payload = build(model, geometry, groups, associated, trellis=path is not None)
    return torch.from_numpy(payload)


def _transposed(model: CodeModel) -> CodeModel:
    """Return the model of a matrix whose columns are the rows of another."""
    return dataclasses.replace(model, row_class_A=model.col_class_N, col_class_N=model.row_class_A)


def _stored(model: CodeModel) -> tuple[np.ndarray, CodeModel]:
    """Return the order of the paths of a trellis, and the model of the matrix as it is stored."""
    order_A = row_order(model.row_class_A)
    return order_A, _transposed(model.rows(order_A))


def decode(payload: Tensor, *, rows: slice | None = None) -> Tensor:
    """Decode a payload, or some consecutive rows of it.

    Args:
        payload: result of `encode`.
        rows: slice with step 1; only the chunks that hold these rows are read and checked.
            Default: all rows.

    Returns:
        The codes, or the values of a trellis, int32, on the CPU.

    Raises:
        CodecError: the payload is damaged, cut off, or of an unknown kind.
        ValueError: the step of `rows` is not 1.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    start, stop, step = (rows or slice(None)).indices(encoded.header.rows)
    if step != 1:
        raise ValueError(f"decode: rows has step {step}; only step 1 is supported")
    return torch.from_numpy(_decode_rows(encoded, np.arange(start, max(start, stop))))


def decode_rows(payload: Tensor, rows_U: Tensor) -> Tensor:
    """Decode single rows of a payload; only the chunks that hold them are read and checked.

    Args:
        payload: result of `encode`.
        rows_U: indices of rows, in ascending order.

    Returns:
        The codes, or the values of a trellis, (U, N), int32, on the CPU.

    Raises:
        IndexError: an index is out of range.
        CodecError: the payload is damaged, cut off, or of an unknown kind.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    rows_U, count = rows_U.numpy(), encoded.header.rows
    if len(rows_U) and not 0 <= rows_U[0] <= rows_U[-1] < count:
        raise IndexError(
            f"rows {rows_U[0]} to {rows_U[-1]} were requested, but the payload has {count}"
        )
    return torch.from_numpy(_decode_rows(encoded, rows_U))


def _decode_rows(encoded: EncodedCodes, rows_U: np.ndarray) -> np.ndarray:
    """Return some rows of a matrix, as they were given to `encode`, int32."""
    geometry, model = encoded.header.geometry, encoded.model
    codes_UN = np.empty((len(rows_U), encoded.header.cols), np.int32)
    if not codes_UN.size:
        return codes_UN
    if not encoded.header.trellis:
        segments, place_N = np.arange(geometry.segments), np.arange(geometry.cols)
        bands, band_U = np.unique(rows_U // geometry.band_rows, return_inverse=True)
        for first in range(0, len(bands), geometry.group_bands):
            together = bands[first : first + geometry.group_bands]
            start, stop = band_U.searchsorted((first, first + len(together)))
            rows_A = _members(together, geometry.band_rows, geometry.rows)
            output = Output(codes_UN, start, place_N)
            complete = np.array_equal(rows_A, rows_U[start:stop])
            if not complete:
                output = Output(np.empty((len(rows_A), geometry.cols), np.int32), 0, place_N)
            _decode_part(encoded, (together, segments), model, output)
            if not complete:
                codes_UN[start:stop] = output.codes[rows_A.searchsorted(rows_U[start:stop])]
        return codes_UN
    order_A, model = _stored(model)
    place_U = order_A.argsort()[rows_U]
    paths, path_U = np.unique(place_U // geometry.cols_per_chunk, return_inverse=True)
    place_N = np.full(len(_members(paths, geometry.cols_per_chunk, geometry.cols)), -1)
    column_U = path_U * geometry.cols_per_chunk + place_U % geometry.cols_per_chunk
    place_N[column_U] = np.arange(len(rows_U))
    for first in range(0, geometry.bands, geometry.group_bands):
        bands = np.arange(first, min(first + geometry.group_bands, geometry.bands))
        output = Output(codes_UN, first * geometry.band_rows, place_N)
        _decode_part(encoded, (bands, paths), model, output)
    return codes_UN


def _decode_part(
    encoded: EncodedCodes,
    chunks: tuple[np.ndarray, np.ndarray],
    model: CodeModel,
    output: Output,
) -> None:
    """Decode the rows of some bands in the columns of some segments, as they are stored.

    Args:
        encoded: the payload.
        chunks: indices of the bands and of the segments, in ascending order.
        model: model of the matrix as it is stored.
        output: where their codes go.
    """
    bands, segments = chunks
    geometry = encoded.header.geometry
    rows_A = _members(bands, geometry.band_rows, geometry.rows)
    cols_N = _members(segments, geometry.cols_per_chunk, geometry.cols)
    index = (bands[:, None] * geometry.segments + segments).ravel()
    words, offsets = encoded.words_of(index)
    part = Geometry(len(rows_A), len(cols_N), geometry.rows_per_lane, geometry.cols_per_chunk)
    model = dataclasses.replace(
        model, row_class_A=model.row_class_A[rows_A], col_class_N=model.col_class_N[cols_N]
    )
    trellis = encoded.header.trellis
    try:
        decode_chunks(words, offsets, model, part, output, trellis=trellis)
    except StreamError as error:
        raise CodecError(f"payload: chunk {index[error.chunk]}: {error.reason}") from error


def _members(parts: np.ndarray, size: int, count: int) -> np.ndarray:
    """Return the indices below `count` that some parts of `size` indices have."""
    index = (parts[:, None] * size + np.arange(size)).ravel()
    return index[index < count]


def verify(payload: Tensor, *, associated: bytes | None = None) -> None:
    """Check all checksums of a payload without decoding it.

    Args:
        payload: result of `encode`.
        associated: bytes that were passed to `encode`; default: they are not checked.

    Raises:
        CodecError: the payload is damaged, or was made for other associated bytes.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    encoded.check_chunks()
    if associated is not None:
        found, needed = zlib.crc32(associated), encoded.header.associated_checksum
        if found != needed:
            raise CodecError(
                f"payload: the associated {len(associated)} bytes have checksum {found:08x}, not "
                f"{needed:08x}; they are damaged or belong to other codes"
            )


def reassociate(payload: Tensor, associated: bytes) -> Tensor:
    """Return a payload with the same codes, bound to other associated bytes.

    Only two checksums differ between the payloads.

    Args:
        payload: result of `encode`; its chunks are not checked.
        associated: new associated bytes, as for `encode`.

    Returns:
        A new payload of the same length, on the CPU.

    Raises:
        CodecError: the head of the payload is damaged, cut off, or of an unknown kind.
    """
    return torch.from_numpy(rebind(_payload_array(payload), associated))


def read_header(payload: Tensor) -> Header:
    """Return the fixed header of a payload; nothing after it is checked.

    Raises:
        CodecError: the header is cut off, or of an unknown kind.
    """
    return Header.parse(_payload_array(payload))


def payload_bits(codes_AN: Tensor, *, rows: int | None = None, path: Path | None = None) -> float:
    """Predict the size of a payload in bits, without encoding the codes.

    Args:
        codes_AN: all codes of the matrix, or values of a trellis, or a sample of its rows.
        rows: number of rows of the whole matrix; default: the number of rows of `codes_AN`.
        path: the path of the values of a trellis, with the classes of the rows in `codes_AN`;
            default: the matrix holds codes.

    Raises:
        CodecError: the values are on no path.
    """
    codes = _codes_array(codes_AN)
    sampled, cols = codes.shape
    rows = sampled if rows is None else rows
    if path is None:
        geometry, fit = choose_geometry(rows, cols), fit_model(codes, rows * cols)
    else:
        geometry = choose_path_geometry(rows, cols, path.rows)
        fit = fit_trellis_model(*_path_codes(codes, path))
    lanes = int(geometry.lanes_B.sum()) * geometry.segments
    codes_bits = fit.code_bits * rows / max(1, sampled)
    head = head_bits(fit.model, geometry, rows, trellis=path is not None)
    return codes_bits + LANE_BITS * lanes + head


def code_statistics(codes_AN: Tensor, *, path: Path | None = None) -> CodeStatistics:
    """Return entropies, classes and tables of a matrix of codes, or of values of a trellis.

    Raises:
        CodecError: the values are on no path.
    """
    codes = _codes_array(codes_AN)
    if path is None:
        return codes_statistics(codes, fit_model(codes, codes.size))
    codes, quantizer, row_class_A = _path_codes(codes, path)
    return codes_statistics(codes, fit_trellis_model(codes, quantizer, row_class_A), quantizer)


def read_path(payload: Tensor) -> Path | None:
    """Return the path of the values of a trellis, or None if the payload holds codes.

    Raises:
        CodecError: the head of the payload is damaged, cut off, or of an unknown kind.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    if not encoded.header.trellis:
        return None
    row_class_A = torch.from_numpy(encoded.model.row_class_A // 2)
    return Path(row_class_A, encoded.header.cols_per_chunk)


class Parts(NamedTuple):
    """The parts of a payload that a decoder on another device needs."""

    header: Header
    tensors: tuple[Tensor, ...]
    """In this order: the words (int16); the index of the first word of every chunk, and the number
    of words at the end (int64); the classes of the rows and of the columns of the stored matrix
    (int32); `CodeModel.decoder_table` (int32); the shifts of the keys (int32)."""
    order_A: Tensor | None
    """For a trellis, the row of the weight in each column of the stored matrix, int64; else None,
    as the matrix is stored as it is."""


def take_apart(payload: Tensor) -> Parts:
    """Check all checksums of a payload, and return its parts.

    Raises:
        CodecError: the payload is damaged, cut off, or of an unknown kind.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    encoded.check_chunks()
    model, order_A = encoded.model, None
    if encoded.header.trellis:
        order, model = _stored(model)
        order_A = torch.from_numpy(order)
    arrays = (
        encoded.words.view(np.int16),
        encoded.offsets.astype(np.int64),
        model.row_class_A.astype(np.int32),
        model.col_class_N.astype(np.int32),
        model.decoder_table().view(np.int32),
        model.shift_K.astype(np.int32),
    )
    return Parts(encoded.header, tuple(torch.from_numpy(array) for array in arrays), order_A)
