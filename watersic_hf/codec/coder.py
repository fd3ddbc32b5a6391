"""The functions of the codec: a matrix of integer codes <-> one self-contained payload.

Shapes: A = rows, N = columns, U = single rows to decode.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from watersic_hf.codec.fit import fit_model
from watersic_hf.codec.layout import Geometry, choose_geometry
from watersic_hf.codec.payload import CodecError, EncodedCodes, Header, build, head_bits, rebind
from watersic_hf.codec.statistics import CodeStatistics, codes_statistics
from watersic_hf.codec.stream import StreamError, decode_chunks, encode_chunks

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


def _payload_array(payload: Tensor) -> np.ndarray:
    """Return a payload as a contiguous uint8 array on the CPU."""
    if payload.ndim != 1 or payload.dtype != torch.uint8:
        raise CodecError(
            f"payload: found {payload.dtype} of shape {tuple(payload.shape)}, but a payload is 1-D "
            "uint8"
        )
    return payload.detach().cpu().contiguous().numpy()


def encode(codes_AN: Tensor, *, associated: bytes = b"") -> Tensor:
    """Encode a matrix of codes without loss.

    Args:
        codes_AN: codes, any integer dtype; the values must fit into 32 bits.
        associated: bytes that belong to the codes but are stored elsewhere.  The payload holds
            their checksum, which `verify` checks.  Default: none.

    Returns:
        The payload, 1-D uint8 on the CPU.  It is deterministic: equal codes give equal bytes.

    Raises:
        CodecError: `codes_AN` is not a matrix of 32-bit integers.
    """
    codes = _codes_array(codes_AN)
    model = fit_model(codes, codes.size).model
    geometry = choose_geometry(*codes.shape)
    groups = []
    for band, part in geometry.groups():
        rows = slice(band * geometry.band_rows, band * geometry.band_rows + part.rows)
        part_model = model.rows(rows)
        groups.append(encode_chunks(codes[rows], part_model, part))
    return torch.from_numpy(build(model, geometry, groups, associated))


def decode(payload: Tensor, *, rows: slice | None = None) -> Tensor:
    """Decode a payload, or some consecutive rows of it.

    Args:
        payload: result of `encode`.
        rows: slice with step 1; only the chunks that hold these rows are read and checked.
            Default: all rows.

    Returns:
        The codes, int32, on the CPU.

    Raises:
        CodecError: the payload is damaged, cut off, or of an unknown kind.
        ValueError: the step of `rows` is not 1.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    geometry = encoded.header.geometry
    start, stop, step = (rows or slice(None)).indices(geometry.rows)
    if step != 1:
        raise ValueError(f"decode: rows has step {step}; only step 1 is supported")
    stop = max(start, stop)
    if geometry.chunks == 0 or start == stop:
        return torch.empty((stop - start, geometry.cols), dtype=torch.int32)
    first, last = start // geometry.band_rows, -(-stop // geometry.band_rows)
    encoded.check_chunks(first * geometry.segments, last * geometry.segments)
    bands, top = geometry.part(first, last), first * geometry.band_rows
    model = encoded.model.rows(slice(top, top + bands.rows))
    offsets = encoded.offsets[first * geometry.segments : last * geometry.segments + 1]
    table, codes_AN = model.decoder_table(), np.empty((bands.rows, bands.cols), np.int32)
    for band, part in bands.groups():
        group = slice(band * bands.band_rows, band * bands.band_rows + part.rows)
        chunk = band * bands.segments
        part_offsets = offsets[chunk : chunk + part.chunks + 1]
        try:
            decode_chunks(
                encoded.words, part_offsets, model.rows(group), table, part, codes_AN[group]
            )
        except StreamError as error:
            chunk += first * geometry.segments + error.chunk
            raise CodecError(f"payload: chunk {chunk}: {error.reason}") from error
    codes_AN = torch.from_numpy(codes_AN)
    # a part is copied, as a view would keep the memory of all bands alive
    return codes_AN if len(codes_AN) == stop - start else codes_AN[start - top : stop - top].clone()


def decode_rows(payload: Tensor, rows_U: Tensor) -> Tensor:
    """Decode single rows of a payload; only the chunks that hold them are read and checked.

    Args:
        payload: result of `encode`.
        rows_U: indices of rows, in ascending order.

    Returns:
        The codes (U, N), int32, on the CPU.

    Raises:
        IndexError: an index is out of range.
        CodecError: the payload is damaged, cut off, or of an unknown kind.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    geometry, rows_U = encoded.header.geometry, rows_U.numpy()
    if len(rows_U) and not 0 <= rows_U[0] <= rows_U[-1] < geometry.rows:
        raise IndexError(
            f"rows {rows_U[0]} to {rows_U[-1]} were requested, but the payload has {geometry.rows}"
        )
    codes_UN = np.empty((len(rows_U), geometry.cols), np.int32)
    table = encoded.model.decoder_table()
    bands, band_U = np.unique(rows_U // geometry.band_rows, return_inverse=True)
    for first in range(0, len(bands) if geometry.chunks else 0, geometry.group_bands):
        together = bands[first : first + geometry.group_bands]
        codes_AN = _decode_bands(encoded, together, table)
        mine_U = (first <= band_U) & (band_U < first + len(together))
        # only the last band of a matrix is smaller than the others
        row = (band_U[mine_U] - first) * geometry.band_rows + rows_U[mine_U] % geometry.band_rows
        codes_UN[mine_U] = codes_AN[row]
    return torch.from_numpy(codes_UN)


def _decode_bands(encoded: EncodedCodes, bands: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the codes of some bands, decoded as one matrix of their rows."""
    geometry = encoded.header.geometry
    rows_A = (bands[:, None] * geometry.band_rows + np.arange(geometry.band_rows)).ravel()
    rows_A = rows_A[rows_A < geometry.rows]
    chunks = (bands[:, None] * geometry.segments + np.arange(geometry.segments)).ravel()
    words = []
    for chunk in chunks.tolist():
        encoded.check_chunks(chunk, chunk + 1)
        words.append(encoded.words[encoded.offsets[chunk] : encoded.offsets[chunk + 1]])
    offsets = np.cumsum([0, *map(len, words)])
    part = Geometry(len(rows_A), geometry.cols, geometry.rows_per_lane, geometry.cols_per_chunk)
    codes_AN = np.empty((part.rows, part.cols), np.int32)
    try:
        model = encoded.model.rows(rows_A)
        decode_chunks(np.concatenate(words), offsets, model, table, part, codes_AN)
    except StreamError as error:
        raise CodecError(f"payload: chunk {chunks[error.chunk]}: {error.reason}") from error
    return codes_AN


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


def payload_bits(codes_AN: Tensor, *, rows: int | None = None) -> float:
    """Predict the size of a payload in bits, without encoding the codes.

    Args:
        codes_AN: all codes of the matrix, or a sample of its rows.
        rows: number of rows of the whole matrix; default: the number of rows of `codes_AN`.
    """
    codes = _codes_array(codes_AN)
    sampled, cols = codes.shape
    rows = sampled if rows is None else rows
    geometry = choose_geometry(rows, cols)
    fit = fit_model(codes, rows * cols)
    lanes = int(geometry.lanes_B.sum()) * geometry.segments
    codes_bits = fit.code_bits * rows / max(1, sampled)
    return codes_bits + LANE_BITS * lanes + head_bits(fit.model, geometry)


def code_statistics(codes_AN: Tensor) -> CodeStatistics:
    """Return entropies, classes and tables of a matrix of codes."""
    return codes_statistics(_codes_array(codes_AN))


class Parts(NamedTuple):
    """The parts of a payload that a decoder on another device needs."""

    header: Header
    tensors: tuple[Tensor, ...]
    """In this order: the words (int16); the index of the first word of every chunk, and the number
    of words at the end (int64); the classes of the rows and of the columns (int32);
    `CodeModel.decoder_table` (int32); the shifts of the keys (int32)."""


def take_apart(payload: Tensor) -> Parts:
    """Check all checksums of a payload, and return its parts.

    Raises:
        CodecError: the payload is damaged, cut off, or of an unknown kind.
    """
    encoded = EncodedCodes.parse(_payload_array(payload))
    encoded.check_chunks()
    model = encoded.model
    arrays = (
        encoded.words.view(np.int16),
        encoded.offsets.astype(np.int64),
        model.row_class_A.astype(np.int32),
        model.col_class_N.astype(np.int32),
        model.decoder_table().view(np.int32),
        model.shift_K.astype(np.int32),
    )
    return Parts(encoded.header, tuple(torch.from_numpy(array) for array in arrays))
