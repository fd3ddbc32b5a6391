"""How good a quantized model is: perplexity, divergence from the original, tasks, speed."""

import contextlib
import copy
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from watersic_hf.calibration import pydoc_texts, text_windows

#: Bytes of float32 log-probabilities of one model that are compared at a time.
SCRATCH_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Averages over all predicted tokens of the evaluation windows."""

    windows: int
    tokens: int
    """Predicted tokens: all but the first of every window."""
    perplexity: float
    original_perplexity: float | None = None
    """Of the original; None without one."""
    kl_bits: float | None = None
    """KL(original || model) in bits per token; None without an original."""
    top1_agreement: float | None = None
    """Share of tokens at which both models' most likely token is the same."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, windows: Sequence[Tensor], original: torch.nn.Module | None = None
) -> Evaluation:
    """Evaluate a causal language model on windows of tokens.

    Logits are compared in float32; windows do not overlap, and see no context but their own.

    Args:
        model: the model to judge.
        windows: 1-D token ids, at least two each; text that no calibration has seen.
        original: the model to compare with, over the same vocabulary.

    Raises:
        ValueError: no window has two tokens.
    """
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ValueError("evaluation needs at least one window of two tokens or more")
    loss = original_loss = divergence = 0.0
    agreed = tokens = 0
    for window in tqdm(windows, desc="Evaluating", delay=3, leave=False):
        tokens += len(window) - 1
        logits = [_logits(m, window).to(model.device) for m in (model, original) if m is not None]
        # few rows at a time, which stay in a CPU's cache: a vocabulary can have 262,144 entries
        rows = max(1, SCRATCH_BYTES // (4 * logits[0].shape[-1]))
        parts = zip(*(part.split(rows) for part in logits), strict=True)
        for target_t, part in zip(window[1:].to(model.device).split(rows), parts, strict=True):
            log_p, *others = (F.log_softmax(logits_tV.float(), dim=-1) for logits_tV in part)
            loss += float(F.nll_loss(log_p, target_t, reduction="sum"))
            for log_q in others:
                original_loss += float(F.nll_loss(log_q, target_t, reduction="sum"))
                divergence += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
                agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    compared = original is not None
    return Evaluation(
        windows=len(windows),
        tokens=tokens,
        perplexity=math.exp(loss / tokens),
        original_perplexity=math.exp(original_loss / tokens) if compared else None,
        kl_bits=divergence / tokens / math.log(2) if compared else None,
        top1_agreement=agreed / tokens if compared else None,
    )


def evaluate_tasks(
    model: torch.nn.Module,
    tokenizer: object,
    tasks: Sequence[str | os.PathLike],
    *,
    few_shot: int = 0,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:
    """Evaluate a causal language model on tasks of lm-evaluation-harness.

    A task that is not built in is a YAML file in the harness's format.  With ``dataset_path: json``
    and ``dataset_kwargs: {data_files: FILE}`` its data are a local file, relative to the working
    directory, and no network is needed.

    The harness seeds the generators of Python, NumPy and PyTorch, and puts the model in evaluation
    mode.

    Args:
        model: the model to judge, quantized or not.
        tokenizer: its tokenizer; stays as it is.
        tasks: names that the harness knows ("hellaswag", "mmlu"), task files, and folders, which
            stand for every ``*.yaml`` in them.  What exists as a path is not read as a name.
        few_shot: solved examples before every question, whatever number the task itself names.
        limit: use only so many of a task's first questions.
        batch_size: sequences at a time.

    Returns:
        Task or group -> metric -> value.  Standard errors are metrics named ``acc_stderr``, where
        the harness can estimate them; a filter of the answers is named as in
        ``exact_match,strict-match``.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such task, two have one name, or one allows no examples.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError('tasks need `pip install "watersic-hf[eval]"`') from error
    if few_shot < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"few_shot is {few_shot}, limit {limit}, batch_size {batch_size}, but the first must "
            "be at least 0 and the others at least 1"
        )
    # the harness prints to standard output, which is for results
    with contextlib.redirect_stdout(sys.stderr):
        manager, loaded = _load_tasks(tasks, few_shot)
        found = simple_evaluate(
            # the harness adds a padding token to the tokenizer it is given
            HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=loaded,
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    return {name: _task_metrics(values) for name, values in found["results"].items()}


@torch.no_grad()
def generation_speed(model: torch.nn.Module, prompt_T: Tensor, *, new_tokens: int = 64) -> float:
    """Tokens per second of greedy generation for one sequence, after one token of warm-up."""
    prompt = prompt_T[None].to(model.device)
    settings = {
        "attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    model.generate(prompt, max_new_tokens=1, **settings)
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)
    seconds = time.perf_counter() - start
    return (out.shape[1] - prompt.shape[1]) / seconds


def evaluation_text(file: str | os.PathLike | None = None) -> str:
    """The text of a file, or the topics of Python's documentation that no calibration uses.

    Raises:
        ValueError: there is no such file.
    """
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"the text file {file} does not exist")
        return Path(file).read_text(encoding="utf-8")
    return "\n\n".join(pydoc_texts(held_out=True))


def evaluation_windows(
    text: str, tokenizer: object, *, sequence_length: int, limit: int | None = None
) -> list[Tensor]:
    """The first windows of a text; see `watersic_hf.calibration.data.text_windows`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    windows = text_windows(text, tokenizer, sequence_length)
    if len(windows[0]) < sequence_length:
        raise ValueError(
            f"the evaluation text has {len(windows[0])} tokens, but one window needs "
            f"{sequence_length}"
        )
    return windows[:limit]


def _logits(model: torch.nn.Module, window_T: Tensor) -> Tensor:
    """Logits of tokens 1.. given those before, T - 1 x V, in the dtype of the model."""
    return model(input_ids=window_T[None].to(model.device), use_cache=False).logits[0, :-1]


def _load_tasks(tasks: Sequence[str | os.PathLike], few_shot: int) -> tuple[Any, list]:
    """The harness's task manager, and the tasks and outermost groups that `tasks` stand for."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    specs = [spec for task in tasks for spec in _task_files(task)]
    names = {spec for spec in specs if not Path(spec).is_file()}
    if not specs:
        raise ValueError("tasks is empty; name at least one task")
    # more than ten thousand built-in files: reading them takes ten seconds
    manager = TaskManager(include_defaults=bool(names))
    if unknown := sorted(names.difference(manager.all_tasks)):
        raise ValueError(
            f"{', '.join(unknown)}: neither a task of lm-eval nor a file; `lm-eval ls tasks` "
            "prints the names"
        )
    # some tasks shuffle their answers while they load; the harness seeds before it loads, too
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    found, groups, inside = {}, {}, set()
    for spec in specs:
        try:
            loaded = manager.load([spec])
        except (KeyError, ValueError) as error:
            raise ValueError(f"task {spec}: {error}") from error
        if twice := sorted(found.keys() & loaded["tasks"].keys()):
            raise ValueError(f"task {spec}: {', '.join(twice)} is the name of another task, too")
        found |= loaded["tasks"]
        groups |= loaded["groups"]
        inside.update(*loaded["group_map"].values())
    # the harness would go on without examples where a task says so
    fixed = [name for name, task in found.items() if task.get_config("num_fewshot") == 0]
    if few_shot and fixed:
        raise ValueError(
            f"few_shot is {few_shot}, but {', '.join(fixed)} allows no examples; evaluate it apart"
        )
    return manager, [item for name, item in (found | groups).items() if name not in inside]


def _task_files(task: str | os.PathLike) -> list[str]:
    """The task files of a folder; anything else is returned as it is."""
    if not Path(task).is_dir():
        return [os.fspath(task)]
    files = sorted(Path(task).rglob("*.yaml"))
    if not files:
        raise ValueError(f"the folder {os.fspath(task)} holds no task file (*.yaml)")
    return [os.fspath(file) for file in files]


def _task_metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among what the harness reports of a task, whose keys are "metric,filter"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }
