"""Evaluate a model on tasks of lm-evaluation-harness."""

import contextlib
import copy
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


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

    A task of your own is a YAML file in the harness's format.  With ``dataset_path: json`` and
    ``dataset_kwargs: {data_files: FILE}`` its data come from a local file, relative to the working
    directory, and no network access is needed.

    The harness seeds the random number generators of Python, NumPy and PyTorch, and puts the model
    in evaluation mode.

    Args:
        model: the model to evaluate, quantized or not.
        tokenizer: its tokenizer; it is not modified.
        tasks: names that the harness knows ("hellaswag", "mmlu"), task files, and folders, which
            stand for every ``*.yaml`` file in them.  An existing path is never taken for a name.
        few_shot: number of solved examples before every question, which overrides the number that
            the task specifies (default: 0).
        limit: evaluate only the first `limit` questions of every task (default: all).
        batch_size: number of sequences per batch (default: 1).

    Returns:
        Task or group -> metric -> value.  Standard errors are metrics named ``acc_stderr``, where
        the harness can estimate them; a filter of the answers is part of the name, as in
        ``exact_match,strict-match``.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task does not exist, two tasks have the same name, or `few_shot` is positive
            and a task allows no examples.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError('tasks need `pip install "watersic-hf[eval]"`') from error
    if few_shot < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"few_shot is {few_shot}, limit is {limit} and batch_size is {batch_size}, but "
            "few_shot must be at least 0, and the others at least 1"
        )
    # the harness prints to stdout, which is reserved for results
    with contextlib.redirect_stdout(sys.stderr):
        manager, loaded = _load_tasks(tasks, few_shot)
        found = simple_evaluate(
            # the harness adds a padding token to the tokenizer that it is given
            HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=loaded,
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    return {name: _task_metrics(values) for name, values in found["results"].items()}


def _load_tasks(tasks: Sequence[str | os.PathLike], few_shot: int) -> tuple[Any, list]:
    """Return the harness's task manager, and the tasks and outermost groups that `tasks` name."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    specs = [spec for task in tasks for spec in _task_files(task)]
    names = {spec for spec in specs if not Path(spec).is_file()}
    if not specs:
        raise ValueError("tasks is empty; name at least one task")
    # reading the more than ten thousand built-in files takes ten seconds
    manager = TaskManager(include_defaults=bool(names))
    if unknown := sorted(names.difference(manager.all_tasks)):
        raise ValueError(
            f"{', '.join(unknown)}: neither a task of lm-eval nor a file; run `lm-eval ls tasks` "
            "for a list of the tasks"
        )
    # some tasks shuffle their answers while they load; the harness also seeds before loading
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    found, groups, inside = {}, {}, set()
    for spec in specs:
        try:
            loaded = manager.load([spec])
        except (KeyError, ValueError) as error:
            raise ValueError(f"task {spec}: {error}") from error
        if twice := sorted(found.keys() & loaded["tasks"].keys()):
            raise ValueError(
                f"task {spec}: {', '.join(twice)} is also the name of another task; give every "
                "task a name of its own"
            )
        found |= loaded["tasks"]
        groups |= loaded["groups"]
        inside.update(*loaded["group_map"].values())
    # where a task fixes the number at 0, the harness would silently leave the examples out
    fixed = [name for name, task in found.items() if task.get_config("num_fewshot") == 0]
    if few_shot and fixed:
        raise ValueError(
            f"few_shot is {few_shot}, but {', '.join(fixed)} allows no examples; evaluate it "
            "separately with few_shot=0"
        )
    return manager, [item for name, item in (found | groups).items() if name not in inside]


def _task_files(task: str | os.PathLike) -> list[str]:
    """Return the task files of a folder; anything else is returned unchanged."""
    if not Path(task).is_dir():
        return [os.fspath(task)]
    files = sorted(Path(task).rglob("*.yaml"))
    if not files:
        raise ValueError(f"the folder {os.fspath(task)} contains no task file (*.yaml)")
    return [os.fspath(file) for file in files]


def _task_metrics(values: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of what the harness reports for a task; its keys are "metric,filter"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }
