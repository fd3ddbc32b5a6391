import itertools
import math

import numpy as np
import pytest
import torch

from watersic_hf import codec
from watersic_hf.checkpoint import layer_charge
from watersic_hf.codec.trellis import codes_of
from watersic_hf.core import LayerSettings, Moments, quantize_tall, quantize_weight
from watersic_hf.core import tall as tall_module
from watersic_hf.core.trellis import (
    FIRST_LEVEL,
    LARGEST_COST,
    PER_OCTAVE,
    PRICE,
    Path,
    Trellis,
    code_costs,
    row_path,
    row_power,
)
from watersic_hf.core.zsic import zsic
from watersic_hf.nn import path_search
from watersic_hf.testing import random_layer

pytest.importorskip("numba")
TRELLIS = LayerSettings(lattice="trellis")


@pytest.fixture(scope="module")
def search():
    return path_search(torch.device("cpu"))


def layer(rows, cols, seed=0):
    weight_AN, cov_NN = random_layer(rows, cols, seed=seed)
    return weight_AN, Moments(cov=cov_NN, tokens=100_000)


def entropy(symbols):
    _, count = np.unique(symbols, return_counts=True)
    probability = count / count.sum()
    return -(probability * np.log2(probability)).sum()


@pytest.mark.parametrize("rate", [3, 4, 6])
def test_distance_to_the_bound_is_that_of_the_literature(search, rate):
    # entropy-coded trellis quantization with 8 states lies 0.5 dB above the distortion-rate
    # function (Fischer and Wang, 1992), which is 0.083 bit; a scalar lattice is 0.255 bit away
    scale = 0.5 * 2.0**rate
    y_A = scale * torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    level_A = torch.full((len(y_A),), round(PER_OCTAVE * (math.log2(scale) - FIRST_LEVEL)))

    values_A = search(y_A, level_A, code_costs(), 1024)

    codes, quantizer = codes_of(values_A.numpy()[:, None], 1024)
    spent = sum((quantizer == q).mean() * entropy(codes[quantizer == q]) for q in (0, 1))
    gain = (values_A * y_A).sum() / values_A.double().square().sum()
    distortion = (y_A - gain * values_A).square().mean()
    bound = 0.5 * math.log2(float(y_A.square().mean() / distortion))
    assert abs(spent - bound - 0.083) < 0.02


def test_search_finds_the_cheapest_of_all_paths(search):
    y_A = 1.5 * torch.randn(6, generator=torch.Generator().manual_seed(1)).double()
    free = torch.zeros(1, 2, 40, dtype=torch.float64)
    least = math.inf
    for codes in itertools.product(range(-3, 4), repeat=6):
        values, this, last, earlier = [], 0, 0, 0
        for code in codes:
            values.append(2 * code - this * ((code > 0) - (code < 0)))
            this, last, earlier = (last + earlier + code) % 2, this, last
        least = min(least, float((torch.tensor(values) - y_A).square().sum()))

    values_A = search(y_A, torch.zeros(6, dtype=torch.int64), free, 100)

    assert float((values_A - y_A).square().sum()) == pytest.approx(least)


def test_values_are_on_paths_that_start_anew(search):
    generator = torch.Generator().manual_seed(2)
    y_A = 3 * torch.randn(1000, generator=generator).double()
    level_A = torch.randint(-5, 70, (1000,), generator=generator)

    values_A = search(y_A, level_A, code_costs(), 64)

    codes_of(values_A.numpy()[:, None], 64)
    alone_A = search(y_A[64:128], level_A[64:128], code_costs(), 64)
    assert torch.equal(values_A[64:128], alone_A)
    assert torch.equal(search(-y_A, level_A, code_costs(), 64), -values_A)
    assert not search(torch.zeros(9).double(), level_A[:9], code_costs(), 64).any()


def test_costs_are_bits_of_gaussian_codes():
    mass_KQV = 2 ** (-code_costs() / PRICE)

    assert mass_KQV.shape[1] == 2
    assert code_costs().max() <= PRICE * LARGEST_COST + 1e-9
    # both signs of every magnitude, except at scales that the table does not hold whole
    total_KQ = mass_KQV[..., 0] + 2 * mass_KQV[:, :, 1:].sum(-1)
    assert torch.allclose(total_KQ, torch.ones_like(total_KQ), atol=2e-3)


def test_row_classes_are_eighths_of_an_octave_and_ignore_the_columns():
    generator = torch.Generator().manual_seed(3)
    target_AN = torch.randn(64, 5000, generator=generator).double()
    target_AN *= 2.0 ** torch.randn(5000, generator=generator)
    target_AN[5] *= 2
    target_AN[7] *= 2**-3
    target_AN[9] = 0

    path = row_path(row_power(target_AN))

    usual = int(path.row_class_A[0])
    assert path.row_class_A[5] - usual in (7, 8, 9)
    assert usual - path.row_class_A[7] in (23, 24, 25)
    assert path.row_class_A[9] == path.row_class_A.min() == 0
    assert path.order_A[-1] == 5


def test_order_of_the_rows_does_not_matter(search):
    weight_AN, moments = layer(30, 512)
    turned = torch.arange(30).flip(0)
    # rows of equal classes keep their order, so let no two rows be of one class
    target_AN = weight_AN.sign() * weight_AN.abs().clamp(0.5, 2) * 1.3 ** torch.arange(30)[:, None]

    def values(target_AN):
        trellis = Trellis(search=search, path=row_path(row_power(target_AN)))
        return zsic(target_AN, torch.linalg.cholesky(moments.cov), 0.3, trellis=trellis)[0]

    assert len(row_path(row_power(target_AN)).row_class_A.unique()) == 30
    assert torch.equal(values(target_AN)[turned], values(target_AN[turned]))


@pytest.mark.parametrize("bits", [1.5, 3.0])
def test_trellis_has_a_smaller_error_at_equal_bits(search, bits):
    weight_AN, moments = layer(768, 256)
    settings = {"bits": bits, "charge": layer_charge}

    scalar = quantize_weight(weight_AN, moments, **settings)
    trellis = quantize_weight(weight_AN, moments, **settings, settings=TRELLIS, search=search)

    assert abs(trellis.bits - bits) < 0.01 * bits
    # at least a tenth of a bit
    assert trellis.error < scalar.error * 2 ** (-2 * 0.1) * 2 ** (2 * (scalar.bits - trellis.bits))
    payload = codec.encode(trellis.codes_AN, path=trellis.path)
    assert torch.equal(codec.decode(payload), trellis.codes_AN.int())


@pytest.mark.parametrize("kind", ["diagonal moments", "importances", "dead columns", "rate"])
def test_every_kind_of_layer_has_values_on_paths(search, kind):
    weight_AN, moments = layer(300, 64)
    arguments = {"bits": 3.0, "charge": layer_charge, "settings": TRELLIS, "search": search}
    if kind == "diagonal moments":
        moments = Moments.identity(64)
    elif kind == "importances":
        generator = torch.Generator().manual_seed(0)
        arguments["row_importance_A"] = torch.rand(300, generator=generator) + 0.01
    elif kind == "dead columns":
        weight_AN[:, ::3] = 0
        weight_AN[17] = 0
    else:
        arguments = {"rate": 2.5, "settings": TRELLIS, "search": search}

    quantized = quantize_weight(weight_AN, moments, **arguments)
    again = quantize_weight(weight_AN, moments, **arguments)

    order_A = quantized.path.order_A
    codes_of(quantized.codes_AN[order_A].int().numpy(), quantized.path.rows)
    assert torch.equal(quantized.codes_AN, again.codes_AN)
    assert torch.equal(quantized.row_scale_A, again.row_scale_A)
    assert quantized.error < 0.05


def test_weight_without_codes_has_a_path(search):
    quantized = quantize_weight(
        torch.zeros(30, 16),
        Moments.identity(16),
        bits=3.0,
        charge=layer_charge,
        settings=TRELLIS,
        search=search,
    )

    assert torch.equal(quantized.path.row_class_A, torch.zeros(30, dtype=torch.int64))
    codec.encode(quantized.codes_AN, path=quantized.path)


def test_tall_weight_is_quantized_along_one_path_per_band(search, monkeypatch):
    monkeypatch.setattr(tall_module, "ROWS_PER_BAND", 512)
    monkeypatch.setattr("watersic_hf.core.trellis.TALL", 1000)
    weight_AN, moments = layer(2000, 32)

    quantized = quantize_tall(
        weight_AN,
        moments,
        bits=3.0,
        charge=layer_charge,
        settings=TRELLIS,
        search=search,
        sample_rows=500,
    )

    assert quantized.path.rows == 128
    payload = codec.encode(quantized.codes_AN, path=quantized.path)
    assert torch.equal(codec.decode(payload), quantized.codes_AN.int())
    assert abs(quantized.bits - 3.0) < 0.03
    whole = quantize_weight(
        weight_AN, moments, bits=3.0, charge=layer_charge, settings=TRELLIS, search=search
    )
    assert quantized.error < 1.1 * whole.error


def test_missing_search_and_unknown_lattice_are_errors():
    weight_AN, moments = layer(20, 8)

    with pytest.raises(ValueError, match=r"model\.layer: the lattice is a trellis, so `search`"):
        quantize_weight(weight_AN, moments, rate=3.0, settings=TRELLIS, name="model.layer")
    with pytest.raises(ValueError, match="lattice is 'cubic'; use one of"):
        LayerSettings(lattice="cubic")


def test_path_of_some_rows_keeps_their_classes():
    path = Path(torch.tensor([3, 0, 2, 1]), 64)

    part = path.select(torch.tensor([0, 2]))

    assert part.row_class_A.tolist() == [3, 2]
    assert part.order_A.tolist() == [1, 0]
