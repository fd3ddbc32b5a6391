import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from watersic_hf.codec import model

FORMAT = Path(model.__file__).with_name("FORMAT.md")


def test_every_symbol_of_a_support_has_non_zero_frequency():
    tables = model.library()

    for frequency_S, limit in zip(tables.frequency_TS, tables.limit_T.tolist(), strict=True):
        assert 1 <= limit <= model.LIMIT
        assert (frequency_S[model.symbols_in_order(limit)] > 0).all()
        assert np.count_nonzero(frequency_S) == 2 * limit + 2


def test_frequencies_sum_to_exactly_2_to_the_12():
    assert (model.library().frequency_TS.sum(1) == 2**12).all()


def test_no_symbol_has_probability_one():
    assert model.library().frequency_TS.max() < 2**12


def test_frequencies_have_the_checksum_in_format_md():
    frequency_TS = model.library().frequency_TS.astype("<u2")

    assert frequency_TS.shape == (480, 256)
    for half_TS in (frequency_TS[:240], frequency_TS[240:]):
        assert hashlib.sha256(half_TS.tobytes()).hexdigest() in FORMAT.read_text()


def test_power_approximates_a_power_of_two():
    for exponent in (0, 1, 5, 2**15, 2**15 + 1, 12345, 987654):
        exact = 2.0 ** (62 - exponent / 2**15)

        # float64 holds 53 of the 62 bits; the last step rounds down
        assert model.power(exponent) == pytest.approx(exact, rel=1e-14, abs=1)
    assert model.power(63 << 15) == 0


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_gaussian_costs_its_entropy_under_the_best_table(scale):
    edges = np.array([math.erf((v - 0.5) / scale / math.sqrt(2)) for v in range(-127, 129)])
    probability_S = np.zeros(256)
    probability_S[np.arange(-127, 128) & 0xFF] = np.diff(edges) / 2
    positive = probability_S[probability_S > 0]

    cost_T = probability_S @ (model.library().cost_ST / model.COST_UNIT)

    entropy = -(positive * np.log2(positive)).sum()
    # 12 bits of precision and eight scales an octave
    assert entropy <= cost_T.min() <= entropy + 0.006


def test_join_values_inverts_split_values():
    values = np.array([-1000, -17, -16, -1, 0, 1, 15, 16, 1000, 2**31 - 1, -(2**31)], np.int32)
    shift = np.full(len(values), 4, np.uint8)

    symbols, low = model.split_values(values, shift)

    inside = symbols != model.ESCAPE
    assert inside.tolist() == [True] * 9 + [False] * 2
    joined = model.join_values(
        symbols.view(np.int8).astype(np.int32), low.astype(np.int32), shift.astype(np.int32)
    )
    assert joined[inside].tolist() == values[inside].tolist()
