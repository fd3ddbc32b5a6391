import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from watersic_hf.calibration.sensitivity import Sensitivity, layer_sensitivities
from watersic_hf.core import SHAPING_LOSS, CalibrationError, Moments, Whitening
from watersic_hf.quantization.budget import LEAST_BITS, sensitive_targets


def layers_of(model):
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]


def windows(count=8, length=32):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=g) for _ in range(count)]


def sensitivities(model, tokens):
    layers = layers_of(model)
    return layer_sensitivities(model, tokens, layers, tokens=8192, damping=1e-2, seed=0)


def test_row_power_matches_whole_model_gradients(make_llama):
    model = make_llama().requires_grad_(False)
    tokens = windows()

    found = sensitivities(model, tokens)

    # the same draws, with one backward pass through the whole model
    name = "model.layers.0.mlp.up_proj"
    kept, grads, generator = [], [], torch.Generator().manual_seed(0)
    layer = model.get_submodule(name)

    def keep(module, args, y):
        kept.append((args[0][0].double(), y.requires_grad_()))
        return y

    handle = layer.register_forward_hook(keep)
    for window in tokens:
        log_p_TV = F.log_softmax(model(input_ids=window[None]).logits[0], -1)
        level_T1 = torch.rand(len(window), 1, generator=generator)
        sums_TV = log_p_TV.detach().exp().cumsum(-1)
        drawn = (sums_TV <= level_T1 * sums_TV[:, -1:]).sum(-1, keepdim=True)
        grads += torch.autograd.grad(log_p_TV.gather(1, drawn).sum(), kept[-1][1])
    handle.remove()
    x_TN, grad_TA = torch.cat([x for x, _ in kept]), torch.cat([g[0] for g in grads]).double()
    cov_NN = x_TN.T @ x_TN / len(x_TN)
    damped_NN = cov_NN + 1e-2 * cov_NN.diagonal().mean() * torch.eye(len(cov_NN))
    leverage_T = (x_TN.T * torch.linalg.solve(damped_NN, x_TN.T)).mean(0)
    power_A = (leverage_T[:, None] * grad_TA.square()).mean(0)
    assert set(found) == set(layers_of(model))
    torch.testing.assert_close(found[name].row_power_A, power_A, rtol=1e-3, atol=1e-12)


def test_sensitivity_predicts_divergence_of_noise(make_llama):
    torch.manual_seed(2)
    model = make_llama().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3) if parameter.ndim == 2 else None
    # one token has a massive embedding, which affects those that follow it
    model.model.embed_tokens.weight[7] *= 30
    tokens = [torch.cat([torch.tensor([7]), window[1:]]) for window in windows(32)]
    found = sensitivities(model, tokens)
    name, size = "model.layers.1.mlp.up_proj", 3e-3
    layer = model.get_submodule(name)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(args[0][0].double()))
    reference = [F.log_softmax(model(input_ids=w[None]).logits[0], -1) for w in tokens]
    handle.remove()
    x_TN = torch.cat(seen)
    whitening = Whitening.of(Moments(cov=x_TN.T @ x_TN / len(x_TN), tokens=9), 1e-2, name=name)
    weight_AN, measured, trials = layer.weight.clone(), 0.0, 8

    for _ in range(trials):
        noise_AN = size * torch.randn(weight_AN.shape, dtype=torch.float64)
        noise_AN = torch.linalg.solve_triangular(whitening.chol, noise_AN, upper=False, left=False)
        layer.weight.copy_(weight_AN + noise_AN)
        for window, p in zip(tokens, reference, strict=True):
            q = F.log_softmax(model(input_ids=window[None]).logits[0], -1)
            divergence = F.kl_div(q, p, reduction="sum", log_target=True)
            measured += float(divergence) / len(x_TN) / trials

    predicted = 0.5 * size**2 * x_TN.shape[1] * float(found[name].row_power_A.sum())
    # one token is drawn at each of 1024 positions
    assert measured == pytest.approx(predicted, rel=0.25)


def test_layers_that_share_inputs_are_whitened_once(make_llama, monkeypatch):
    model = make_llama()
    named, of = [], Whitening.of

    def whitening(moments, damping, *, name, in_place):
        named.append(name.removeprefix("model.layers.0."))
        return of(moments, damping, name=name, in_place=in_place)

    monkeypatch.setattr(Whitening, "of", whitening)

    found = sensitivities(model, windows(2))

    first = [name for name in named if not name.startswith("model")]
    assert first == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert set(found) == set(layers_of(model))


def test_sensitivities_of_blocks_that_return_tuples():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=2)
    model = BloomForCausalLM(config).eval()

    found = sensitivities(model, windows(2))

    assert set(found) == set(layers_of(model))
    assert all(bool((s.row_power_A >= 0).all()) for s in found.values())


def test_measuring_sensitivities_leaves_model_unchanged(make_llama):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())

    sensitivities(model, windows(2))

    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert "forward" not in vars(model.model.layers[0])


def test_nonfinite_predictions_raise(make_llama):
    model = make_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")

    with pytest.raises(CalibrationError, match="its predictions on the calibration windows"):
        sensitivities(model, windows(2))


def known(power, variance, columns=4):
    return Sensitivity(
        row_power_A=torch.full((3,), power), variance_N=torch.full((columns,), variance)
    )


def test_sixteenfold_sensitivity_moves_half_a_bit_each_way():
    targets = {"a": (100, 4.0), "b": (100, 4.0)}

    moved = sensitive_targets(targets, {"a": known(16.0, 1.0), "b": known(1.0, 1.0)})

    assert moved["a"] == (100, pytest.approx(4.5))
    assert moved["b"] == (100, pytest.approx(3.5))


def test_total_bits_are_kept_and_no_layer_falls_below_minimum():
    targets = {"a": (100, 1.5), "b": (300, 1.5), "c": (50, 2.0)}

    moved = sensitive_targets(targets, {"a": known(1e6, 1.0), "b": known(1.0, 1.0)})

    assert moved["b"][1] == (1.5 + LEAST_BITS) / 2
    assert sum(n * b for n, b in moved.values()) == pytest.approx(150 + 450 + 100)
    assert moved["c"] == (50, 2.0)


def test_columns_below_the_distortion_level_cost_nothing():
    variance_N = torch.tensor([1.0, 1e-9, 1e-9, 1e-9])
    sensitivity = Sensitivity(row_power_A=torch.ones(3), variance_N=variance_N)

    targets = {"a": (100, 1.0), "b": (100, 3.0)}
    moved = sensitive_targets(targets, {"a": sensitivity, "b": known(1.0, 1.0)})

    # one of four columns is above the level: one bit per weight is four bits for that column
    a, b = (2 * moved[k][1] - targets[k][1] - SHAPING_LOSS for k in "ab")
    assert 4 * a == pytest.approx(b)


def test_wide_layers_have_the_same_sensitivities(make_llama, monkeypatch):
    from watersic_hf.core import projected

    expected = sensitivities(make_llama(), windows())
    monkeypatch.setattr(projected, "WIDE", 2)

    found = sensitivities(make_llama(), windows())

    for name, sensitivity in expected.items():
        for field in ("row_power_A", "variance_N"):
            pair = getattr(found[name], field), getattr(sensitivity, field)
            torch.testing.assert_close(*pair, rtol=1e-6, atol=0)
