"""The bytes of a payload: header, model, directory of chunks, words; FORMAT.md defines them.

A payload may be damaged or malicious.  The parser therefore checks sizes against the length of the
payload before it allocates memory for them, and the checksum of the head before it uses the rest of
the head.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from watersic_hf.codec import rice
from watersic_hf.codec.layout import MAX_STEPS, Geometry
from watersic_hf.codec.model import MAX_SHIFT, CodeModel, library

MAGIC = b"WSIC"
FORMAT_VERSION = 1
#: Reconstruction rule "scalar": the value of a code is the code itself.
RULE_SCALAR = 1
#: Largest number of keys; the widest range of scales has fewer at eight classes per octave.
MAX_KEYS = 1024

_HEADER = struct.Struct("<4sHHIIIIHHHHBBHIIII")
#: The last four bytes of the fixed header: the checksum of the head without these bytes.
_CHECKSUM = slice(_HEADER.size - 4, _HEADER.size)
#: The four bytes before them: the checksum of the associated bytes.
_ASSOCIATED = slice(_CHECKSUM.start - 4, _CHECKSUM.start)


class CodecError(ValueError):
    """A payload is damaged, cut off, or of a kind that this version does not read."""


def _fail(found: str) -> NoReturn:
    raise CodecError(f"payload: {found}")


@dataclass(frozen=True)
class Header:
    """The fixed header of a payload.

    Attributes:
        version, rule: format version and reconstruction rule.
        rows, cols: shape of the matrix of codes.
        rows_per_lane, cols_per_chunk: geometry of the chunks.
        keys: number of keys; every key has a symbol table.
        first_shifted_key: first key that has a shift.
        row_centre, col_centre: class that is subtracted from the classes before they are stored.
        row_parameter, col_parameter: Rice parameters of the classes.
        escape_words: number of words of an escaped value.
        row_bytes, col_bytes: number of bytes of the Rice codes of the classes.
        associated_checksum: CRC-32 of the bytes that belong to the codes but are stored elsewhere.
        head_checksum: CRC-32 of everything before the words, except this field.
    """

    version: int
    rule: int
    rows: int
    cols: int
    rows_per_lane: int
    cols_per_chunk: int
    keys: int
    first_shifted_key: int
    row_centre: int
    col_centre: int
    row_parameter: int
    col_parameter: int
    escape_words: int
    row_bytes: int
    col_bytes: int
    associated_checksum: int
    head_checksum: int

    @classmethod
    def parse(cls, payload: np.ndarray) -> "Header":
        """Read the fixed header, and check that every field has an allowed value.

        Args:
            payload: bytes of the payload, uint8.

        Raises:
            CodecError: the header is cut off or has a value that is not allowed.
        """
        if len(payload) < _HEADER.size:
            _fail(f"cut off: {len(payload)} bytes are fewer than the {_HEADER.size} of the header")
        magic, *fields = _HEADER.unpack_from(payload)
        if magic != MAGIC:
            _fail(f"starts with {magic!r}, not with {MAGIC!r}")
        header = cls(*fields)
        if header.version != FORMAT_VERSION:
            _fail(f"format version {header.version}; this codec reads version {FORMAT_VERSION}")
        if header.rule != RULE_SCALAR:
            _fail(
                f"reconstruction rule {header.rule}; this codec knows rule {RULE_SCALAR} (scalar)"
            )
        header._check(len(payload))
        return header

    def _check(self, size: int) -> None:
        """Check the fields, and the sizes against the number of bytes of the payload."""
        steps = self.rows_per_lane * self.cols_per_chunk
        if not 1 <= steps <= MAX_STEPS:
            _fail(f"{steps} steps per lane; 1 to {MAX_STEPS} are allowed")
        if self.keys > MAX_KEYS or self.first_shifted_key > self.keys:
            _fail(
                f"{self.keys} keys, shifted from {self.first_shifted_key}; at most {MAX_KEYS} keys "
                f"are allowed"
            )
        if max(self.row_parameter, self.col_parameter) > rice.MAX_PARAMETER:
            _fail(
                f"Rice parameters {self.row_parameter} and {self.col_parameter}; at most "
                f"{rice.MAX_PARAMETER} is allowed"
            )
        if self.escape_words not in (1, 2):
            _fail(f"{self.escape_words} words per escaped value; 1 or 2 are allowed")
        if self.rows > 8 * self.row_bytes or self.cols > 8 * self.col_bytes:
            _fail(
                f"{self.rows} x {self.cols} classes in {self.row_bytes} and {self.col_bytes} "
                f"bytes; a class takes at least one bit"
            )
        if self.model_end > size:
            _fail(f"cut off: {size} bytes, but the classes alone end at byte {self.model_end}")
        if self.words_start > size:
            _fail(f"cut off: {size} bytes, but the chunk directory ends at byte {self.words_start}")

    @property
    def geometry(self) -> Geometry:
        """Shape of the matrix and of its chunks."""
        return Geometry(self.rows, self.cols, self.rows_per_lane, self.cols_per_chunk)

    @property
    def model_end(self) -> int:
        """Byte after the classes."""
        shifts = self.keys - self.first_shifted_key
        return _HEADER.size + self.keys + shifts + self.row_bytes + self.col_bytes

    @property
    def directory_start(self) -> int:
        """First byte of the directory, a multiple of 4."""
        return -(-self.model_end // 4) * 4

    @property
    def words_start(self) -> int:
        """First byte of the words, which follow the directory."""
        return self.directory_start + 8 * self.geometry.chunks


def _head_checksum(head: np.ndarray) -> int:
    return zlib.crc32(head[_HEADER.size :], zlib.crc32(head[: _CHECKSUM.start]))


def _pack_classes(classes: np.ndarray) -> tuple[int, int, bytes]:
    """Return the centre, the Rice parameter and the Rice code of a vector of classes."""
    centre, folded = _fold(classes)
    parameter = rice.best_parameter(folded)
    return centre, parameter, rice.pack(folded, parameter)


def _fold(classes: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the median class, and the zigzag values of the differences from it."""
    centre = int(np.sort(classes)[len(classes) // 2]) if len(classes) else 0
    return centre, rice.zigzag(classes - centre)


def _unpack_classes(
    code: np.ndarray, count: int, centre: int, parameter: int, name: str
) -> np.ndarray:
    """Return a vector of classes, which are all within 0 .. `MAX_KEYS` - 1."""
    try:
        classes = rice.unzigzag(rice.unpack(code, count, parameter)) + centre
    except ValueError as error:
        _fail(f"{name} classes: {error}")
    if count and not 0 <= classes.min() <= classes.max() < MAX_KEYS:
        _fail(
            f"{name} classes from {classes.min()} to {classes.max()}; "
            f"0 to {MAX_KEYS - 1} are allowed"
        )
    return classes


def head_bits(model: CodeModel, geometry: Geometry) -> float:
    """Return the number of bits before the words.

    Args:
        model: model of all rows of the matrix, or of a sample of them.
        geometry: shape of the whole matrix and of its chunks.
    """
    row_bits, col_bits = (
        rice.code_bits(folded, rice.best_parameter(folded))
        for _, folded in (_fold(model.row_class_A), _fold(model.col_class_N))
    )
    row_bits *= geometry.rows / max(1, len(model.row_class_A))
    tables = 2 * len(model.table_K) - model.first_shifted_key
    return 8 * (_HEADER.size + tables) + 64 * geometry.chunks + row_bits + col_bits


@dataclass(frozen=True)
class EncodedCodes:
    """The parts of a payload.

    Attributes:
        header: fixed header.
        model: classes of rows and columns, table and shift of every key.
        words: words of all chunks, uint16.
        offsets: index of the first word of every chunk, and the number of words at the end, int64.
        checksums: CRC-32 of the words of every chunk, uint32.
    """

    header: Header
    model: CodeModel
    words: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray

    @classmethod
    def parse(cls, payload: np.ndarray) -> "EncodedCodes":
        """Parse a payload, and check everything except the words.

        Args:
            payload: bytes of the payload, 1-D uint8.

        Raises:
            CodecError: the payload is damaged, cut off, or of an unknown kind.
        """
        header = Header.parse(payload)
        head = payload[: header.words_start]
        checksum = _head_checksum(head)
        if checksum != header.head_checksum:
            _fail(
                f"head has checksum {checksum:08x}, not {header.head_checksum:08x}; it is damaged"
            )
        model = cls._parse_model(header, head)
        directory = head[header.directory_start :].copy().view("<u4").reshape(-1, 2)
        offsets = np.append(0, directory[:, 0].cumsum(dtype=np.int64))
        lanes_C = header.geometry.lanes_B.repeat(header.geometry.segments)
        short = np.flatnonzero(directory[:, 0] < 2 * lanes_C)
        if len(short):
            _fail(f"chunk {short[0]} has fewer words than its {lanes_C[short[0]]} start states")
        if header.words_start + 2 * int(offsets[-1]) != len(payload):
            needed = header.words_start + 2 * int(offsets[-1])
            _fail(f"{len(payload)} bytes; the chunk directory needs {needed}")
        words = payload[header.words_start :]
        # a payload inside a file may start at an odd address
        words = np.require(words.view("<u2"), np.uint16, requirements="CA")
        return cls(header, model, words, offsets, directory[:, 1])

    @staticmethod
    def _parse_model(header: Header, head: np.ndarray) -> CodeModel:
        """Return the tables, shifts and classes; check that every code has a key and a table."""
        at = _HEADER.size
        parts = []
        for size in (
            header.keys,
            header.keys - header.first_shifted_key,
            header.row_bytes,
            header.col_bytes,
            header.directory_start - header.model_end,
        ):
            parts.append(head[at : at + size])
            at += size
        table_K, shifts, rows, cols, padding = parts
        row_class_A = _unpack_classes(
            rows, header.rows, header.row_centre, header.row_parameter, "row"
        )
        col_class_N = _unpack_classes(
            cols, header.cols, header.col_centre, header.col_parameter, "column"
        )
        shift_K = np.append(np.zeros(header.first_shifted_key, np.uint8), shifts)
        if (shift_K > MAX_SHIFT).any():
            _fail(f"a shift of {shift_K.max()} bits; at most {MAX_SHIFT} are allowed")
        tables = len(library().limit_T)
        if (table_K >= tables).any():
            _fail(f"symbol table {table_K.max()}; version {header.version} has 0 to {tables - 1}")
        if padding.any():
            _fail("the bytes before the chunk directory are not zero")
        if header.rows and header.cols and row_class_A.max() + col_class_N.max() >= header.keys:
            highest = row_class_A.max() + col_class_N.max()
            _fail(f"a code has key {highest}, but there are {header.keys} keys")
        return CodeModel(row_class_A, col_class_N, table_K, shift_K, header.escape_words)

    def check_chunks(self, first: int = 0, stop: int | None = None) -> None:
        """Check the checksums of the chunks first .. stop - 1.

        Args:
            first: first chunk; default: 0.
            stop: chunk after the last one; default: the number of chunks.

        Raises:
            CodecError: the words of a chunk are damaged.
        """
        stop = self.header.geometry.chunks if stop is None else stop
        for chunk in range(first, stop):
            words = self.words[self.offsets[chunk] : self.offsets[chunk + 1]]
            checksum = zlib.crc32(words.astype("<u2", copy=False))
            if checksum != self.checksums[chunk]:
                _fail(
                    f"chunk {chunk} has checksum {checksum:08x}, not {self.checksums[chunk]:08x}; "
                    "it is damaged"
                )


def build(
    model: CodeModel,
    geometry: Geometry,
    groups: list[tuple[np.ndarray, np.ndarray]],
    associated: bytes,
) -> np.ndarray:
    """Return a payload, uint8.

    Args:
        model: model of the codes.
        geometry: shape of the matrix and of its chunks.
        groups: for consecutive groups of chunks, their words and the number of words per chunk.
        associated: bytes that belong to the codes but are stored elsewhere.
    """
    first_shifted = model.first_shifted_key
    row_centre, row_parameter, row_code = _pack_classes(model.row_class_A)
    col_centre, col_parameter, col_code = _pack_classes(model.col_class_N)
    entries = []
    for words, length_C in groups:
        stops = length_C.cumsum()
        words = words.astype("<u2", copy=False)
        for start, stop in zip(stops - length_C, stops, strict=True):
            entries += [stop - start, zlib.crc32(words[start:stop])]
    fields = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        RULE_SCALAR,
        geometry.rows,
        geometry.cols,
        geometry.rows_per_lane,
        geometry.cols_per_chunk,
        len(model.table_K),
        first_shifted,
        row_centre,
        col_centre,
        row_parameter,
        col_parameter,
        model.escape_words,
        len(row_code),
        len(col_code),
        zlib.crc32(associated),
        0,
    )[: _CHECKSUM.start]
    rest = model.table_K.tobytes() + model.shift_K[first_shifted:].tobytes() + row_code + col_code
    rest += bytes(-(len(rest) + _HEADER.size) % 4) + np.array(entries, "<u4").tobytes()
    head = fields + struct.pack("<I", zlib.crc32(rest, zlib.crc32(fields))) + rest
    parts = [np.frombuffer(head, np.uint8)]
    parts += [words.astype("<u2", copy=False).view(np.uint8) for words, _ in groups]
    return np.concatenate(parts)


def rebind(payload: np.ndarray, associated: bytes) -> np.ndarray:
    """Return a copy of a payload that is bound to other associated bytes.

    Args:
        payload: bytes of the payload, uint8.
        associated: new associated bytes.

    Raises:
        CodecError: the payload is damaged or of an unknown kind.
    """
    header = EncodedCodes.parse(payload).header
    payload = payload.copy()
    payload[_ASSOCIATED] = np.frombuffer(struct.pack("<I", zlib.crc32(associated)), np.uint8)
    checksum = _head_checksum(payload[: header.words_start])
    payload[_CHECKSUM] = np.frombuffer(struct.pack("<I", checksum), np.uint8)
    return payload
