"""Models with an encoder and a decoder, and models whose blocks cannot be run one by one."""

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
from watersic_hf.streams.capture import block_stream, model_inputs, runnable_stacks


def bart():
    sizes = {
        f"{part}_{size}": value
        for part in ("encoder", "decoder")
        for size, value in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
    }
    config = BartConfig(vocab_size=320, d_model=32, max_position_embeddings=64, **sizes)
    return BartForConditionalGeneration(config).eval()


def t5():
    config = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def windows(count=6, length=16):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


@torch.no_grad()
@pytest.mark.parametrize("make", [bart, t5])
def test_a_decoder_is_run_on_what_the_encoder_put_out_for_the_same_batch(make):
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


@torch.no_grad()
def test_arguments_that_do_not_depend_on_the_tokens_are_kept_once(make_llama):
    model = make_llama()
    stream = block_stream(model, list(model.model.layers), windows(8), batch_size=2)

    assert all(arguments is stream.arguments[0] for arguments in stream.arguments)


@torch.no_grad()
def test_arguments_of_later_blocks_may_depend_on_the_tokens(make_llama):
    class Echo(nn.Module):
        """Adds the mean of its first block's output to the second's, by an argument."""

        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(320, 8)
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids, use_cache):
            first = self.layers[0](self.embedding(input_ids), shift=None)
            return self.layers[1](first, shift=first.mean((1, 2), keepdim=True))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, hidden_states, shift):
            return self.proj(hidden_states if shift is None else hidden_states + shift)

    model = Echo()
    stream = block_stream(model, list(model.layers), windows(8), batch_size=2)
    for index, block in enumerate(model.layers):
        stream.advance(index, block)

    for batch, hidden in enumerate(stream.hidden):
        window = torch.stack(windows(8)[2 * batch : 2 * batch + 2])
        torch.testing.assert_close(hidden, model(window, use_cache=False))


def quantized(model, settings, bits=4.0):
    layers = layers_of(model)
    targets = {n: (model.get_submodule(n).weight.numel(), bits) for n in layers}
    quantizer = LayerQuantizer(targets, settings=LayerSettings(), seed=0)
    quantize_blocks(
        model, windows(), layers=layers, quantizer=quantizer, settings=settings, batch_size=2
    )
    return quantizer.reports


def test_both_stacks_are_quantized_the_encoder_first(watersic_log):
    model = bart()
    layers = layers_of(model)

    reports = quantized(model, CalibrationSettings(attention=0.5), bits=6.0)

    names = [report.name for report in reports]
    assert set(names) == set(layers)
    assert [name.startswith("model.encoder.") for name in names] == [True] * 12 + [False] * 20
    assert all(isinstance(model.get_submodule(name), WaterSICLinear) for name in names)
    assert {report.tokens for report in reports} == {96}
    # which of its layers feed the self-attention, and which the cross-attention, is not read
    assert "model.decoder.layers.0: no single self-attention was recognised" in watersic_log.text


def test_sensitivities_of_an_encoder_are_those_of_the_decoders_predictions():
    model, tokens = bart().requires_grad_(False), windows(3)
    name = "model.encoder.layers.0.fc1"

    found = layer_sensitivities(
        model, tokens, layers_of(model), tokens=8192, damping=1e-2, seed=0
    )  # fmt: skip

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


def test_a_decoder_makes_up_for_the_drift_of_the_encoder():
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


def test_blocks_that_are_used_again_and_again_cannot_be_calibrated():
    config = AlbertConfig(vocab_size=320, embedding_size=16, hidden_size=32, num_attention_heads=2,
                          intermediate_size=64, num_hidden_layers=3)  # fmt: skip
    model = AlbertForMaskedLM(config).eval()

    with pytest.raises(CalibrationError, match=r"albert_layer_groups \(its blocks are not called"):
        quantized(model, CalibrationSettings())


def test_a_model_that_does_not_read_text_cannot_be_calibrated_on_text():
    config = WhisperConfig(vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1,
                           encoder_attention_heads=2, decoder_attention_heads=2,
                           encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0)  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()

    with pytest.raises(CalibrationError, match="reads `input_features`, and calibration text has"):
        quantized(model, CalibrationSettings())


def test_a_stack_that_text_does_not_reach_is_named_and_stays_dense(make_llama, watersic_log):
    model = make_llama()
    model.vision = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

    quantized(model, CalibrationSettings())

    assert "stays dense: vision (text does not reach it)" in watersic_log.text
    assert type(model.vision[0][0]) is nn.Linear


def test_blocks_must_be_called_on_their_hidden_states():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

        def forward(self, input_ids, use_cache):
            return self.layers[0](input=torch.zeros(1, 4, 8))

    with pytest.raises(CalibrationError, match=r"called with \['input'\], but to be calibrated"):
        runnable_stacks(Odd(), ["layers.0.0"], windows(1)[0])
