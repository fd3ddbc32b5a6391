import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec import payload as layout

pytestmark = pytest.mark.usefixtures("implementation")

ESCAPES = 6


@pytest.fixture
def small():
    """A payload with low bits and escapes, and its codes."""
    codes_AN = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (100, 90))).to(torch.int32)
    codes_AN[:, 7] *= 100
    for i in range(ESCAPES):
        codes_AN[5 * i + 3, 3 * i + 10] = 300 * (-1) ** i
    payload = codec.encode(codes_AN, associated=b"scales")
    assert codec.code_statistics(codes_AN).escapes == ESCAPES
    assert codec.EncodedCodes.parse(payload.numpy()).model.shift_K.any()
    return payload, codes_AN


def with_field(payload, name, value):
    """Return the payload with one field of the header changed and the head's checksum set right."""
    offset, kind = {
        "version": (4, "<H"),
        "rule": (6, "<H"),
        "rows": (8, "<I"),
        "cols": (12, "<I"),
        "rows_per_lane": (16, "<I"),
        "cols_per_chunk": (20, "<I"),
        "keys": (24, "<H"),
        "first_shifted_key": (26, "<H"),
        "row_centre": (28, "<H"),
        "col_parameter": (33, "<B"),
        "escape_words": (34, "<H"),
        "row_bytes": (36, "<I"),
        "col_bytes": (40, "<I"),
    }[name]
    changed = bytearray(payload.numpy().tobytes())
    struct.pack_into(kind, changed, offset, value)
    return signed(changed, codec.read_header(payload).words_start)


def signed(head, words_start):
    """Return bytes with the head's checksum set right, as a payload."""
    checksum = zlib.crc32(head[52:words_start], zlib.crc32(head[:48]))
    struct.pack_into("<I", head, 48, checksum)
    return torch.frombuffer(head, dtype=torch.uint8)


def test_every_flipped_byte_raises(small):
    payload, _ = small

    for at in range(len(payload)):
        damaged = payload.clone()
        damaged[at] ^= (0x01, 0x80, 0xFF)[at % 3]

        with pytest.raises(codec.CodecError):
            codec.decode(damaged)
        with pytest.raises(codec.CodecError):
            codec.verify(damaged)


def test_truncated_and_extended_payloads_raise(small):
    payload, _ = small

    for size in range(len(payload)):
        with pytest.raises(codec.CodecError):
            codec.decode(payload[:size])
    for more in (1, 2, 64):
        with pytest.raises(codec.CodecError, match="the chunk directory needs"):
            codec.decode(torch.cat([payload, payload[:more]]))


def test_flipped_byte_of_a_large_payload_raises(layer_codes):
    codes_AN, _ = layer_codes(600, 2000, 3)
    payload = codec.encode(codes_AN)

    for at in np.random.default_rng(0).integers(0, len(payload), 50):
        damaged = payload.clone()
        damaged[at] ^= 4
        with pytest.raises(codec.CodecError):
            codec.verify(damaged)


def test_decoding_rows_checks_only_their_chunks(layer_codes):
    codes_AN, _ = layer_codes(96, 2048, 3)
    payload = codec.encode(codes_AN)
    payload[-1] ^= 1

    assert torch.equal(codec.decode(payload, rows=slice(0, 64)), codes_AN[:64])
    with pytest.raises(codec.CodecError, match="chunk 2 has checksum"):
        codec.decode(payload, rows=slice(0, 65))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 2, "format version 2; this codec reads version 1"),
        ("rule", 7, r"rule 7; this codec knows the rules 1 \(scalar\) and 2 \(trellis\)"),
        ("rows", 2**32 - 1, "4294967295 x 90 classes in"),
        ("cols", 2**32 - 1, "100 x 4294967295 classes in"),
        ("rows", 101, "row classes: 100 of 101 elements"),
        ("rows_per_lane", 0, "0 steps per lane"),
        ("cols_per_chunk", 2**32 - 1, "steps per lane"),
        ("keys", 65535, "65535 keys"),
        ("first_shifted_key", 1000, "shifted from 1000"),
        ("row_centre", 60000, "row classes from 5"),
        ("col_parameter", 16, "Rice parameters"),
        ("escape_words", 3, "3 words per escaped value"),
        ("row_bytes", 2**32 - 1, "the classes alone end at byte"),
        ("col_bytes", 2**31, "the classes alone end at byte"),
    ],
)
def test_invalid_header_field_is_named_in_the_error(small, name, value, message):
    payload, _ = small

    with pytest.raises(codec.CodecError, match=message):
        codec.decode(with_field(payload, name, value))


def test_random_heads_with_valid_checksums_raise_only_codec_errors(small):
    payload, codes_AN = small
    words_start = codec.read_header(payload).words_start
    rng = np.random.default_rng(0)

    for _ in range(300):
        changed = bytearray(payload.numpy().tobytes())
        for at in rng.integers(0, words_start, rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        # what decodes has other bytes where they change nothing, or other classes by chance
        with contextlib.suppress(codec.CodecError):
            assert codec.decode(signed(changed, words_start)).shape == codes_AN.shape


def test_wrong_words_with_a_valid_checksum_raise(layer_codes):
    codes_AN, _ = layer_codes(100, 90, 3)
    payload = codec.encode(codes_AN)
    header = codec.read_header(payload)

    for at in range(header.words_start, len(payload), 97):
        changed = bytearray(payload.numpy().tobytes())
        changed[at] ^= 0x10
        checksum = zlib.crc32(changed[header.words_start :])
        struct.pack_into("<I", changed, header.directory_start + 4, checksum)

        with pytest.raises(codec.CodecError, match=r"chunk 0: .* words left"):
            codec.decode(signed(changed, header.words_start))


@pytest.mark.parametrize("shape", [(5000, 64), (700, 3000), (3, 2)])
def test_decode_rows_returns_single_rows(shape):
    g = torch.Generator().manual_seed(0)
    codes_AN = (4 * torch.randn(shape, generator=g)).round().int()
    codes_AN[-1, -1] = 70_000
    rows_U = torch.randperm(shape[0], generator=g)[:40].sort().values
    payload = codec.encode(codes_AN)

    assert torch.equal(codec.decode_rows(payload, rows_U), codes_AN[rows_U])
    assert codec.decode_rows(payload, rows_U[:0]).shape == (0, shape[1])
    with pytest.raises(IndexError, match=f"rows 0 to {shape[0]} were requested"):
        codec.decode_rows(payload, torch.tensor([0, shape[0]]))


def test_decode_rows_checks_only_the_chunks_of_the_rows():
    codes_AN = torch.ones(5000, 64, dtype=torch.int8)
    payload = codec.encode(codes_AN)
    payload[-1] ^= 1

    assert torch.equal(codec.decode_rows(payload, torch.tensor([7])), codes_AN[7:8].int())
    with pytest.raises(codec.CodecError, match="is damaged"):
        codec.decode_rows(payload, torch.tensor([7, 4999]))


def test_verify_checks_the_associated_bytes(small):
    payload, _ = small

    codec.verify(payload)
    codec.verify(payload, associated=b"scales")
    with pytest.raises(codec.CodecError, match="damaged or belong to other codes"):
        codec.verify(payload, associated=b"scalez")


def test_reassociate_changes_only_the_checksums(small):
    payload, codes_AN = small

    other = codec.reassociate(payload, b"scalez")

    codec.verify(other, associated=b"scalez")
    assert torch.equal(other, codec.encode(codes_AN, associated=b"scalez"))
    assert set((other != payload).nonzero().flatten().tolist()) <= set(range(44, 52))
    codec.verify(payload, associated=b"scales")


@pytest.mark.parametrize(
    "payload",
    [torch.zeros(3, 3, dtype=torch.uint8), torch.zeros(99), torch.zeros(99, dtype=torch.int8)],
)
def test_payload_that_is_not_1d_uint8_is_rejected(payload):
    for read in (codec.decode, codec.verify, codec.read_header):
        with pytest.raises(codec.CodecError, match="a payload is 1-D uint8"):
            read(payload)


def test_header_describes_the_encoded_codes(small):
    payload, codes_AN = small

    header = codec.read_header(payload)

    assert (header.version, header.rule) == (codec.FORMAT_VERSION, layout.RULE_SCALAR)
    assert (header.rows, header.cols) == tuple(codes_AN.shape)
    assert header.associated_checksum == zlib.crc32(b"scales")
    assert header.words_start % 4 == 0
