"""Lossless entropy coding of integer matrices: codes <-> a payload of bytes."""

from watersic_hf.codec.coder import (
    CodeStatistics,
    code_statistics,
    decode,
    decode_rows,
    encode,
    payload_bits,
    read_header,
    reassociate,
    take_apart,
    verify,
)
from watersic_hf.codec.payload import FORMAT_VERSION, CodecError, EncodedCodes, Header

__all__ = [
    "FORMAT_VERSION",
    "CodeStatistics",
    "CodecError",
    "EncodedCodes",
    "Header",
    "code_statistics",
    "decode",
    "decode_rows",
    "encode",
    "payload_bits",
    "read_header",
    "reassociate",
    "take_apart",
    "verify",
]
