"""The bytes of a payload: header, model, directory of chunks, words; FORMAT.md defines them.

A payload may be damaged or malicious.  The parser therefore checks sizes against the length of the
payload before it allocates memory for them, and the checksum of the head before it uses the rest of
the head.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from watersic_hf.codec import compiled, rice
from watersic_hf.codec.header import (
    ASSOCIATED,
    CHECKSUM,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MAX_KEYS,
    RULE_SCALAR,
    RULE_TRELLIS,
    Header,
    fail,
)
from watersic_hf.codec.layout import Geometry
from watersic_hf.codec.model import EVEN_TABLES, MAX_SHIFT, CodeModel, first_tables


def _head_checksum(head: np.ndarray) -> int:
    return zlib.crc32(head[HEADER.size :], zlib.crc32(head[: CHECKSUM.start]))


def _checksums(words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the CRC-32 of the words of chunks, uint32.

    Args:
        words: words that contain those of the chunks, uint16.
        offsets: index of the first word of every chunk, and the index after the last chunk.
    """
    found = np.empty(len(offsets) - 1, np.uint32)

    def check(first: int, stop: int) -> None:
        for chunk in range(first, stop):
            own = words[offsets[chunk] : offsets[chunk + 1]]
            found[chunk] = zlib.crc32(own.astype("<u2", copy=False))

    compiled.share(check, len(found), len(words))
    return found


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
        fail(f"{name} classes: {error}")
    if count and not 0 <= classes.min() <= classes.max() < MAX_KEYS:
        fail(
            f"{name} classes from {classes.min()} to {classes.max()}; "
            f"0 to {MAX_KEYS - 1} are allowed"
        )
    return classes


def head_bits(model: CodeModel, geometry: Geometry, rows: int, *, trellis: bool = False) -> float:
    """Return the number of bits before the words.

    Args:
        model: model of all rows of the matrix, or of a sample of them.
        geometry: shape of the whole matrix as it is stored, and of its chunks.
        rows: number of rows of the whole matrix.
        trellis: whether the classes of the model are doubled, as those of a trellis are.
    """
    row_bits, col_bits = (
        rice.code_bits(folded, rice.best_parameter(folded))
        for _, folded in (
            _fold(classes // (1 + trellis)) for classes in (model.row_class_A, model.col_class_N)
        )
    )
    row_bits *= rows / max(1, len(model.row_class_A))
    tables = 2 * len(model.table_K) - model.first_shifted_key
    return 8 * (HEADER.size + tables) + 64 * geometry.chunks + row_bits + col_bits


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
            fail(f"head has checksum {checksum:08x}, not {header.head_checksum:08x}; it is damaged")
        model = cls._parse_model(header, head)
        directory = head[header.directory_start :].copy().view("<u4").reshape(-1, 2)
        offsets = np.append(0, directory[:, 0].cumsum(dtype=np.int64))
        lanes_C = header.geometry.lanes_B.repeat(header.geometry.segments)
        short = np.flatnonzero(directory[:, 0] < 2 * lanes_C)
        if len(short):
            fail(f"chunk {short[0]} has fewer words than its {lanes_C[short[0]]} start states")
        if header.words_start + 2 * int(offsets[-1]) != len(payload):
            needed = header.words_start + 2 * int(offsets[-1])
            fail(f"{len(payload)} bytes; the chunk directory needs {needed}")
        words = payload[header.words_start :]
        # a payload inside a file may start at an odd address
        words = np.require(words.view("<u2"), np.uint16, requirements="CA")
        return cls(header, model, words, offsets, directory[:, 1])

    @staticmethod
    def _parse_model(header: Header, head: np.ndarray) -> CodeModel:
        """Return the tables, shifts and classes; check that every code has a key and a table."""
        at = HEADER.size
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
            fail(f"a shift of {shift_K.max()} bits; at most {MAX_SHIFT} are allowed")
        if (table_K >= EVEN_TABLES).any():
            fail(
                f"symbol table {table_K.max()}; version {header.version} has 0 to {EVEN_TABLES - 1}"
            )
        table_K = table_K.astype(np.int64)
        if header.trellis:
            pairs = shift_K[: len(shift_K) // 2 * 2].reshape(-1, 2)
            if (pairs[:, 0] != pairs[:, 1]).any():
                fail("the two quantizers of a trellis have different shifts in a class")
            table_K += first_tables(shift_K)
            row_class_A, col_class_N = 2 * row_class_A, 2 * col_class_N
        if padding.any():
            fail("the bytes before the chunk directory are not zero")
        if header.rows and header.cols:
            highest = row_class_A.max() + col_class_N.max() + header.trellis
            if highest >= header.keys:
                fail(f"a code has key {highest}, but there are {header.keys} keys")
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
        found = _checksums(self.words, self.offsets[first : stop + 1])
        for chunk in np.flatnonzero(found != self.checksums[first:stop])[:1].tolist():
            fail(
                f"chunk {first + chunk} has checksum {found[chunk]:08x}, not "
                f"{self.checksums[first + chunk]:08x}; it is damaged"
            )

    def words_of(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of some chunks, uint16, and the first word of each and the end.

        Args:
            chunks: indices of chunks, in ascending order.

        Raises:
            CodecError: the words of a chunk are damaged.
        """
        if len(chunks) and chunks[-1] - chunks[0] == len(chunks) - 1:
            # consecutive chunks need no copy
            self.check_chunks(int(chunks[0]), int(chunks[-1]) + 1)
            return self.words, self.offsets[chunks[0] : chunks[-1] + 2]
        for chunk in chunks.tolist():
            self.check_chunks(chunk, chunk + 1)
        words = [self.words[self.offsets[chunk] : self.offsets[chunk + 1]] for chunk in chunks]
        return np.concatenate(words), np.cumsum([0, *map(len, words)])


def build(
    model: CodeModel,
    geometry: Geometry,
    groups: list[tuple[np.ndarray, np.ndarray]],
    associated: bytes,
    *,
    trellis: bool = False,
) -> np.ndarray:
    """Return a payload, uint8.

    Args:
        model: model of the codes.
        geometry: shape of the matrix as it is stored, and of its chunks.
        groups: for consecutive groups of chunks, their words and the number of words per chunk.
        associated: bytes that belong to the codes but are stored elsewhere.
        trellis: whether the codes are those of a trellis, so that the model has doubled classes.
    """
    first_shifted = model.first_shifted_key
    row_centre, row_parameter, row_code = _pack_classes(model.row_class_A // (1 + trellis))
    col_centre, col_parameter, col_code = _pack_classes(model.col_class_N // (1 + trellis))
    entries = [np.empty((0, 2), "<u4")]
    for words, length_C in groups:
        found = _checksums(words, np.append(0, length_C.cumsum()))
        entries.append(np.stack([length_C, found], axis=1).astype("<u4"))
    fields = HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        RULE_TRELLIS if trellis else RULE_SCALAR,
        len(model.row_class_A),
        len(model.col_class_N),
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
    )[: CHECKSUM.start]
    numbers_K = (model.table_K % EVEN_TABLES).astype(np.uint8)
    rest = numbers_K.tobytes() + model.shift_K[first_shifted:].tobytes() + row_code + col_code
    rest += bytes(-(len(rest) + HEADER.size) % 4) + np.concatenate(entries).tobytes()
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
    payload[ASSOCIATED] = np.frombuffer(struct.pack("<I", zlib.crc32(associated)), np.uint8)
    checksum = _head_checksum(payload[: header.words_start])
    payload[CHECKSUM] = np.frombuffer(struct.pack("<I", checksum), np.uint8)
    return payload
