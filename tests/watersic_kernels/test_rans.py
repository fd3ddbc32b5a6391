import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_kernels.rans import decode_chunks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64


def codes(rows, columns, *, spread=1.0, huge=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale_A = torch.exp2(spread * torch.randn(rows, 1, generator=generator))
    scale_N = torch.exp2(spread * torch.randn(columns, generator=generator))
    found_AN = (2 * scale_A * scale_N * torch.randn(rows, columns, generator=generator)).round()
    if huge:
        where = torch.randint(rows * columns, (rows * columns // 50 + 1,), generator=generator)
        found_AN.view(-1)[where] = huge * torch.randn(len(where), generator=generator).round()
    return found_AN.int()


def run(payload, damage=None):
    """Decode between guards: the codes, and which chunks are good; `damage` changes the words."""
    header, (words, offsets_C, *model) = codec.take_apart(payload)
    if damage is not None:
        words = words.clone()
        damage(words.numpy())
    # words outside are poison: a chunk that reads them does not end in the right state
    words_W = torch.full((len(words) + 2 * GUARD,), 0x7F7F, dtype=torch.int16, device=DEVICE)
    words_W[GUARD:-GUARD] = words
    size = header.rows * header.cols
    around = torch.full((size + 2 * GUARD,), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE)
    good_C = decode_chunks(
        [words_W, offsets_C.to(DEVICE) + GUARD, *(tensor.to(DEVICE) for tensor in model)],
        around[GUARD:-GUARD].view(header.rows, header.cols),
        rows_per_lane=header.rows_per_lane,
        cols_per_chunk=header.cols_per_chunk,
        escape_words=header.escape_words,
    )
    for guard in (around[:GUARD], around[-GUARD:]):
        assert bool((guard == 0x7F7F7F7F).all())
    return around[GUARD:-GUARD].view(header.rows, header.cols).cpu(), good_C.cpu()


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (33, 7), (100, 3)])
@pytest.mark.parametrize("huge", [0, 500, 100_000])
def test_encode_decode_roundtrip(shape, huge):
    expected_AN = codes(*shape, huge=huge)

    found_AN, good_C = run(codec.encode(expected_AN))

    assert torch.equal(found_AN, expected_AN)
    assert bool(good_C.all())


def test_roundtrip_of_codes_with_low_bits():
    expected_AN = codes(40, 12, spread=3.0)
    payload = codec.encode(expected_AN)
    assert codec.take_apart(payload).tensors[-1].max() > 0

    found_AN, good_C = run(payload)

    assert torch.equal(found_AN, expected_AN)
    assert bool(good_C.all())


@pytest.mark.parametrize("seed", range(10))
def test_damaged_chunk_is_detected_and_writes_only_its_codes(seed):
    expected_AN = codes(20, 8, huge=500, seed=1)
    rng = np.random.default_rng(seed)

    def damage(words):
        at = rng.integers(len(words), size=rng.integers(1, 8))
        words[at] ^= rng.integers(1, 1 << 15, size=len(at)).astype(np.int16)

    found_AN, good_C = run(codec.encode(expected_AN), damage)

    assert not bool(good_C.all()) or not torch.equal(found_AN, expected_AN)
