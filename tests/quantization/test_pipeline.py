import pytest
import torch
from torch import nn

from watersic_hf import WaterSICLinear
from watersic_hf.checkpoint import average_bits
from watersic_hf.checkpoint.report import (
    LayerReport,
    describe_run,
    location_of,
    read_report,
    read_run,
    write_report,
)
from watersic_hf.core import SHAPING_LOSS, ColumnProfile, LayerSettings
from watersic_hf.quantization import LayerQuantizer, quantize_blocks


def run(model, layers, bits=5.0, length=32):
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 320, (length,), generator=g) for _ in range(4)]
    targets = {n: (model.get_submodule(n).weight.numel(), bits) for n in layers}
    quantizer = LayerQuantizer(targets, settings=LayerSettings(), seed=0)
    quantize_blocks(model, windows, layers=layers, quantizer=quantizer, batch_size=2)
    return quantizer


def test_layers_outside_the_blocks_stay_dense_and_are_named(make_llama, watersic_log):
    model = make_llama(tie_word_embeddings=False)
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear]

    quantizer = run(model, layers)

    assert len(quantizer.reports) == 14
    assert type(model.lm_head) is nn.Linear
    assert "Left dense, since no calibration data reaches them: lm_head." in watersic_log.text


@pytest.mark.parametrize(("length", "warned"), [(32, True), (128, False)])
def test_too_few_tokens_for_the_widest_layer_are_a_warning(
    make_llama, watersic_log, length, warned
):
    model = make_llama()

    # four windows, and down_proj has 160 inputs
    run(model, ["model.layers.0.mlp.down_proj"], length=length)

    assert ("do not determine the moments of 160 inputs" in watersic_log.text) == warned


def test_a_layer_that_the_block_never_calls_stays_dense_and_is_named(make_llama, watersic_log):
    model = make_llama()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]

    run(model, layers)

    assert type(model.model.layers[1].mlp.spare) is nn.Linear
    assert "model.layers.1.mlp.spare" in watersic_log.text


def test_later_layers_see_what_the_quantized_ones_put_out(make_llama):
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    errors = []
    for layers in (names, names[1:]):
        # the moments of down_proj differ if up_proj was quantized before: so does its error
        errors.append(run(make_llama(), layers, bits=2.0).reports[-1].error)

    assert errors[0] != errors[1]


def test_a_layer_does_not_depend_on_the_order_of_the_others(make_llama):
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


def test_quantized_layers_replace_the_dense_ones_with_their_biases(make_llama):
    model = make_llama(attention_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    bias = model.get_submodule(name).bias.detach().clone()

    run(model, [name])

    assert isinstance(model.get_submodule(name), WaterSICLinear)
    assert torch.equal(model.get_submodule(name).bias, bias)


def report(name, columns, bits, **more):
    return LayerReport(
        name=name, rows=2, columns=columns, asked=3.0, bits=bits, error=0.1, damping=1e-4,
        tokens=5, seconds=0.5, **more,
    )  # fmt: skip


def test_reports_come_back_from_their_file(tmp_path):
    profile = ColumnProfile(waterfilling=(2.5, -1.0), entropies=(2.0, 0.0), histogram=(1, 0, 2))
    reports = [report("a", 3, 2.5), report("b", 1, 4.5, profile=profile)]
    done = describe_run(1.5)

    write_report(tmp_path, reports, done)

    assert read_report(tmp_path) == reports
    assert read_run(tmp_path) == done
    assert done.versions["torch"] == torch.__version__
    assert read_report(tmp_path / "nowhere") == []
    assert read_run(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.down_proj", ("model.layers", 12, "mlp.down_proj")),
        ("model.layers.3.mlp.experts.17.up", ("model.layers", 3, "mlp.experts.*.up")),
        ("decoder.block.0.layer.1.Enc.q", ("decoder.block", 0, "layer.*.Enc.q")),
        ("lm_head", ("", 0, "lm_head")),
    ],
)
def test_the_name_of_a_layer_says_where_it_stands(name, place):
    assert location_of(name) == place


def test_a_layer_reports_what_its_columns_spend(make_llama):
    name = "model.layers.0.mlp.up_proj"

    (layer,) = run(make_llama(), [name], bits=4.0).reports

    # the columns' own models are cheaper than what is stored, and theory is cheaper still
    spent, theory = (sum(v) / len(v) for v in (layer.profile.entropies, layer.profile.waterfilling))
    assert theory < spent < 4.0
    assert spent == pytest.approx(theory + SHAPING_LOSS, abs=0.3)
    assert sum(layer.profile.histogram) == 64


def test_the_average_is_weighted_by_the_number_of_weights():
    assert average_bits([report("a", 3, 2.0), report("b", 1, 4.0)]) == pytest.approx(2.5)
    assert average_bits([]) == 0
