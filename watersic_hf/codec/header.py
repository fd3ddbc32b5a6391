"""The fixed header of a payload; FORMAT.md defines it."""

import struct
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from watersic_hf.codec import rice
from watersic_hf.codec.layout import MAX_STEPS, Geometry

MAGIC = b"WSIC"
FORMAT_VERSION = 1
#: Rule "scalar": the value of a code is the code itself.
RULE_SCALAR = 1
#: Rule "trellis": the value of a code depends on its quantizer; see `watersic_hf.codec.trellis`.
RULE_TRELLIS = 2
#: Largest number of keys; the widest range of scales has fewer at eight classes per octave.
MAX_KEYS = 1024

HEADER = struct.Struct("<4sHHIIIIHHHHBBHIIII")
#: The last four bytes of the fixed header: the checksum of the head without these bytes.
CHECKSUM = slice(HEADER.size - 4, HEADER.size)
#: The four bytes before them: the checksum of the associated bytes.
ASSOCIATED = slice(CHECKSUM.start - 4, CHECKSUM.start)


class CodecError(ValueError):
    """A payload is damaged, cut off, or of a kind that this version does not read."""


def fail(found: str) -> NoReturn:
    """Raise the error of a payload in which something wrong was found."""
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
        if len(payload) < HEADER.size:
            fail(f"cut off: {len(payload)} bytes are fewer than the {HEADER.size} of the header")
        magic, *fields = HEADER.unpack_from(payload)
        if magic != MAGIC:
            fail(f"starts with {magic!r}, not with {MAGIC!r}")
        header = cls(*fields)
        if header.version != FORMAT_VERSION:
            fail(f"format version {header.version}; this codec reads version {FORMAT_VERSION}")
        if header.rule not in (RULE_SCALAR, RULE_TRELLIS):
            fail(
                f"rule {header.rule}; this codec knows the rules {RULE_SCALAR} (scalar) and "
                f"{RULE_TRELLIS} (trellis); a newer version of watersic_hf may read it"
            )
        header._check(len(payload))
        return header

    def _check(self, size: int) -> None:
        """Check the fields, and the sizes against the number of bytes of the payload."""
        steps = self.rows_per_lane * self.cols_per_chunk
        if not 1 <= steps <= MAX_STEPS:
            fail(f"{steps} steps per lane; 1 to {MAX_STEPS} are allowed")
        if self.keys > MAX_KEYS or self.first_shifted_key > self.keys:
            fail(
                f"{self.keys} keys, shifted from {self.first_shifted_key}; at most {MAX_KEYS} keys "
                f"are allowed"
            )
        if max(self.row_parameter, self.col_parameter) > rice.MAX_PARAMETER:
            fail(
                f"Rice parameters {self.row_parameter} and {self.col_parameter}; at most "
                f"{rice.MAX_PARAMETER} is allowed"
            )
        if self.escape_words not in (1, 2):
            fail(f"{self.escape_words} words per escaped value; 1 or 2 are allowed")
        if self.rows > 8 * self.row_bytes or self.cols > 8 * self.col_bytes:
            fail(
                f"{self.rows} x {self.cols} classes in {self.row_bytes} and {self.col_bytes} "
                f"bytes; a class takes at least one bit"
            )
        if self.model_end > size:
            fail(f"cut off: {size} bytes, but the classes alone end at byte {self.model_end}")
        if self.words_start > size:
            fail(f"cut off: {size} bytes, but the chunk directory ends at byte {self.words_start}")

    @property
    def trellis(self) -> bool:
        """Whether the values are those of a trellis."""
        return self.rule == RULE_TRELLIS

    @property
    def geometry(self) -> Geometry:
        """Shape of the matrix as it is stored, and of its chunks; a trellis has it transposed."""
        shape = (self.cols, self.rows) if self.trellis else (self.rows, self.cols)
        return Geometry(*shape, self.rows_per_lane, self.cols_per_chunk)

    @property
    def model_end(self) -> int:
        """Byte after the classes."""
        shifts = self.keys - self.first_shifted_key
        return HEADER.size + self.keys + shifts + self.row_bytes + self.col_bytes

    @property
    def directory_start(self) -> int:
        """First byte of the directory, a multiple of 4."""
        return -(-self.model_end // 4) * 4

    @property
    def words_start(self) -> int:
        """First byte of the words, which follow the directory."""
        return self.directory_start + 8 * self.geometry.chunks
