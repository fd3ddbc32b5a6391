import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from watersic_hf import CheckpointError, WaterSICLinear, codec
from watersic_hf.finetuning import STATE_FILE, FinetuneSettings, finetune_scales, training
from watersic_hf.finetuning.layers import checkpointed, frozen, layers_to_train, trainable

#: Nine of the ten windows are trained on: two epochs of three steps.
SETTINGS = FinetuneSettings(epochs=2, learning_rate=2e-2, batch_size=4)


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(num_hidden_layers=1, initializer_range=0.1)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, teacher, quantize, spoil_scales):
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    return spoil_scales(quantize(folder))


@pytest.fixture(scope="module")
def make_student(quantized):
    return lambda: copy.deepcopy(quantized)


@pytest.fixture
def student(make_student):
    return make_student()


@pytest.fixture(scope="module")
def windows():
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, 320, (24 + 8 * (i % 2),), generator=g) for i in range(10)]


def stored(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_finetuning_lowers_the_divergence_from_the_teacher(student, teacher, windows):
    report = finetune_scales(student, teacher, windows, settings=SETTINGS)

    assert report.layers == 7
    assert report.tokens == sum(len(window) for window in windows[:-1])
    assert report.kept_epoch == 2
    assert report.kl_bits_after < 0.8 * report.kl_bits_before
    assert report.train_kl_bits[1] < report.train_kl_bits[0]
    # the report is about the scales as they are stored
    assert report.kl_bits_after == training.mean_divergence(student, teacher, windows[-1:])


def test_only_scales_and_checksums_change(student, teacher, windows, packed_names):
    before = stored(student)

    finetune_scales(student, teacher, windows, settings=SETTINGS)

    after = stored(student)
    names = packed_names(student)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    for name in names:
        student.get_submodule(name).check(name)
        assert not torch.equal(before[f"{name}.row_scale"], after[f"{name}.row_scale"])
        payloads = before.pop(f"{name}.weight"), after.pop(f"{name}.weight")
        assert torch.equal(codec.decode(payloads[0]), codec.decode(payloads[1]))
    dense = [n for n in before if n.rpartition(".")[0] not in names]
    assert len(dense) > 0
    assert all(torch.equal(before[n], after[n]) for n in dense)


def test_finetune_save_reload_generate(student, teacher, windows, tokens, tmp_path):
    finetune_scales(student, teacher, windows, settings=SETTINGS)

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert torch.equal(again(tokens).logits, student(tokens).logits)
    assert student.generate(tokens, max_new_tokens=4).shape == (2, 28)
    assert again.hf_quantizer.reports == student.hf_quantizer.reports != []


def test_the_seed_determines_the_result(make_student, teacher, windows):
    results = []
    for seed in (1, 1, 2):
        student = make_student()
        finetune_scales(student, teacher, windows, settings=replace(SETTINGS, seed=seed))
        results.append(stored(student))

    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(("save_every", "saves"), [(32, 1), (1, 2), (1, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_student, teacher, windows, tmp_path, monkeypatch, save_every, saves
):
    uninterrupted = make_student()
    expected = finetune_scales(uninterrupted, teacher, windows, settings=SETTINGS)
    monkeypatch.setattr(training, "SAVE_EVERY", save_every)
    count = itertools.count(1)
    save = training._Trainer._save

    def interrupted_save(trainer):
        save(trainer)
        if next(count) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Trainer, "_save", interrupted_save)
    student = make_student()
    before = stored(student)
    with pytest.raises(KeyboardInterrupt):
        finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    assert same(stored(student), before)

    report = finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert same(stored(student), stored(uninterrupted))
    assert report.train_kl_bits == expected.train_kl_bits
    assert report.validation_kl_bits == expected.validation_kl_bits
    assert [file.name for file in tmp_path.iterdir()] == [STATE_FILE]


def test_resuming_a_finished_run_returns_its_result(make_student, teacher, windows, tmp_path):
    first = make_student()
    expected = finetune_scales(first, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    student = make_student()

    report = finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert report == expected
    assert same(stored(student), stored(first))


def test_resuming_the_state_of_another_run_is_refused(
    make_student, student, teacher, windows, tmp_path, make_llama
):
    finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    again = make_student()

    def resume(model, teacher, windows, settings=SETTINGS):
        finetune_scales(model, teacher, windows, settings=settings, resume_folder=tmp_path)

    with pytest.raises(CheckpointError, match=r"with other settings \(.*\), and cannot be resumed"):
        resume(again, teacher, windows, FinetuneSettings(epochs=3))
    with pytest.raises(CheckpointError, match="with other windows"):
        resume(again, teacher, windows[1:])
    # this model has already been finetuned
    with pytest.raises(CheckpointError, match="with other model"):
        resume(student, teacher, windows)
    with pytest.raises(CheckpointError, match="with other teacher and windows"):
        resume(again, make_llama(), windows[1:])


def test_original_scales_are_kept_if_no_epoch_is_better(student, teacher, windows):
    before = stored(student)

    report = finetune_scales(
        student, teacher, windows, settings=FinetuneSettings(epochs=2, learning_rate=0.5)
    )

    assert report.kept_epoch == 0
    assert min(report.validation_kl_bits) == report.kl_bits_after == report.kl_bits_before
    assert same(stored(student), before)


def test_checkpointing_recomputes_blocks_with_the_same_gradients(student, teacher, windows):
    block = student.model.layers[0]
    layers = layers_to_train(student)
    calls = []
    handle = block.self_attn.register_forward_hook(lambda *_: calls.append(None))
    gradients = []
    with frozen(student, teacher), trainable(student, layers) as replaced:
        for blocks in ([], student.model.layers):
            with checkpointed(blocks):
                training.divergence(student, teacher, windows[0], backward=True)
            factors = [f for layer in replaced.values() for f in layer.factors().values()]
            gradients.append([f.grad for f in factors])
            for factor in factors:
                factor.grad = None
    handle.remove()

    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert "forward" not in block.__dict__


def test_divergence_does_not_depend_on_the_chunk_size(student, teacher, windows, monkeypatch):
    with torch.no_grad():
        whole = training.divergence(student, teacher, windows[0])
        monkeypatch.setattr(training, "SCRATCH_BYTES", 4 * 5 * 320)
        parts = training.divergence(student, teacher, windows[0])
        p, q = (m(windows[0][None]).logits[0].double().softmax(-1) for m in (teacher, student))

    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_a_failure_restores_the_model(student, teacher, windows, tokens, monkeypatch):
    student.model.layers[0].self_attn.train()
    before, expected = stored(student), student(tokens).logits
    grads = [p.requires_grad for p in student.parameters()]

    def fail(*args):
        raise RuntimeError("optimizer failed")

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(RuntimeError, match="optimizer failed"):
        finetune_scales(student, teacher, windows)

    assert same(stored(student), before)
    assert [p.requires_grad for p in student.parameters()] == grads
    assert not student.model.layers[0].training
    assert student.model.layers[0].self_attn.q_proj.training
    assert student.model.layers[0].mlp.up_proj.residency == "dense"
    assert torch.equal(student(tokens).logits, expected)


def test_biases_are_unchanged_and_dropout_is_off(quantize, tmp_path, windows):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt",
        vocab_size=320,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        dropout=0.5,
        attention_dropout=0.5,
    )
    teacher = AutoModelForCausalLM.from_config(config).eval()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher.save_pretrained(tmp_path)
    results = []
    quantized = quantize(tmp_path, samples=1).train()
    for _ in range(2):
        student = copy.deepcopy(quantized)
        finetune_scales(student, teacher, windows, settings=SETTINGS)
        results.append(stored(student))

    layer = student.model.decoder.layers[0].fc1
    assert isinstance(layer, WaterSICLinear)
    assert torch.equal(layer.bias, teacher.model.decoder.layers[0].fc1.bias)
    assert student.training
    assert same(*results)


def test_a_layer_that_no_window_reaches_keeps_its_scales(
    student, teacher, windows, make_layer, tmp_path
):
    spare = make_layer(bias=False)
    before = spare.packed.tensors()
    student.spare = spare

    finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert same(spare.packed.tensors(), before)


def test_unsuitable_models_and_windows_are_refused(student, teacher, windows, make_llama):
    with pytest.raises(ValueError, match="has no layer quantized with WaterSIC"):
        finetune_scales(make_llama(), teacher, windows)
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune_scales(student, student, windows)
    with pytest.raises(ValueError, match=r"at least 2 windows, .* but found 1"):
        finetune_scales(student, teacher, windows[:1])
    with pytest.raises(ValueError, match="a vocabulary of 400 tokens and the model one of 320"):
        finetune_scales(student, make_llama(vocab_size=400), windows)
    broken = make_llama()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="is nan: the logits of one of them are not finite"):
        finetune_scales(student, broken, windows)
    student.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"1 of 7 quantized layers are offloaded \(model\.layers"):
        finetune_scales(student, teacher, windows)
