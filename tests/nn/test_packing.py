import pytest
import torch

from watersic_hf.nn.packing import MAX_WIDTH, TILE, pack_codes, unpack_bands, unpack_rows
from watersic_hf.testing import trellis_values, uneven_codes


def restored(packed):
    """The codes of all tiles, in the order of the weight."""
    found_AN = torch.full((packed.rows, packed.columns), 0x7F7F7F7F, dtype=torch.int32)
    for rows, part_rN in unpack_bands(packed):
        found_AN[rows] = part_rN
    return found_AN


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (127, 32), (3, 300), (300, 65), (256, 128)])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_pack_unpack_roundtrip(shape, spread):
    expected_AN = uneven_codes(*shape, spread=spread)

    packed = pack_codes(expected_AN)

    assert torch.equal(restored(packed), expected_AN)
    assert packed.tiles_BT.shape[1] == -(-shape[1] // TILE)
    assert packed.outlier_count_BKr.sum() == len(packed.outliers_O)


@pytest.mark.parametrize("shape", [(1, 1), (127, 32), (300, 65)])
def test_unpack_rows_in_any_order_with_repetitions(shape):
    expected_AN = uneven_codes(*shape)
    index_U = torch.randint(shape[0], (50,), generator=torch.Generator().manual_seed(1))

    assert torch.equal(unpack_rows(pack_codes(expected_AN), index_U), expected_AN[index_U])


def test_width_of_a_tile_is_the_smallest_that_holds_its_codes():
    for width in range(1, MAX_WIDTH + 1):
        half = 1 << (width - 1)
        span = torch.arange(-half, half, dtype=torch.int16)
        span_AN = span.repeat(64 * TILE // len(span)).view(64, TILE)

        packed = pack_codes(span_AN)

        assert packed.tiles_BT.tolist() == [[width]]
        assert len(packed.outliers_O) == 0
        assert torch.equal(restored(packed), span_AN.int())


def test_zeros_take_no_words():
    packed = pack_codes(torch.zeros(16, 96, dtype=torch.int8))

    assert packed.words_G.numel() == 0
    assert packed.tiles_BT.tolist() == [[0, 0, 0]]


def test_scales_of_rows_and_columns_cost_at_most_a_quarter_bit():
    generator = torch.Generator().manual_seed(0)
    normal_AN = torch.randn(1024, 512, generator=generator)
    scale_A = torch.exp2(torch.rand(1024, 1, generator=generator) * 2 - 1)
    scale_N = torch.exp2(torch.rand(512, generator=generator) * 2 - 1)

    def bits(codes_AN):
        return 8 * pack_codes(codes_AN.round().int()).nbytes / codes_AN.numel()

    # the mean width of equal scales from an octave below to an octave above
    equal = sum(bits(normal_AN * 2 ** (octave / 4)) for octave in range(0, 9)) / 9
    assert bits(2 * normal_AN * scale_A * scale_N) < equal + 0.25


def test_large_outliers_take_several_entries():
    codes_AN = torch.zeros(2, 2000, dtype=torch.int32)
    codes_AN[0, 5], codes_AN[1, 1999], codes_AN[1, 1998] = 200_000, -1_000_000, 130

    packed = pack_codes(codes_AN)

    assert torch.equal(restored(packed), codes_AN)


def test_empty_matrix_is_refused():
    with pytest.raises(ValueError, match="0 x 4"):
        pack_codes(torch.zeros(0, 4, dtype=torch.int8))


@pytest.mark.parametrize(
    ("shape", "path_rows"),
    [
        ((1, 1), 1),
        ((5, 31), 5),
        ((127, 32), 127),
        ((3, 300), 3),
        ((300, 65), 300),
        ((700, 90), 128),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_roundtrip_of_a_trellis(shape, path_rows, spread):
    values_AN, path = trellis_values(*shape, path_rows=path_rows, spread=spread)

    packed = pack_codes(values_AN, path)

    assert packed.trellis
    assert torch.equal(restored(packed), values_AN)
    index_U = torch.randint(shape[0], (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_rows(packed, index_U), values_AN[index_U])


def test_codes_of_a_trellis_take_a_bit_less_than_its_values():
    values_AN, path = trellis_values(512, 512, path_rows=512, spread=0.5)

    codes, values = pack_codes(values_AN, path), pack_codes(values_AN)

    assert codes.nbytes < values.nbytes - 0.7 / 8 * values_AN.numel()


def test_values_on_paths_that_begin_within_a_band_are_held_as_values():
    values_AN, path = trellis_values(300, 40, path_rows=100)

    packed = pack_codes(values_AN, path)

    assert not packed.trellis
    assert torch.equal(restored(packed), values_AN)
