import copy
import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from watersic_hf import evaluation
from watersic_hf.evaluation import (
    evaluate,
    evaluate_tasks,
    evaluation_windows,
    generation_speed,
)


def windows():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (20,), generator=g) for _ in range(3)]


def test_perplexity_is_the_exponential_of_the_mean_loss(make_llama):
    model = make_llama()

    found = evaluate(model, windows())

    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows()]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert found.tokens == 3 * 19
    assert found.kl_bits is None


def test_a_model_does_not_diverge_from_itself(make_llama):
    model = make_llama()

    found = evaluate(model, windows(), model)

    assert found.kl_bits == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.original_perplexity == found.perplexity


def test_divergence_is_that_of_the_original_from_the_model_in_bits(make_llama):
    model, original = make_llama(), make_llama(num_hidden_layers=1)

    found = evaluate(model, windows()[:1], original)

    with torch.no_grad():
        p = original(windows()[0][None]).logits[0, :-1].double().softmax(-1)
        q = model(windows()[0][None]).logits[0, :-1].double().softmax(-1)
    assert found.kl_bits == pytest.approx(float((p * (p / q).log2()).sum(-1).mean()), rel=1e-3)


def test_all_is_the_same_however_many_rows_are_compared_at_a_time(make_llama, monkeypatch):
    model, original = make_llama(), make_llama(num_hidden_layers=1)
    whole = evaluate(model, windows(), original)

    monkeypatch.setattr(evaluation, "SCRATCH_BYTES", 4 * 320 * 5)

    found = evaluate(model, windows(), original)
    assert asdict(found) == pytest.approx(asdict(whole), rel=1e-5)


def test_evaluation_needs_a_window(make_llama, tokenizer):
    with pytest.raises(ValueError, match="at least one window of two tokens"):
        evaluate(make_llama(), [torch.tensor([3])])
    with pytest.raises(ValueError, match="one window needs 512"):
        evaluation_windows("short", tokenizer, sequence_length=512)


def test_speed_counts_the_new_tokens(make_llama):
    assert generation_speed(make_llama(), torch.tensor([1, 2, 3]), new_tokens=4) > 0


QUESTIONS = [f"The function number {n} returns" for n in range(12)]
CHOICES = ["the name of a file", "an integer", "a list of strings"]


def direct_score(model, tokenizer, context, continuation):
    """Log-likelihood of a continuation, without the harness."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    return float(log_p[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())


def direct_answer(model, tokenizer, context):
    scores = [direct_score(model, tokenizer, context, f" {choice}") for choice in CHOICES]
    return max(range(len(CHOICES)), key=scores.__getitem__)


@pytest.fixture
def dense(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder)


@pytest.fixture
def answers(dense, tokenizer):
    """Right answers by which the dense model knows 8 of 12."""
    known = [direct_answer(dense, tokenizer, question) for question in QUESTIONS]
    return [(answer + (n >= 8)) % len(CHOICES) for n, answer in enumerate(known)]


@pytest.fixture
def quiz(write_task, answers):
    documents = [
        {"question": q, "choices": CHOICES, "answer": a}
        for q, a in zip(QUESTIONS, answers, strict=True)
    ]
    return write_task("quiz", documents)


def test_the_accuracy_at_a_task_is_that_of_the_models_own_likelihoods(
    dense, quantized_folder, tokenizer, answers, quiz
):
    quantized = AutoModelForCausalLM.from_pretrained(quantized_folder)

    found = evaluate_tasks(dense, tokenizer, [quiz])
    found_quantized = evaluate_tasks(quantized, tokenizer, [quiz], batch_size=5)

    deviation = math.sqrt(8 / 12 * 4 / 12 / 11)
    assert found == {"quiz": pytest.approx({"acc": 8 / 12, "acc_stderr": deviation})}
    right = [
        direct_answer(quantized, tokenizer, q) == a for q, a in zip(QUESTIONS, answers, strict=True)
    ]
    assert found_quantized["quiz"]["acc"] == pytest.approx(sum(right) / 12)


#: A task whose documents have one right continuation, judged by its likelihood.
COMPLETION = {
    "output_type": "loglikelihood", "doc_to_target": " an integer", "target_delimiter": "",
    "doc_to_choice": None, "metric_list": [{"metric": "perplexity"}],
}  # fmt: skip


def test_examples_come_before_the_question_and_questions_are_limited(
    dense, tokenizer, write_task, monkeypatch
):
    # otherwise the harness starts a process per core to resample
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    # the random model hardly minds its context
    for layer in dense.model.layers:
        layer.self_attn.o_proj.weight.data *= 100
    task = write_task("completion", [{"question": q} for q in QUESTIONS], **COMPLETION)

    found = evaluate_tasks(dense, tokenizer, [task], few_shot=2, limit=6)

    scores, alone = [], []
    for question in QUESTIONS[:6]:
        # the task's examples are its first documents, but for the one that is asked
        shown = [q for q in QUESTIONS[:3] if q != question][:2]
        context = "".join(f"{q} an integer\n\n" for q in shown) + question
        scores.append(direct_score(dense, tokenizer, context, " an integer"))
        alone.append(direct_score(dense, tokenizer, question, " an integer"))
    perplexity = found["completion"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(-sum(scores) / 6), rel=1e-4)
    assert perplexity != pytest.approx(math.exp(-sum(alone) / 6), rel=1e-2)


def test_a_folder_stands_for_all_its_tasks(dense, tokenizer, write_task, monkeypatch, capsys):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    documents = [{"question": q} for q in QUESTIONS]
    folder = write_task("first", documents, **COMPLETION).parent
    write_task("second", documents[:4], **COMPLETION)
    before = copy.deepcopy(tokenizer.special_tokens_map)

    found = evaluate_tasks(dense, tokenizer, [folder])

    assert sorted(found) == ["first", "second"]
    for name, questions in (("first", QUESTIONS), ("second", QUESTIONS[:4])):
        scores = [direct_score(dense, tokenizer, q, " an integer") for q in questions]
        assert found[name]["perplexity"] == pytest.approx(
            math.exp(-sum(scores) / len(scores)), rel=1e-4
        )
        assert found[name]["perplexity_stderr"] > 0
    assert tokenizer.special_tokens_map == before
    assert capsys.readouterr().out == ""


def test_a_task_that_does_not_exist_is_refused(dense, tokenizer, tmp_path, monkeypatch):
    from lm_eval import tasks

    manager = tasks.TaskManager
    # without the built-in tasks, which take ten seconds to read
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False)
    )
    (tmp_path / "other.yaml").write_text("colour: red\n")
    (tmp_path / "empty").mkdir()

    for names, message in (
        (["hellawsag", "mmul"], "hellawsag, mmul: neither a task of lm-eval nor a file"),
        ([tmp_path / "other.yaml"], "other.yaml: Unknown config shape"),
        ([tmp_path / "empty"], "empty holds no task file"),
        ([], "tasks is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(dense, tokenizer, names)


def test_tasks_and_settings_that_would_be_dropped_are_refused(
    dense, tokenizer, write_task, quiz, tmp_path
):
    (tmp_path / "twin.yaml").write_text(quiz.read_text())
    fixed = write_task("fixed", json.loads(quiz.with_suffix(".json").read_text()), num_fewshot=0)

    for names, settings, message in (
        ([quiz, tmp_path / "twin.yaml"], {}, "quiz is the name of another task"),
        ([fixed], {"few_shot": 1}, "fixed allows no examples"),
        ([quiz], {"limit": 0}, "limit 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(dense, tokenizer, names, **settings)


def test_tasks_name_the_package_that_they_need(dense, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    with pytest.raises(ImportError, match=r'pip install "watersic-hf\[eval\]"'):
        evaluate_tasks(dense, tokenizer, ["hellaswag"])
