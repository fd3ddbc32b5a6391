import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.codec.trellis import quantizers, value_of
from watersic_hf.nn.decoding import decode_with
from watersic_kernels.rans import decode_chunks

# they also run on a CPU, in Triton's interpreter
pytestmark = pytest.mark.gpu
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


def trellis(rows, columns, path_rows, **options):
    """Random values on paths of a trellis, and the path, with several classes of rows."""
    generator = torch.Generator().manual_seed(0)
    path = codec.Path(torch.randint(0, 5, (rows,), generator=generator), path_rows)
    codes_AN = codes(rows, columns, **options).numpy()
    values_AN = torch.empty(rows, columns, dtype=torch.int32)
    in_order_AN = value_of(codes_AN, quantizers(codes_AN, path_rows).astype(np.int32))
    values_AN[path.row_class_A.argsort(stable=True)] = torch.from_numpy(in_order_AN)
    return values_AN, path


def run(payload, damage=None):
    """Decode between guards: the codes, and which chunks are good; `damage` changes the words."""
    header, (words, offsets_C, *model), order_A = codec.take_apart(payload)
    if damage is not None:
        words = words.clone()
        damage(words.numpy())
    # words outside are poison: a chunk that reads them does not end in the right state
    words_W = torch.full((len(words) + 2 * GUARD,), 0x7F7F, dtype=torch.int16, device=DEVICE)
    words_W[GUARD:-GUARD] = words
    size = header.rows * header.cols
    around = torch.full((size + 2 * GUARD,), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE)
    codes_AN = around[GUARD:-GUARD].view(header.rows, header.cols)
    good_C = decode_chunks(
        [words_W, offsets_C.to(DEVICE) + GUARD, *(tensor.to(DEVICE) for tensor in model)],
        codes_AN if order_A is None else codes_AN.T,
        rows_per_lane=header.rows_per_lane,
        cols_per_chunk=header.cols_per_chunk,
        escape_words=header.escape_words,
        order_N=None if order_A is None else order_A.to(DEVICE),
    )
    for guard in (around[:GUARD], around[-GUARD:]):
        assert bool((guard == 0x7F7F7F7F).all())
    return codes_AN.cpu(), good_C.cpu()


def damage_words(seed):
    """Return a function that changes a few words."""
    rng = np.random.default_rng(seed)

    def damage(words):
        at = rng.integers(len(words), size=rng.integers(1, 8))
        words[at] ^= rng.integers(1, 1 << 15, size=len(at)).astype(np.int16)

    return damage


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

    found_AN, good_C = run(codec.encode(expected_AN), damage_words(seed))

    assert not bool(good_C.all()) or not torch.equal(found_AN, expected_AN)


@pytest.fixture
def short_lanes(monkeypatch):
    """Lanes of about 32 steps, so that small matrices have several lanes, phases and bands."""
    monkeypatch.setattr("watersic_hf.codec.layout.STEPS_SMALL", 32)


#: Rows, columns, and rows of a path.
TRELLISES = [(1, 1, 4), (1, 40, 4), (40, 1, 16), (7, 3, 16), (16, 33, 16), (20, 70, 16)]


@pytest.mark.usefixtures("short_lanes")
@pytest.mark.parametrize("shape", TRELLISES)
@pytest.mark.parametrize("huge", [0, 500, 100_000])
def test_trellis_roundtrip(shape, huge):
    expected_AN, path = trellis(*shape, huge=huge)
    payload = codec.encode(expected_AN, path=path)

    found_AN, good_C = run(payload)

    assert torch.equal(found_AN, expected_AN)
    assert torch.equal(found_AN, codec.decode(payload))
    assert bool(good_C.all())


@pytest.mark.usefixtures("short_lanes")
def test_trellis_roundtrip_with_low_bits_and_escapes_of_two_words():
    expected_AN, path = trellis(20, 34, 8, spread=3.0, huge=2**27)
    payload = codec.encode(expected_AN, path=path)
    parts = codec.take_apart(payload)
    assert parts.tensors[-1].max() > 0
    assert parts.header.escape_words == 2

    found_AN, good_C = run(payload)

    assert torch.equal(found_AN, expected_AN)
    assert bool(good_C.all())


@pytest.mark.usefixtures("short_lanes")
@pytest.mark.parametrize("seed", range(5))
def test_damaged_chunk_of_a_trellis_is_detected_and_writes_only_its_values(seed):
    expected_AN, path = trellis(20, 34, 8, huge=500)

    found_AN, good_C = run(codec.encode(expected_AN, path=path), damage_words(seed))

    assert not bool(good_C.all()) or not torch.equal(found_AN, expected_AN)


@pytest.mark.usefixtures("short_lanes")
@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (20, 34, 8)])
def test_operator_returns_the_values_in_the_order_of_the_weight(shape):
    expected_AN, path = trellis(*shape)
    payload = codec.encode(expected_AN, path=path)

    found_AN = decode_with(decode_chunks, payload, torch.device(DEVICE))

    assert torch.equal(found_AN.cpu(), expected_AN)


def test_operator_reports_the_damaged_chunk(monkeypatch):
    expected_AN, path = trellis(20, 5, 8)
    payload = codec.encode(expected_AN, path=path)
    # a bit of the start state in the last of three chunks, which checksums would have found
    start = codec.read_header(payload).words_start
    parts = codec.take_apart(payload)
    payload[start + 2 * int(parts.tensors[1][2])] ^= 1
    monkeypatch.setattr(codec.EncodedCodes, "check_chunks", lambda *_: None)

    with pytest.raises(codec.CodecError, match="chunk 2 is damaged"):
        decode_with(decode_chunks, payload, torch.device(DEVICE))
