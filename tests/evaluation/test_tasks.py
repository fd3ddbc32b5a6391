import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from watersic_hf.evaluation import evaluate_tasks

QUESTIONS = [f"The function number {n} returns" for n in range(12)]
CHOICES = ["the name of a file", "an integer", "a list of strings"]


def direct_score(model, tokenizer, context, continuation):
    """Return the log-likelihood of a continuation, computed without the harness."""
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
    """Return correct answers such that the dense model gets 8 of 12 right."""
    known = [direct_answer(dense, tokenizer, question) for question in QUESTIONS]
    return [(answer + (n >= 8)) % len(CHOICES) for n, answer in enumerate(known)]


@pytest.fixture
def quiz(write_task, answers):
    documents = [
        {"question": q, "choices": CHOICES, "answer": a}
        for q, a in zip(QUESTIONS, answers, strict=True)
    ]
    return write_task("quiz", documents)


def test_task_accuracy_matches_directly_computed_likelihoods(
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


#: Changes that make a task with a single continuation, scored by its likelihood.
COMPLETION = {
    "output_type": "loglikelihood",
    "doc_to_target": " an integer",
    "target_delimiter": "",
    "doc_to_choice": None,
    "metric_list": [{"metric": "perplexity"}],
}


def test_few_shot_examples_precede_the_question_and_limit_bounds_the_questions(
    dense, tokenizer, write_task, monkeypatch
):
    # otherwise the harness starts one process per core for bootstrapping
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    # without this, the context hardly changes the predictions of the random model
    for layer in dense.model.layers:
        layer.self_attn.o_proj.weight.data *= 100
    task = write_task("completion", [{"question": q} for q in QUESTIONS], **COMPLETION)

    found = evaluate_tasks(dense, tokenizer, [task], few_shot=2, limit=6)

    scores, alone = [], []
    for question in QUESTIONS[:6]:
        # the examples are the first documents of the task, without the question itself
        shown = [q for q in QUESTIONS[:3] if q != question][:2]
        context = "".join(f"{q} an integer\n\n" for q in shown) + question
        scores.append(direct_score(dense, tokenizer, context, " an integer"))
        alone.append(direct_score(dense, tokenizer, question, " an integer"))
    perplexity = found["completion"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(-sum(scores) / 6), rel=1e-4)
    assert perplexity != pytest.approx(math.exp(-sum(alone) / 6), rel=1e-2)


def test_a_folder_stands_for_all_tasks_in_it(dense, tokenizer, write_task, monkeypatch, capsys):
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


def test_unknown_tasks_are_refused(dense, tokenizer, tmp_path, monkeypatch):
    from lm_eval import tasks

    manager = tasks.TaskManager
    # skip the built-in tasks, which take ten seconds to read
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False)
    )
    (tmp_path / "other.yaml").write_text("colour: red\n")
    (tmp_path / "empty").mkdir()

    for names, message in (
        (["hellawsag", "mmul"], "hellawsag, mmul: neither a task of lm-eval nor a file"),
        ([tmp_path / "other.yaml"], "other.yaml: Unknown config shape"),
        ([tmp_path / "empty"], "empty contains no task file"),
        ([], "tasks is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(dense, tokenizer, names)


def test_settings_that_the_harness_would_ignore_are_refused(
    dense, tokenizer, write_task, quiz, tmp_path
):
    (tmp_path / "twin.yaml").write_text(quiz.read_text())
    fixed = write_task("fixed", json.loads(quiz.with_suffix(".json").read_text()), num_fewshot=0)

    for names, settings, message in (
        ([quiz, tmp_path / "twin.yaml"], {}, "quiz is also the name of another task"),
        ([fixed], {"few_shot": 1}, "fixed allows no examples"),
        ([quiz], {"limit": 0}, "limit is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(dense, tokenizer, names, **settings)


def test_tasks_without_lm_eval_name_the_missing_package(dense, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    with pytest.raises(ImportError, match=r'pip install "watersic-hf\[eval\]"'):
        evaluate_tasks(dense, tokenizer, ["hellaswag"])


def test_the_harness_itself_runs_in_a_process_that_knows_the_format(
    quantized_folder, quiz, tmp_path
):
    command = [sys.executable, "-m", "watersic_hf.cli", "run", "lm_eval", "--model", "hf"]
    options = ["--model_args", f"pretrained={quantized_folder}", "--device", "cpu"]
    options += ["--tasks", str(quiz), "--output_path", str(tmp_path / "results.json")]

    done = subprocess.run([*command, *options], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("results*.json")
    assert "quiz" in json.loads(file.read_text())["results"]
