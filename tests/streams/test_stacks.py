"""Encoder-decoder models, and models whose blocks cannot be run one by one."""

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from watersic_hf import CalibrationError, WaterSICLinear
from watersic_hf.calibration import layer_sensitivities
from watersic_hf.core import LayerSettings, Moments, Whitening
from watersic_hf.quantization import LayerQuantizer, quantize_blocks
from watersic_hf.quantization.settings import CalibrationSettings
from watersic_hf.streams.batches import model_inputs
from watersic_hf.streams.stacks import runnable_stacks
from watersic_hf.streams.stream import block_stream


def bart():
    sizes = {
        f"{part}_{size}": value
        for part in ("encoder", "decoder")
        for size, value in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
    }
    config = BartConfig(vocab_size=320, d_model=32, max_position_embeddings=64, **sizes)
    return BartForConditionalGeneration(config).eval()


def t5():
    config = T5Config(
        vocab_size=320,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def windows(count=6, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


@torch.no_grad()
@pytest.mark.parametrize("make", [bart, t5])
def test_decoder_runs_on_encoder_output_of_the_same_batch(make):
    model = make()
    tokens = [*windows(6, 16), *windows(4, 9)]

    encoder, decoder = runnable_stacks(model, layers_of(model), tokens[0])
    stream = block_stream(model, decoder.modules, tokens, batch_size=2)
    for index, block in enumerate(decoder.modules):
        stream.advance(index, block)

    assert "encoder" in encoder.blocks[0][0]
    assert "decoder" in decoder.blocks[0][0]
    norm = getattr(model.base_model.decoder, "final_layer_norm", nn.Identity())
    for batch, hidden in enumerate(stream.hidden):
        window = torch.stack(tokens[2 * batch : 2 * batch + 2])
        expected = model(**model_inputs(model, window), output_hidden_states=True)
        torch.testing.assert_close(norm(hidden), expected.decoder_hidden_states[-1])


def quantized(model, settings, bits=4.0):
    layers = layers_of(model)
    targets = {n: (model.get_submodule(n).weight.numel(), bits) for n in layers}
    quantizer = LayerQuantizer(targets, settings=LayerSettings(), seed=0)
    quantize_blocks(
        model, windows(), layers=layers, quantizer=quantizer, settings=settings, batch_size=2
    )
    return quantizer.reports


def test_encoder_and_decoder_are_quantized_in_order(watersic_log):
    model = bart()
    layers = layers_of(model)

    reports = quantized(model, CalibrationSettings(attention=0.5), bits=6.0)

    names = [report.name for report in reports]
    assert set(names) == set(layers)
    assert [name.startswith("model.encoder.") for name in names] == [True] * 12 + [False] * 20
    assert all(isinstance(model.get_submodule(name), WaterSICLinear) for name in names)
    assert {report.tokens for report in reports} == {96}
    # it is not determined which layers feed the self-attention and which the cross-attention
    assert "model.decoder.layers.0: no single self-attention was recognised" in watersic_log.text


def test_encoder_sensitivities_come_from_decoder_predictions():
    model, tokens = bart().requires_grad_(False), windows(3)
    name = "model.encoder.layers.0.fc1"

    found = layer_sensitivities(model, tokens, layers_of(model), tokens=8192, damping=1e-2, seed=0)

    assert set(found) == set(layers_of(model))
    inputs, grads, generator = [], [], torch.Generator().manual_seed(0)
    for window in tokens:
        kept = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, args, y, kept=kept: kept.extend((args[0][0], y.requires_grad_())) or y
        )
        log_p_TV = model(**model_inputs(model, window[None])).logits[0].log_softmax(-1)
        handle.remove()
        level_T1 = torch.rand(len(window), 1, generator=generator)
        drawn = (log_p_TV.detach().exp().cumsum(-1) <= level_T1).sum(-1, keepdim=True)
        inputs.append(kept[0].double())
        grads += torch.autograd.grad(log_p_TV.gather(1, drawn).sum(), kept[1])
    x_TN, power_TA = torch.cat(inputs), torch.cat([g[0] for g in grads]).double().square()
    moments = Moments(cov=x_TN.T @ x_TN / len(x_TN), tokens=len(x_TN))
    power_A = Whitening.of(moments, 1e-2, name=name).leverages(x_TN) @ power_TA / len(x_TN)
    torch.testing.assert_close(found[name].row_power_A, power_A, rtol=1e-3, atol=1e-12)


def test_decoder_compensates_for_drift_of_the_encoder():
    errors = []
    for drift in (0.0, 1.0):
        torch.manual_seed(0)
        model = bart()
        with torch.no_grad():
            original = model(**model_inputs(model, torch.stack(windows()))).logits
        settings = CalibrationSettings(
            allocation="uniform", row_importance=False, drift=drift, residual=False
        )
        quantized(model, settings, bits=3.0)
        with torch.no_grad():
            found = model(**model_inputs(model, torch.stack(windows()))).logits
        errors.append(float((found - original).square().sum()))

    assert errors[1] < errors[0]


def test_model_with_repeatedly_called_blocks_is_refused():
    config = AlbertConfig(
        vocab_size=320,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_hidden_layers=3,
    )
    model = AlbertForMaskedLM(config).eval()

    with pytest.raises(CalibrationError, match=r"albert_layer_groups \(its blocks are not called"):
        quantized(model, CalibrationSettings())


def test_model_that_reads_no_token_ids_is_refused():
    config = WhisperConfig(
        vocab_size=320,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()

    with pytest.raises(
        CalibrationError, match="reads `input_features`, but calibration text provides"
    ):
        quantized(model, CalibrationSettings())


def test_unreached_stack_is_logged_and_stays_dense(make_llama, watersic_log):
    model = make_llama()
    model.vision = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    quantized(model, CalibrationSettings())

    assert "Stays dense, as it cannot be calibrated" in watersic_log.text
    assert "block by block: vision (text does not reach it)" in watersic_log.text
    assert type(model.vision[0][0]) is nn.Linear


def test_blocks_called_without_hidden_states_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

        def forward(self, input_ids, use_cache):
            return self.layers[0](input=torch.zeros(1, 4, 8))

    with pytest.raises(CalibrationError, match=r"called with \['input'\], but to be calibrated"):
        runnable_stacks(Odd(), ["layers.0.0"], windows(1)[0])
