import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec import coder
from watersic_hf.codec.layout import Geometry

pytestmark = pytest.mark.usefixtures("implementation")

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SHAPES = [(1, 1), (1, 3000), (3000, 1), (5, 127), (300, 1000), (33, 64), (127, 5), (65, 4099)]


def heavy_tails(rows, cols):
    codes = torch.from_numpy(np.random.default_rng(0).standard_cauchy((rows, cols)) * 3)
    return codes.clamp(INT_MIN, INT_MAX - 1).to(torch.int32)


def zero_lines(rows, cols):
    codes = heavy_tails(rows, cols)
    codes[::3] = 0
    codes[:, ::2] = 0
    return codes


def random_bits(rows, cols):
    codes = np.random.default_rng(0).integers(INT_MIN, INT_MAX, (rows, cols), endpoint=True)
    codes[0, 0], codes[-1, -1] = INT_MIN, INT_MAX
    return torch.from_numpy(codes).to(torch.int32)


def one_large_column(rows, cols):
    codes = heavy_tails(rows, cols).clamp(-3, 3)
    codes[:, cols // 2] = torch.arange(rows) * 7001 - 1_000_000
    return codes.to(torch.int32)


def alternating_extremes(rows, cols):
    sign = 1 - 2 * (torch.arange(rows)[:, None] + torch.arange(cols)).remainder(2)
    return (sign * torch.arange(rows * cols).reshape(rows, cols).remainder(300)).to(torch.int32)


KINDS = {
    "zeros": lambda rows, cols: torch.zeros(rows, cols, dtype=torch.int32),
    "constant": lambda rows, cols: torch.full((rows, cols), -37, dtype=torch.int32),
    "two symbols": lambda rows, cols: (
        torch.arange(rows * cols).reshape(rows, cols) % 7 == 0
    ).int(),
    "largest": lambda rows, cols: torch.full((rows, cols), INT_MAX, dtype=torch.int32),
    "smallest": lambda rows, cols: torch.full((rows, cols), INT_MIN, dtype=torch.int32),
    "heavy tails": heavy_tails,
    "zero lines": zero_lines,
    "random bits": random_bits,
    "one large column": one_large_column,
    "alternating extremes": alternating_extremes,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_inverts_encode(kind, shape):
    codes_AN = KINDS[kind](*shape)

    payload = codec.encode(codes_AN)
    decoded_AN = codec.decode(payload)

    assert payload.dtype == torch.uint8
    assert payload.ndim == 1
    assert decoded_AN.dtype == torch.int32
    assert torch.equal(decoded_AN, codes_AN)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices_keep_their_shape(shape):
    payload = codec.encode(torch.zeros(shape, dtype=torch.int32))

    assert codec.decode(payload).shape == shape
    assert codec.decode(payload, rows=slice(0, 3)).shape == (min(3, shape[0]), shape[1])
    codec.verify(payload, associated=b"")


@pytest.mark.parametrize("bits", [0.5, 3, 8, 14])
@pytest.mark.parametrize("geometry", [(1, 50), (3, 1000), (7, 333), (40, 100), (1, 1000)])
def test_decode_inverts_encode_for_any_geometry(layer_codes, monkeypatch, bits, geometry):
    codes_AN, _ = layer_codes(300, 1000, bits)
    monkeypatch.setattr(
        coder, "choose_geometry", lambda rows, cols: Geometry(rows, cols, *geometry)
    )

    payload = codec.encode(codes_AN)

    header = codec.read_header(payload)
    assert (header.rows_per_lane, header.cols_per_chunk) == geometry
    assert torch.equal(codec.decode(payload), codes_AN)


def test_decoding_a_slice_equals_slicing_the_codes(layer_codes, monkeypatch):
    codes_AN, _ = layer_codes(300, 200, 3)
    codes_AN[::7, 3] = 10**6
    monkeypatch.setattr(coder, "choose_geometry", lambda rows, cols: Geometry(rows, cols, 2, 90))
    payload = codec.encode(codes_AN)

    for start, stop in [
        (0, 1),
        (0, 64),
        (63, 65),
        (64, 128),
        (290, 300),
        (5, 5),
        (200, 900),
        (9, 3),
    ]:
        part_AN = codec.decode(payload, rows=slice(start, stop))

        assert torch.equal(part_AN, codes_AN[start : max(start, stop)])
    assert torch.equal(codec.decode(payload, rows=slice(-10, None)), codes_AN[-10:])
    with pytest.raises(ValueError, match="step 2"):
        codec.decode(payload, rows=slice(0, 10, 2))


def test_group_size_does_not_change_the_payload(layer_codes, monkeypatch):
    codes_AN, _ = layer_codes(700, 90, 3)
    payload = codec.encode(codes_AN)
    monkeypatch.setattr("watersic_hf.codec.layout.GROUP_LANES", 32)

    assert torch.equal(codec.encode(codes_AN), payload)
    assert torch.equal(codec.decode(payload), codes_AN)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_every_integer_dtype_gives_the_same_payload(dtype):
    codes_AN = torch.arange(600).reshape(20, 30) % 120

    assert torch.equal(codec.encode(codes_AN.to(dtype)), codec.encode(codes_AN))


def test_strided_codes_and_unaligned_payloads_are_supported(layer_codes):
    codes_AN, _ = layer_codes(90, 64, 3)
    payload = codec.encode(codes_AN)

    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), payload])[1:]

    assert torch.equal(codec.encode(codes_AN.T.contiguous().T), payload)
    assert torch.equal(codec.decode(odd), codes_AN)


def test_number_of_threads_does_not_change_the_payload(layer_codes):
    codes_AN, _ = layer_codes(1100, 1000, 3, nu=5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = codec.encode(codes_AN)
        torch.set_num_threads(2)
        assert torch.equal(codec.encode(codes_AN), alone)
    finally:
        torch.set_num_threads(before)


def test_codes_that_are_not_32_bit_integers_are_rejected():
    with pytest.raises(codec.CodecError, match="matrix of integers"):
        codec.encode(torch.zeros(3, 3))
    with pytest.raises(codec.CodecError, match="matrix of integers"):
        codec.encode(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(codec.CodecError, match="found values from 0 to 2147483648"):
        codec.encode(torch.tensor([[0, 2**31]]))
