import json

import pytest
import torch
from safetensors.torch import save_file

from watersic_hf.checkpoint import CheckpointError, compare_checkpoints, pack_layer


def packed(step, seed=0, name="m.h.0.fc", rows=48, columns=32):
    g = torch.Generator().manual_seed(seed)
    weight_AN = torch.randn(rows, columns, generator=g)
    codes_AN = (weight_AN / step).round().to(torch.int8)
    layer = pack_layer(codes_AN, torch.ones(rows), torch.full((columns,), step), name=name)
    return {f"{name}.{field}": tensor for field, tensor in layer.tensors().items()}, weight_AN


def write(folder, tensors, **settings):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": settings | {"left_dense": {str(folder): "x"}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_compare_two_quantized_models(tmp_path):
    (same, weight_AN), (coarse, _) = packed(0.25, name="m.h.0.fc"), packed(0.5, name="m.h.10.fc")
    fine, _ = packed(0.25, name="m.h.10.fc")
    norm = {"m.norm.weight": torch.ones(4)}
    a = write(tmp_path / "a", same | coarse | norm, bits=3.0, seed=0)
    b = write(tmp_path / "b", same | fine | {"m.extra": torch.ones(2)}, bits=4.0, seed=0)

    found = compare_checkpoints(a, b)

    first, second = found["layers"]
    assert (first["name"], first["identical"], first["difference"]) == ("m.h.0.fc", True, 0)
    assert second["name"] == "m.h.10.fc"
    assert second["bits_a"] < second["bits_b"]
    rounded = [(weight_AN / step).round() * step for step in (0.5, 0.25)]
    wanted = (rounded[0] - rounded[1]).norm() / rounded[0].norm()
    assert second["difference"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["totals"]["difference"] == pytest.approx(float(wanted) / 2**0.5, rel=1e-5)
    assert found["settings"] == {"bits": [3.0, 4.0]}
    # the scales of the columns and the codes differ, those of the rows do not
    assert found["tensors"]["identical"] == 3 + 1
    assert found["tensors"]["different"] == 2
    assert found["tensors"]["only_a"] == ["m.norm.weight"]
    assert found["tensors"]["only_b"] == ["m.extra"]


@pytest.mark.parametrize("transposed", [False, True])
def test_compare_with_a_dense_model(tmp_path, transposed):
    tensors, weight_AN = packed(0.25)
    dense = weight_AN.T.contiguous() if transposed else weight_AN
    a = write(tmp_path / "a", {"m.h.0.fc.weight": dense})
    b = write(tmp_path / "b", tensors)

    (layer,) = compare_checkpoints(a, b)["layers"]

    assert layer["bits_a"] == 32
    # rounding to a step leaves its square over twelve
    assert layer["difference"] == pytest.approx(0.25 / 12**0.5, rel=0.05)


def test_compare_models_without_a_common_layer_raises(tmp_path):
    a = write(tmp_path / "a", packed(0.25, name="x.fc")[0])
    b = write(tmp_path / "b", packed(0.25, name="y.fc")[0])
    c = write(tmp_path / "c", packed(0.25, name="x.fc", rows=24)[0])

    with pytest.raises(CheckpointError, match="have no layer in common"):
        compare_checkpoints(a, b)
    with pytest.raises(CheckpointError, match="only models of one architecture and size"):
        compare_checkpoints(a, c)
