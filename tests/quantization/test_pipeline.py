import pytest
import torch
from torch import nn

from watersic_hf import WaterSICLinear
from watersic_hf.core import SHAPING_LOSS, LayerSettings
from watersic_hf.quantization import CalibrationSettings, LayerQuantizer, quantize_blocks


def windows_of(length):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(4)]


def run(model, layers, bits=5.0, length=32, **options):
    targets = {n: (model.get_submodule(n).weight.numel(), bits) for n in layers}
    quantizer = LayerQuantizer(targets, settings=LayerSettings(), seed=0)
    quantize_blocks(
        model, windows_of(length), layers=layers, quantizer=quantizer, batch_size=2, **options
    )
    return quantizer


def test_layers_outside_the_blocks_stay_dense_with_a_warning(make_llama, watersic_log):
    model = make_llama(tie_word_embeddings=False)
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear]

    quantizer = run(model, layers)

    assert len(quantizer.reports) == 14
    assert type(model.lm_head) is nn.Linear
    assert "Left dense, since no calibration data reaches them: lm_head." in watersic_log.text


@pytest.mark.parametrize(("length", "warned"), [(32, True), (128, False)])
def test_too_few_tokens_for_the_widest_layer_are_warned_about(
    make_llama, watersic_log, length, warned
):
    model = make_llama()

    # four windows, and down_proj has 160 inputs
    run(model, ["model.layers.0.mlp.down_proj"], length=length)

    assert ("do not determine the moments of 160 inputs" in watersic_log.text) == warned


def test_layer_that_its_block_never_calls_stays_dense_with_a_warning(make_llama, watersic_log):
    model = make_llama()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]

    run(model, layers)

    assert type(model.model.layers[1].mlp.spare) is nn.Linear
    assert "model.layers.1.mlp.spare" in watersic_log.text


def inputs_of(model, name, windows):
    """Inputs of a layer in float64, T x N."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        model(torch.stack(windows))
    handle.remove()
    return torch.cat(seen)


def test_error_of_a_layer_includes_the_drift_that_no_weight_can_undo(make_llama):
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    settings = CalibrationSettings(
        allocation="uniform", row_importance=False, residual=False, drift=1.0
    )
    original, both, alone = make_llama(), make_llama(), make_llama()

    options = {"bits": 2.0, "length": 256, "settings": settings}
    error = run(both, names, **options).reports[-1].error
    error_alone = run(alone, names[1:], **options).reports[-1].error

    windows = windows_of(256)
    x_TN, drifted_TN = (inputs_of(model, names[1], windows) for model in (original, both))
    weight_AN = original.get_submodule(names[1]).weight.detach().double()
    y_TA = x_TN @ weight_AN.T
    best_NA = torch.linalg.lstsq(drifted_TN, y_TA).solution
    power = float(y_TA.square().sum())
    floor = float((y_TA - drifted_TN @ best_NA).square().sum()) / power
    drift = float((y_TA - drifted_TN @ weight_AN.T).square().sum()) / power
    assert floor > 0.05
    # at the same bits the best weight on drifted inputs has the relative error of the layer alone
    assert error > floor + (1 - floor) * error_alone
    # without any compensation all of the drift would be added
    assert error < error_alone + drift


def test_quantized_layer_does_not_depend_on_the_order_of_layers(make_llama):
    from watersic_hf.core import Moments

    model = make_llama()
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    targets = {n: (model.get_submodule(n).weight.numel(), 4.0) for n in names}
    stored = []
    for order in (names, names[::-1]):
        quantizer = LayerQuantizer(targets, settings=LayerSettings(), seed=3)
        first, _ = quantizer.quantize(
            order[0], model.get_submodule(order[0]).weight, Moments.identity(64)
        )
        stored.append((order[0], first.weight))
    again = LayerQuantizer(targets, settings=LayerSettings(), seed=3)

    for name, payload in stored:
        alone = LayerQuantizer({name: targets[name]}, settings=again.settings, seed=3)
        packed, _ = alone.quantize(name, model.get_submodule(name).weight, Moments.identity(64))
        assert torch.equal(packed.weight, payload)


def test_quantized_layer_replaces_the_dense_one_and_keeps_its_bias(make_llama):
    model = make_llama(attention_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    bias = model.get_submodule(name).bias.detach().clone()

    run(model, [name])

    assert isinstance(model.get_submodule(name), WaterSICLinear)
    assert torch.equal(model.get_submodule(name).bias, bias)


def test_report_of_a_layer_holds_the_bits_of_its_columns(make_llama):
    name = "model.layers.0.mlp.up_proj"

    (layer,) = run(make_llama(), [name], bits=4.0).reports

    # the columns' own models are cheaper than what is stored, and theory is cheaper still
    spent, theory = (sum(v) / len(v) for v in (layer.profile.entropies, layer.profile.waterfilling))
    assert theory < spent < 4.0
    assert spent == pytest.approx(theory + SHAPING_LOSS, abs=0.3)
    assert sum(layer.profile.histogram) == 64


@pytest.mark.parametrize("drift", [0.5, 0.0])
def test_wide_layers_are_quantized_as_any_other(make_llama, monkeypatch, drift):
    from watersic_hf.core import projected

    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("up", "down")]
    settings = CalibrationSettings(drift=drift)
    expected, found = make_llama(), make_llama()
    run(expected, names, length=128, settings=settings)

    # down_proj has more inputs than up_proj, and fewer outputs than inputs
    monkeypatch.setattr(projected, "WIDE", 65)
    quantizer = run(found, names, length=128, settings=settings)

    for name in names:
        weights = [model.get_submodule(name).dequantize().weight for model in (expected, found)]
        torch.testing.assert_close(
            *weights, rtol=0.05, atol=0.05 * float(weights[0].detach().std())
        )
    assert [report.name for report in quantizer.reports] == names
