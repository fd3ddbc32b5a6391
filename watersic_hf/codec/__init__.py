"""Lossless entropy coding of integer matrices: codes <-> a payload of bytes."""

from watersic_hf.codec.coder import (
    CodeStatistics,
    Path,
    code_statistics,
    decode,
    decode_rows,
    encode,
    payload_bits,
    read_header,
    read_path,
    reassociate,
    take_apart,
    verify,
)
from watersic_hf.codec.compiled import use as use_compiled
from watersic_hf.codec.header import FORMAT_VERSION, CodecError, Header
from watersic_hf.codec.payload import EncodedCodes

__all__ = [
    "FORMAT_VERSION",
    "CodeStatistics",
    "CodecError",
    "EncodedCodes",
    "Header",
    "Path",
    "code_statistics",
    "decode",
    "decode_rows",
    "encode",
    "payload_bits",
    "read_header",
    "read_path",
    "reassociate",
    "take_apart",
    "use_compiled",
    "verify",
]
