"""Weights without their payload: whole, and the parts that a process of several holds."""

import pytest
import torch

from watersic_hf import codec
from watersic_hf.checkpoint import CheckpointError, pack_layer
from watersic_hf.nn import ops
from watersic_hf.nn.forms import JoinedForms, Part, form_of
from watersic_hf.testing import assert_close, trellis_values

CPU = torch.device("cpu")
RESIDENCIES = ("dense", "packed", "entropy", "stored")
A, N = 150, 70


@pytest.fixture(params=["codes", "trellis"])
def packed(request):
    torch.manual_seed(0)
    scales = torch.rand(A) + 0.5, torch.rand(N) + 0.5
    if request.param == "codes":
        codes_AN = (torch.randn(A, N) * 3).round().int()
        return pack_layer(codes_AN, *scales, name="layer")
    values_AN, path = trellis_values(A, N, path_rows=256)
    return pack_layer(values_AN, *scales, path=path, name="layer")


def weight_of(packed):
    return ops.dequantize(packed.weight, packed.row_scale, packed.col_scale, torch.float32)


def part_of(rows, columns=slice(None)):
    return Part(rows_r=torch.as_tensor(rows), columns=columns)


PARTS = {
    "whole": part_of(range(A)),
    "rows": part_of(range(40, 115)),
    "columns": part_of(range(A), slice(32, 70)),
    "scattered": part_of([*range(10, 30), *range(90, 93), *range(40, 60)]),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_form_multiplies_with_its_part_of_the_weight(packed, residency, part):
    expected_rn = weight_of(packed)[part.rows_r][:, part.columns]
    form = form_of(packed, part, residency, dtype=torch.float32, device=CPU, name="layer")
    x = torch.randn(3, expected_rn.shape[1])

    y = JoinedForms([form], len(expected_rn))(x)

    assert_close(y, x @ expected_rn.T, tolerance=1e-5)


def test_joined_forms_stand_side_by_side_and_are_padded_with_zeros(packed):
    options = {"dtype": torch.float32, "device": CPU, "name": "layer"}
    forms = [form_of(packed, PARTS["rows"], residency, **options) for residency in RESIDENCIES]
    x = torch.randn(2, 3, N)
    y = torch.zeros(2, 3, 310)
    rows_rN = weight_of(packed)[40:115]
    for start in range(0, 300, 75):
        y[..., start : start + 75] = x @ rows_rN.T
    joined = JoinedForms(forms, 310)

    assert_close(joined(x), y, tolerance=1e-5)
    torch.testing.assert_close(torch.compile(joined, fullgraph=True, backend="eager")(x), joined(x))
    torch.library.opcheck(
        ops.joined_linear, (x, joined.kinds, joined.tensors, 310, "auto"), test_utils="test_schema"
    )


@pytest.mark.parametrize("residency", ["packed", "stored"])
def test_rows_are_gathered(packed, residency):
    form = form_of(packed, PARTS["rows"], residency, dtype=torch.float32, device=CPU, name="layer")
    index = torch.tensor([[3, 0], [3, 74]])

    rows = JoinedForms([form], 75).gather(index, torch.float32)

    assert torch.equal(rows, weight_of(packed)[40:115][index])


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_damage_names_the_layer(packed, residency):
    packed.weight[len(packed.weight) // 2] ^= 1

    with pytest.raises(CheckpointError, match=r"model\.layer: .*damaged"):
        form_of(
            packed, PARTS["rows"], residency, dtype=torch.float32, device=CPU, name="model.layer"
        )


def test_only_the_rows_of_the_part_are_decoded(monkeypatch):
    packed = pack_layer(
        torch.randint(-3, 4, (4096, 64)), torch.ones(4096), torch.ones(64), name="layer"
    )
    decoded, decode_rows = [], codec.decode_rows
    monkeypatch.setattr(
        codec, "decode_rows", lambda p, rows: decoded.append(len(rows)) or decode_rows(p, rows)
    )

    for residency in ("dense", "packed"):
        form_of(
            packed, part_of(range(64)), residency, dtype=torch.float32, device=CPU, name="layer"
        )

    assert decoded == [64, 64]
