import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from watersic_hf import CheckpointError, WaterSICLinear, codec, finetuning
from watersic_hf.calibration import calibration_windows
from watersic_hf.checkpoint import pack_layer, rescale_layer
from watersic_hf.finetuning import FinetuneSettings, finetune_scales
from watersic_hf.testing import assert_close

#: Of ten windows nine are trained on: two epochs of three steps.
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


def make_layer(*, bias, rows=24, columns=16):
    g = torch.Generator().manual_seed(0)
    codes = (torch.randn(rows, columns, generator=g) * 3).round().to(torch.int8)
    col_scale = torch.rand(columns, generator=g) + 0.1
    # a dead column
    col_scale[3] = 0
    packed = pack_layer(codes, torch.rand(rows, generator=g) + 0.5, col_scale, name="l")
    values = 10 * torch.randn(rows, generator=g) if bias else None
    return WaterSICLinear.from_packed(packed, bias=values, dtype=torch.float32)


def trainable_layer(*, bias):
    """A trainable layer whose factors are not one, and the layer that it stands in for."""
    layer = make_layer(bias=bias)
    trainable = finetuning._TrainableLinear(layer)
    with torch.no_grad():
        for factor in trainable.factors().values():
            factor += 0.1 * torch.randn(factor.shape)
    return trainable, layer


# the scales are rounded to 11 bits in the layer and not in the reference; so are, to 8 bits, the
# weight, the inputs and the output in bfloat16
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_product(bias, dtype, tolerance):
    trainable, _ = trainable_layer(bias=bias)
    trainable.compute_dtype = dtype
    x = torch.randn(2, 7, 16, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(2, 7, 24, dtype=dtype)

    trainable(x).backward(grad_y)

    row, col, x64 = (
        t.detach().double().requires_grad_() for t in (*trainable.factors().values(), x)
    )
    row_scale, col_scale = trainable.row_scale.double() * row, trainable.col_scale.double() * col
    y = x64 @ (row_scale[:, None] * trainable.codes * col_scale).T
    y.backward(grad_y.double())
    assert_close(x.grad, x64.grad, tolerance=tolerance)
    assert_close(trainable.row_factor.grad, row.grad, tolerance=tolerance)
    assert_close(trainable.col_factor.grad, col.grad, tolerance=tolerance)
    assert trainable.col_factor.grad[3] == 0


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(bias):
    trainable, _ = trainable_layer(bias=bias)
    x = torch.randn(7, 16)
    gradients = []
    for clamp in (torch.clamp, torch.clamp_):
        trainable.zero_grad()
        clamp(trainable(x), -1, 1).sum().backward()
        gradients.append([factor.grad for factor in trainable.factors().values()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainable_layer_computes_what_the_stored_one_will(bias, dtype):
    trainable, layer = trainable_layer(bias=bias)
    trainable.compute_dtype = dtype
    x = torch.randn(5, 16, dtype=dtype)

    found = trainable(x)
    scales = trainable.scales(trainable.row_factor.detach(), trainable.col_factor.detach())
    packed = rescale_layer(layer.packed, *scales, name="l")
    again = WaterSICLinear.from_packed(packed, dtype=dtype)
    again.set_residency("dense")
    expected = again(x) if layer.bias is None else again(x) + layer.bias.to(dtype)
    assert torch.equal(found, expected)


def test_finetuning_brings_the_model_nearer_to_the_teacher(student, teacher, windows):
    report = finetune_scales(student, teacher, windows, settings=SETTINGS)

    assert report.layers == 7
    assert report.tokens == sum(len(window) for window in windows[:-1])
    assert report.kept_epoch == 2
    assert report.kl_bits_after < 0.8 * report.kl_bits_before
    assert report.train_kl_bits[1] < report.train_kl_bits[0]
    # what is reported is the divergence of what is stored
    assert report.kl_bits_after == finetuning._mean_divergence(student, teacher, windows[-1:])


def test_only_scales_and_their_checksum_change(student, teacher, windows, packed_names):
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


def test_the_result_is_saved_reloaded_and_generates(student, teacher, windows, tokens, tmp_path):
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


def test_a_text_that_was_calibrated_on_gives_other_windows(
    quantized_folder, llama_folder, tmp_path, monkeypatch
):
    drawn = []

    def look(model, teacher, windows, **options):
        drawn.append(windows)
        raise InterruptedError

    monkeypatch.setattr(finetuning, "finetune_scales", look)
    config = AutoConfig.from_pretrained(quantized_folder).quantization_config
    with pytest.raises(InterruptedError):
        finetuning.finetune_to_folder(
            str(quantized_folder), tmp_path / "o", str(llama_folder),
            samples=config["samples"], sequence_length=config["sequence_length"],
        )  # fmt: skip
    calibrated = calibration_windows(
        "pydoc", tokenizer=AutoTokenizer.from_pretrained(quantized_folder),
        samples=config["samples"], sequence_length=config["sequence_length"], seed=config["seed"],
    )  # fmt: skip
    known, others = ({tuple(w.tolist()) for w in windows} for windows in (calibrated, drawn[0]))

    assert len(others) == len(known) == 4
    assert others.isdisjoint(known)


@pytest.mark.parametrize(("save_every", "writes"), [(32, 1), (1, 2), (1, 4)])
def test_an_interrupted_run_ends_as_one_that_was_not(
    make_student, teacher, windows, tmp_path, monkeypatch, save_every, writes
):
    uninterrupted = make_student()
    expected = finetune_scales(uninterrupted, teacher, windows, settings=SETTINGS)
    monkeypatch.setattr(finetuning, "SAVE_EVERY", save_every)
    count = itertools.count(1)
    write = finetuning._Run._write

    def interrupted_write(run):
        write(run)
        if next(count) == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetuning._Run, "_write", interrupted_write)
    student = make_student()
    before = stored(student)
    with pytest.raises(KeyboardInterrupt):
        finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    assert same(stored(student), before)

    report = finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert same(stored(student), stored(uninterrupted))
    assert report.train_kl_bits == expected.train_kl_bits
    assert report.validation_kl_bits == expected.validation_kl_bits
    assert [file.name for file in tmp_path.iterdir()] == [finetuning.STATE_FILE]


def test_a_finished_run_is_not_done_again(make_student, teacher, windows, tmp_path):
    first = make_student()
    expected = finetune_scales(first, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    student = make_student()

    report = finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert report == expected
    assert same(stored(student), stored(first))


def test_a_state_of_another_run_is_refused(
    make_student, student, teacher, windows, tmp_path, make_llama
):
    finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)
    again = make_student()

    def go(model, teacher, windows, settings=SETTINGS):
        finetune_scales(model, teacher, windows, settings=settings, resume_folder=tmp_path)

    with pytest.raises(CheckpointError, match=r"with other settings \(.*\), and cannot be resumed"):
        go(again, teacher, windows, FinetuneSettings(epochs=3))
    with pytest.raises(CheckpointError, match="with other windows"):
        go(again, teacher, windows[1:])
    # this one has been finetuned already
    with pytest.raises(CheckpointError, match="with other model"):
        go(student, teacher, windows)
    with pytest.raises(CheckpointError, match="with other teacher and windows"):
        go(again, make_llama(), windows[1:])


def test_no_finetuning_is_better_than_one_that_does_harm(student, teacher, windows):
    before = stored(student)

    report = finetune_scales(
        student, teacher, windows, settings=FinetuneSettings(epochs=2, learning_rate=0.5)
    )

    assert report.kept_epoch == 0
    assert min(report.validation_kl_bits) == report.kl_bits_after == report.kl_bits_before
    assert same(stored(student), before)


def test_blocks_are_computed_again_and_gradients_stay_the_same(student, teacher, windows):
    block = student.model.layers[0]
    layers = finetuning._layers_to_train(student, teacher)
    calls = []
    handle = block.self_attn.register_forward_hook(lambda *_: calls.append(None))
    gradients = []
    with finetuning._frozen(student, teacher), finetuning._trainable(student, layers) as trainable:
        for blocks in ([], student.model.layers):
            with finetuning._checkpointed(blocks):
                finetuning._divergence(student, teacher, windows[0], backward=True)
            factors = [f for layer in trainable.values() for f in layer.factors().values()]
            gradients.append([f.grad for f in factors])
            for factor in factors:
                factor.grad = None
    handle.remove()

    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert "forward" not in block.__dict__


def test_the_divergence_does_not_depend_on_how_many_tokens_are_compared_at_a_time(
    student, teacher, windows, monkeypatch
):
    with torch.no_grad():
        whole = finetuning._divergence(student, teacher, windows[0])
        monkeypatch.setattr(finetuning, "_CHUNK_LOGITS", 5 * 320)
        parts = finetuning._divergence(student, teacher, windows[0])
        p, q = (m(windows[0][None]).logits[0].double().softmax(-1) for m in (teacher, student))

    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_a_failure_leaves_the_model_as_it_was(student, teacher, windows, tokens, monkeypatch):
    student.model.layers[0].self_attn.train()
    before, expected = stored(student), student(tokens).logits
    grads = [p.requires_grad for p in student.parameters()]

    def fail(*args):
        raise RuntimeError("no optimizer today")

    monkeypatch.setattr(torch.optim.Adam, "step", fail)
    with pytest.raises(RuntimeError, match="no optimizer today"):
        finetune_scales(student, teacher, windows)

    assert same(stored(student), before)
    assert [p.requires_grad for p in student.parameters()] == grads
    assert not student.model.layers[0].training
    assert student.model.layers[0].self_attn.q_proj.training
    assert student.model.layers[0].mlp.up_proj.residency == "dense"
    assert torch.equal(student(tokens).logits, expected)


def test_biases_stay_and_dropout_is_off(quantize, tmp_path, windows):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "opt", vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=1,
        num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.5,
        attention_dropout=0.5,
    )  # fmt: skip
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


def test_a_layer_that_no_window_reaches_keeps_its_scales(student, teacher, windows, tmp_path):
    spare = make_layer(bias=False)
    before = spare.packed.tensors()
    student.spare = spare

    finetune_scales(student, teacher, windows, settings=SETTINGS, resume_folder=tmp_path)

    assert same(spare.packed.tensors(), before)


def test_what_cannot_be_finetuned_is_refused(student, teacher, windows, make_llama):
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


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"clip": -1.0},
        {"final_learning_rate": 1.0},
        {"validation_share": 0.0},
        {"validation_share": 0.9},
    ],
)
def test_settings_out_of_range_are_named(changes):
    (name,) = changes

    with pytest.raises(ValueError, match=f"^{name} is "):
        FinetuneSettings(**changes)


def test_the_learning_rate_falls_from_the_first_to_the_final():
    settings = FinetuneSettings(learning_rate=1e-3, final_learning_rate=1e-4)

    rates = [settings.rate_at(step, 11) for step in range(12)]

    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)
    assert FinetuneSettings(learning_rate=1e-3).rate_at(7, 7) == pytest.approx(1e-5)
