import numpy as np
import pytest

from watersic_hf.codec import rice


@pytest.mark.parametrize("parameter", [0, 1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 127])
def test_unpack_inverts_pack(parameter, count):
    values = np.random.default_rng(0).geometric(0.2, count) - 1

    code = np.frombuffer(rice.pack(values, parameter), np.uint8)

    assert len(code) == -(-rice.code_bits(values, parameter) // 8)
    assert rice.unpack(code, count, parameter).tolist() == values.tolist()


def test_zigzag_is_invertible_and_not_negative():
    values = np.arange(-300, 300)

    folded = rice.zigzag(values)

    assert sorted(folded.tolist()) == list(range(600))
    assert rice.unzigzag(folded).tolist() == values.tolist()


def test_best_parameter_gives_the_shortest_code():
    values = np.random.default_rng(0).geometric(0.1, 1000) - 1

    bits = [rice.code_bits(values, parameter) for parameter in range(rice.MAX_PARAMETER + 1)]

    assert rice.code_bits(values, rice.best_parameter(values)) == min(bits)


@pytest.mark.parametrize("code", [b"", b"\x00", b"\xff", b"\x07\x00"])
def test_code_of_another_length_is_rejected(code):
    with pytest.raises(ValueError, match="of 3 elements"):
        rice.unpack(np.frombuffer(code, np.uint8), 3, 0)
