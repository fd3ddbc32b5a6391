import pytest
import torch

from watersic_hf import codec
from watersic_hf.nn import prefix, prefix_tables
from watersic_hf.nn.prefix import decode_bands, encode_codes
from watersic_hf.testing import trellis_values, uneven_codes


def restored(coded):
    """The codes of all tiles, in the order of the weight."""
    found_AN = torch.full((coded.rows, coded.columns), 0x7F7F7F7F, dtype=torch.int32)
    for rows, part_rN in decode_bands(coded):
        found_AN[rows] = part_rN
    return found_AN


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (127, 32), (3, 300), (300, 65), (64, 1100)])
@pytest.mark.parametrize("spread", [0.0, 2.0, 5.0])
def test_encode_decode_roundtrip(shape, spread):
    expected_AN = uneven_codes(*shape, spread=spread)

    assert torch.equal(restored(encode_codes(expected_AN)), expected_AN)


@pytest.mark.parametrize("limit", [1, 100, 1 << 15, 1 << 20])
def test_roundtrip_of_codes_that_fit_no_table(limit):
    generator = torch.Generator().manual_seed(0)
    expected_AN = torch.randint(-limit, limit, (70, 100), generator=generator).int()

    assert torch.equal(restored(encode_codes(expected_AN)), expected_AN)


def test_encoding_does_not_depend_on_the_chunk_size(monkeypatch):
    expected_AN = uneven_codes(500, 70)
    whole = encode_codes(expected_AN)
    monkeypatch.setattr(prefix, "CHUNK", 1)

    parts = encode_codes(expected_AN)

    for name, tensor in parts.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    assert torch.equal(restored(parts), expected_AN)


def test_zeros_take_no_bits():
    coded = encode_codes(torch.zeros(16, 96, dtype=torch.int8))

    assert coded.bits_BSr.sum() == 0
    assert coded.tiles_BT.tolist() == [[0, 0, 0]]


def test_empty_matrix_is_refused():
    with pytest.raises(ValueError, match="0 x 4"):
        encode_codes(torch.zeros(0, 4, dtype=torch.int8))


def test_layer_of_real_size_takes_at_most_an_eighth_bit_more_than_on_disk():
    # as in a layer of 3 bits: rows and columns differ in scale
    generator = torch.Generator().manual_seed(0)
    scale_A = torch.exp2(0.25 * torch.randn(2048, 1, generator=generator))
    scale_N = torch.exp2(0.5 * torch.randn(1024, generator=generator) + 0.8)
    codes_AN = (torch.randn(2048, 1024, generator=generator) * scale_A * scale_N).round().int()

    held = encode_codes(codes_AN).nbytes

    assert 8 * (held - len(codec.encode(codes_AN))) / codes_AN.numel() < 0.125


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0, 2.8])
def test_cost_of_normal_values_is_close_to_their_entropy(deviation):
    tables = prefix_tables.prefix_tables(torch.device("cpu"))
    values = torch.arange(-15.0, 16)
    normal = torch.distributions.Normal(0.0, deviation)
    chance = normal.cdf(values + 0.5) - normal.cdf(values - 0.5)
    entropy = -(chance * chance.clamp(min=1e-30).log2()).sum()

    cost = (chance @ tables.price_VT[:31]).min()

    # length-limited Huffman, and pairs that are outliers
    assert entropy < cost < entropy + 0.06


def test_every_entry_of_a_table_is_a_pair_and_its_length():
    tables = prefix_tables.prefix_tables(torch.device("cpu"))
    window = prefix_tables.WINDOW

    assert tables.entries_TW.data_ptr() % prefix_tables.ALIGNMENT == 0
    for table in (1, 20, 75):
        entries_W = tables.entries_TW[table].long() & 0xFFFFFFFF
        length_W = entries_W & 15
        first_W = ((entries_W >> 16) << 16).int().view(torch.float32)
        second_W = ((entries_W & 0xFFF0) << 16).int().view(torch.float32)
        assert int(length_W.min()) >= 1
        assert int(length_W.max()) <= window
        index = (first_W.long() + 15, second_W.long() + 15)
        assert torch.equal(tables.lengths_TVV[table][index].long(), length_W)
        word_W = torch.arange(1 << window) & ((1 << length_W) - 1)
        assert torch.equal(tables.words_TVV[table][index].long(), word_W)


def test_limited_lengths_equal_huffman_lengths_if_the_limit_permits():
    weights = torch.tensor([8.0, 4, 2, 1, 1])

    assert prefix_tables.limited_lengths(weights, 11).tolist() == [1, 2, 3, 4, 4]
    # three bits for five symbols: 1/2 + 4 * 1/8, or 1/4 + 2 * 1/8 + ...
    limited = prefix_tables.limited_lengths(weights, 3)
    assert limited.max() == 3
    assert (0.5**limited).sum() == 1


@pytest.mark.parametrize(
    ("shape", "path_rows"),
    [((1, 1), 1), ((5, 31), 5), ((127, 32), 127), ((300, 65), 300), ((700, 90), 128)],
)
@pytest.mark.parametrize("spread", [0.0, 2.0, 5.0])
def test_roundtrip_of_a_trellis(shape, path_rows, spread):
    values_AN, path = trellis_values(*shape, path_rows=path_rows, spread=spread)

    coded = encode_codes(values_AN, path)

    assert coded.trellis
    assert torch.equal(restored(coded), values_AN)


def test_codes_of_a_trellis_take_a_bit_less_than_its_values():
    values_AN, path = trellis_values(512, 512, path_rows=512, spread=0.5)

    codes, values = encode_codes(values_AN, path), encode_codes(values_AN)

    assert codes.nbytes < values.nbytes - 0.6 / 8 * values_AN.numel()
