import pytest
import torch

from watersic_hf import codec
from watersic_hf.checkpoint import (
    CheckpointError,
    layer_charge,
    pack_layer,
    rescale_layer,
    stored_layers,
    tensor_specs,
    validate_layer,
)
from watersic_hf.core import Moments, quantize_weight
from watersic_hf.core.rate import paper_rate
from watersic_hf.testing import random_layer


def layer(rows=40, columns=24, *, scale=1.0):
    g = torch.Generator().manual_seed(0)
    codes = (torch.randn(rows, columns, generator=g) * 2).round().to(torch.int8)
    row_scale = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5
    col_scale = scale * (torch.rand(columns, generator=g, dtype=torch.float64) + 0.1)
    return codes, row_scale, col_scale


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_scales_of_any_magnitude_keep_float16_precision(scale):
    codes, row_scale, col_scale = layer(scale=scale)

    packed = pack_layer(codes, row_scale, col_scale, name="l")

    exact = row_scale[:, None] * codes * col_scale
    stored = packed.row_scale[:, None].double() * codes * packed.col_scale.double()
    # two roundings to 11 bits
    assert (stored - exact).norm() < 2**-10 * exact.norm()


def test_stored_bits_count_the_bytes_of_the_tensors():
    packed = pack_layer(*layer(), name="l")

    total = sum(t.numel() * t.element_size() for t in packed.tensors().values())

    assert packed.stored_bits == 8 * total
    assert packed.bits_per_weight == pytest.approx(8 * total / (40 * 24))


def test_packed_layer_has_the_tensors_of_the_schema():
    packed = pack_layer(*layer(), name="l")

    found = {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors().items()}

    assert found == tensor_specs(40, 24, len(packed.weight))


def test_layer_charge_predicts_the_stored_bits():
    codes, row_scale, col_scale = layer(256, 512)

    packed = pack_layer(codes, row_scale, col_scale, name="l")

    assert layer_charge(codes, 256) == pytest.approx(packed.bits_per_weight, rel=2e-3)


@pytest.mark.parametrize("field", ["row_scale", "col_scale"])
def test_changed_scale_fails_the_checksum_of_the_payload(field):
    packed = pack_layer(*layer(), name="model.layers.3.q_proj")
    packed.tensors()[field][2] += 0.25

    with pytest.raises(
        CheckpointError, match=r"model\.layers\.3\.q_proj: the stored weight is dam"
    ):
        packed.verify("model.layers.3.q_proj")


def test_scales_of_another_layer_raise():
    packed = pack_layer(*layer(), name="l")
    codes, row_scale, col_scale = layer(41)
    other = pack_layer(codes, row_scale, col_scale, name="l")

    mixed = type(packed)(
        weight=packed.weight, row_scale=other.row_scale, col_scale=packed.col_scale
    )

    with pytest.raises(CheckpointError, match="l: the"):
        mixed.verify("l")


def test_scale_that_is_not_finite_is_rejected():
    codes, row_scale, col_scale = layer()
    col_scale[3] = float("nan")

    with pytest.raises(CheckpointError, match=r"l\.col_scale: 1 of 24 scales are not finite"):
        pack_layer(codes, row_scale, col_scale, name="l")


def test_scales_too_far_apart_for_float16_are_rejected():
    codes, row_scale, col_scale = layer()
    col_scale[3] = 1e9

    with pytest.raises(CheckpointError, match=r"l\.col_scale: scales from .* do not fit float16"):
        pack_layer(codes, row_scale, col_scale, name="l")


def test_scales_too_small_for_float16_are_rejected():
    with pytest.raises(CheckpointError, match=r"l\.col_scale: scales from .* do not fit float16"):
        pack_layer(*layer(scale=1e-9), name="l")


def test_rescale_layer_changes_neither_codes_nor_bits():
    packed = pack_layer(*layer(), name="l")
    row_scale, col_scale = packed.row_scale.float() * 1.01, packed.col_scale.float() * 0.9

    other = rescale_layer(packed, row_scale, col_scale, name="l")

    other.verify("l")
    assert torch.equal(codec.decode(other.weight), codec.decode(packed.weight))
    assert other.stored_bits == packed.stored_bits
    assert torch.equal(other.row_scale, row_scale.half())
    assert torch.equal(other.col_scale, col_scale.half())


def test_rescale_layer_rejects_scales_beyond_float16():
    packed = pack_layer(*layer(), name="l")

    with pytest.raises(CheckpointError, match=r"l\.col_scale: 24 of 24 new scales are not finite"):
        rescale_layer(packed, packed.row_scale, packed.col_scale.float() + 1e6, name="l")


def test_layer_with_only_dead_columns_can_be_packed():
    packed = pack_layer(
        torch.zeros(4, 6, dtype=torch.int8), torch.ones(4), torch.zeros(6), name="l"
    )

    assert codec.decode(packed.weight).count_nonzero() == 0


def test_stored_layers_finds_payloads_and_scales():
    headers = {
        "a.weight": ((100,), "U8"),
        "a.row_scale": ((4,), "F16"),
        "b.weight": ((4, 4), "F32"),
        "c.bytes": ((9,), "U8"),
    }

    assert list(stored_layers(headers)) == ["a"]
    assert stored_layers(headers)["a"] == {"weight": (100,), "row_scale": (4,)}


def test_stored_layers_finds_a_layer_without_payload():
    headers = {"a.weight": ((4, 4), "F32"), "a.col_scale": ((4,), "F16")}

    assert stored_layers(headers) == {"a": {"col_scale": (4,)}}


def test_validation_error_names_the_layer_and_the_field():
    shapes = {"weight": (99,), "row_scale": (8,), "col_scale": (4,)}

    validate_layer("l", shapes, 8, 4)
    with pytest.raises(CheckpointError, match=r"l\.row_scale: the checkpoint has shape \(8,\)"):
        validate_layer("l", shapes, 9, 4)
    with pytest.raises(CheckpointError, match=r"no tensor l\.col_scale"):
        validate_layer("l", {"weight": (99,), "row_scale": (8,)}, 8, 4)


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.0])
def test_stored_layer_has_less_error_at_the_rate_of_the_paper(rate):
    weight_AN, cov_NN = random_layer(1024, 256, seed=0)
    moments = Moments(cov=cov_NN, tokens=10**6)
    theirs = quantize_weight(weight_AN, moments, rate=rate)
    # a pooled entropy and 16 bits per scale: no tables, no header, no checksum
    counted = paper_rate(theirs.codes_AN)

    ours = quantize_weight(weight_AN, moments, bits=counted, charge=layer_charge)

    packed = pack_layer(ours.codes_AN, ours.row_scale_A, ours.col_scale_N, name="layer")
    assert packed.bits_per_weight <= counted * 1.008
    assert ours.error < 0.9 * theirs.error
