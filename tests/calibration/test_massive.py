import pytest
import torch
from torch import nn

from watersic_hf.calibration import massive_rows, zero_rows
from watersic_hf.streams import decoder_blocks


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


def windows(count=4, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def find(model):
    layers = layers_of(model)
    return massive_rows(model, decoder_blocks(model, layers), windows(), layers, batch_size=2)


def test_massive_channel_is_found_by_its_rows(make_llama):
    model = make_llama()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.get_submodule(f"model.layers.1.mlp.{name}").weight[7] *= 300

    found = find(model)

    assert found == {f"model.layers.1.mlp.{name}_proj": [7] for name in ("gate", "up")}


def test_channels_beside_many_pruned_ones_are_not_massive(make_llama):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:100] = 0
        model.model.layers[1].mlp.up_proj.weight[:] = 0

    assert find(model) == {}


def test_ordinary_model_has_no_massive_rows(make_llama):
    assert find(make_llama()) == {}


def test_zeroed_rows_and_biases_give_zero_output(make_llama):
    model = make_llama(mlp_bias=True)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.bias.fill_(1.0)

    zero_rows(model, {"model.layers.0.mlp.up_proj": [3, 5]})

    with torch.no_grad():
        y = layer(torch.randn(4, 64))
    assert torch.equal((y == 0).all(0).nonzero()[:, 0], torch.tensor([3, 5]))


def test_zeroing_a_missing_row_is_refused(make_llama):
    with pytest.raises(ValueError, match=r"up_proj has rows 0 to 159, and \[160\]"):
        zero_rows(make_llama(), {"model.layers.0.mlp.up_proj": [160]})
