import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec.trellis import codes_of, quantizers, row_order, value_of

pytestmark = pytest.mark.usefixtures("implementation")

INT_MAX = 2**30


def on_path(codes_AN, row_class_A, path_rows):
    """Return the values of a trellis with these codes, and their path."""
    order_A = row_order(row_class_A.numpy())
    codes_AN = codes_AN.numpy()[order_A]
    values_AN = np.empty_like(codes_AN)
    values_AN[order_A] = value_of(codes_AN, quantizers(codes_AN, path_rows))
    return torch.from_numpy(values_AN), codec.Path(row_class_A, path_rows)


def layer(rows, cols, *, path_rows, kind="normal"):
    rng = np.random.default_rng(rows + cols)
    row_class_A = torch.from_numpy(rng.integers(0, 30, rows))
    scale_AN = 2.0 ** (row_class_A.numpy()[:, None] / 8 + rng.normal(0, 1, cols) - 2)
    codes_AN = np.rint(scale_AN * rng.standard_normal((rows, cols)))
    if kind == "tails":
        codes_AN = np.clip(codes_AN * rng.standard_cauchy((rows, cols)), -INT_MAX, INT_MAX)
    elif kind == "zero lines":
        codes_AN[::3], codes_AN[:, ::2] = 0, 0
    elif kind == "low bits":
        codes_AN *= 2.0 ** rng.integers(0, 15, cols)
    elif kind == "extreme":
        codes_AN = rng.integers(-INT_MAX, INT_MAX, (rows, cols))
    return on_path(torch.from_numpy(codes_AN.astype(np.int32)), row_class_A, path_rows)


def test_quantizers_follow_the_recurrence():
    codes_AN = np.random.default_rng(0).integers(-9, 10, (50, 3)).astype(np.int32)

    found_AN = quantizers(codes_AN, path_rows=20)

    for start in range(0, 50, 20):
        for column in range(3):
            history = [0, 0, 0]
            for row in range(start, min(start + 20, 50)):
                if row > start:
                    parity = int(codes_AN[row - 1, column]) % 2
                    history.append((history[-2] + history[-3] + parity) % 2)
                assert found_AN[row, column] == history[-1]


def test_quantizers_are_linear_in_the_parities():
    rng = np.random.default_rng(1)
    one_AN, other_AN = rng.integers(0, 2, (2, 40, 64)).astype(np.int32)

    sum_AN = quantizers(one_AN ^ other_AN, 40)

    assert np.array_equal(sum_AN, quantizers(one_AN, 40) ^ quantizers(other_AN, 40))


def test_codes_of_inverts_value_of():
    codes_AN = np.random.default_rng(2).integers(-40, 41, (70, 30)).astype(np.int32)
    quantizer_AN = quantizers(codes_AN, 32)

    found_AN, found_quantizer_AN = codes_of(value_of(codes_AN, quantizer_AN), 32)

    assert np.array_equal(found_AN, codes_AN)
    assert np.array_equal(found_quantizer_AN, quantizer_AN)


@pytest.mark.parametrize("kind", ["normal", "tails", "zero lines", "low bits", "extreme"])
@pytest.mark.parametrize(
    ("rows", "cols", "path_rows"),
    [(1, 1, 7), (5, 127, 3), (300, 90, 64), (33, 600, 33), (700, 41, 1024), (200, 300, 1)],
)
def test_decode_inverts_encode(rows, cols, path_rows, kind):
    values_AN, path = layer(rows, cols, path_rows=path_rows, kind=kind)

    payload = codec.encode(values_AN, path=path, associated=b"scales")

    codec.verify(payload, associated=b"scales")
    assert codec.read_header(payload).rule == 2
    assert (codec.read_header(payload).rows, codec.read_header(payload).cols) == (rows, cols)
    assert torch.equal(codec.decode(payload), values_AN)
    found = codec.read_path(payload)
    assert torch.equal(found.row_class_A, path.row_class_A)
    assert found.rows == min(path_rows, rows)
    for start, stop in [(0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows + 5), (2, 1)]:
        part_AN = codec.decode(payload, rows=slice(start, stop))
        assert torch.equal(part_AN, values_AN[start : max(start, stop)])
    rows_U = torch.arange(0, rows, 7)
    assert torch.equal(codec.decode_rows(payload, rows_U), values_AN[rows_U])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices_keep_their_shape(shape):
    path = codec.Path(torch.zeros(shape[0], dtype=torch.int64), 64)

    payload = codec.encode(torch.zeros(shape, dtype=torch.int32), path=path)

    assert codec.decode(payload).shape == shape


@pytest.mark.parametrize("rows", [192, 576, 2048])
def test_payload_bits_predicts_the_size_from_all_rows_and_from_a_sample(rows):
    values_AN, path = layer(rows, 576, path_rows=1024)
    size = 8 * len(codec.encode(values_AN, path=path))

    assert abs(codec.payload_bits(values_AN, path=path) - size) < 0.004 * size
    sample = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: rows // 2].sort()[0]
    part, part_path = on_path(
        torch.from_numpy(codes_of_rows(values_AN, path)[sample]), path.row_class_A[sample], 1024
    )
    estimate = codec.payload_bits(part, rows=rows, path=part_path)
    assert abs(estimate - size) < 0.02 * size


def codes_of_rows(values_AN, path):
    order_A = row_order(path.row_class_A.numpy())
    codes_AN = np.empty_like(values_AN.numpy())
    codes_AN[order_A], _ = codes_of(values_AN.numpy()[order_A], path.rows)
    return codes_AN


def test_group_size_does_not_change_the_payload(monkeypatch):
    values_AN, path = layer(300, 700, path_rows=64)
    payload = codec.encode(values_AN, path=path)
    monkeypatch.setattr("watersic_hf.codec.layout.GROUP_LANES", 32)

    assert torch.equal(codec.encode(values_AN, path=path), payload)
    assert torch.equal(codec.decode(payload), values_AN)


def test_values_on_no_path_are_refused():
    values_AN, path = layer(60, 20, path_rows=32)
    # the first row of a path has even values only
    values_AN[row_order(path.row_class_A.numpy())[0], 3] = 1

    with pytest.raises(codec.CodecError, match=r"on no path .* in place 0 .* column 3"):
        codec.encode(values_AN, path=path)
    with pytest.raises(codec.CodecError, match=r"59 row classes from 0 to .* 60 rows"):
        codec.encode(values_AN, path=codec.Path(path.row_class_A[1:], 32))
    with pytest.raises(codec.CodecError, match="a class from 0 to 96"):
        codec.encode(values_AN, path=codec.Path(path.row_class_A - 100, 32))


@pytest.fixture
def small():
    values_AN, path = layer(40, 12, path_rows=32, kind="tails")
    payload = codec.encode(values_AN, path=path)
    assert codec.code_statistics(values_AN, path=path).escapes > 1
    assert codec.EncodedCodes.parse(payload.numpy()).model.shift_K.any()
    return payload, values_AN


def test_every_flipped_byte_raises(small):
    payload, _ = small

    for at in range(0, len(payload), 2):
        damaged = payload.clone()
        damaged[at] ^= (0x01, 0x80, 0xFF)[at % 3]
        with pytest.raises(codec.CodecError):
            codec.decode(damaged)


def test_random_bytes_with_valid_checksums_raise_only_codec_errors(small):
    payload, values_AN = small
    header = codec.read_header(payload)
    directory = np.frombuffer(
        payload.numpy()[header.directory_start : header.words_start].tobytes(), "<u4"
    ).reshape(-1, 2)
    rng = np.random.default_rng(0)

    for trial in range(100):
        changed = bytearray(payload.numpy().tobytes())
        low, high = (0, header.words_start) if trial % 2 else (header.words_start, len(changed))
        for at in rng.integers(low, high, rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        at = header.words_start
        for chunk, (length, _) in enumerate(directory):
            checksum = zlib.crc32(changed[at : at + 2 * length])
            struct.pack_into("<I", changed, header.directory_start + 8 * chunk + 4, checksum)
            at += 2 * int(length)
        checksum = zlib.crc32(changed[52 : header.words_start], zlib.crc32(changed[:48]))
        struct.pack_into("<I", changed, 48, checksum)
        with contextlib.suppress(codec.CodecError):
            assert codec.decode(torch.frombuffer(changed, dtype=torch.uint8)).ndim == 2
    assert torch.equal(codec.decode(payload), values_AN)


def test_tables_chosen_by_the_quantizer_are_worth_their_bytes():
    # codes of a normal column by its quantizer: the levels of quantizer 1 are nearer to zero
    generator = np.random.default_rng(0)
    values_AN = np.empty((512, 64), np.int32)
    history = np.zeros((3, 64), int)
    for row in range(512):
        y_N = 2.0 * generator.standard_normal(64)
        size_N = np.where(history[0] == 0, np.rint(abs(y_N) / 2), np.rint((abs(y_N) + 1) / 2))
        codes_N = (np.sign(y_N) * np.where((history[0] == 1) & (abs(y_N) < 0.5), 0, size_N)).astype(
            np.int32
        )
        values_AN[row] = value_of(codes_N, history[0].astype(np.int32))
        history = np.stack([history[1] ^ history[2] ^ (codes_N & 1), history[0], history[1]])
    path = codec.Path(torch.zeros(512, dtype=torch.int64), 512)

    statistics = codec.code_statistics(torch.from_numpy(values_AN), path=path)

    assert statistics.class_entropy < statistics.pooled_entropy - 0.05
