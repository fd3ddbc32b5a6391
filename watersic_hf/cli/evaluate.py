"""``watersic eval``: perplexity, divergence from the original, tasks and speed of a model."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import model_size
from watersic_hf.cli.options import (
    add_source_options,
    given_options,
    model_name,
    source_options,
)
from watersic_hf.cli.output import print_json, print_table

_NEW_TOKENS = 40


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "eval", parents=[common], help="measure perplexity, KL divergence, tasks and speed"
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", type=model_name, help="folder or Hub name of the model")
    parser.add_argument(
        "--against",
        type=model_name,
        metavar="ORIGINAL",
        help="folder or Hub name of a model to compare with",
    )
    parser.add_argument(
        "--text",
        help="text file (default: topics of Python's documentation that pydoc calibration omits)",
    )
    parser.add_argument(
        "--sequence-length", type=int, default=512, help="tokens per window (default: 512)"
    )
    parser.add_argument("--windows", type=int, help="maximum number of windows (default: all)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME_OR_YAML",
        help="tasks of lm-evaluation-harness: names, task files, or folders of task files",
    )
    parser.add_argument(
        "--few-shot", type=int, help="solved examples before each question of a task (default: 0)"
    )
    parser.add_argument(
        "--limit", type=int, help="maximum number of questions per task (default: all)"
    )
    parser.add_argument("--batch-size", type=int, help="sequences per batch of a task (default: 1)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="dtype of the models (default: their own; float32 instead of half precision on CPUs "
        "that are slow in it)",
    )
    parser.add_argument("--device-map", help="device map of the models, as in from_pretrained")
    add_source_options(parser)
    parser.add_argument("--prompt", help="also print a greedy continuation of this text")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the model and print the results."""
    result = _evaluate(arguments)
    if arguments.json:
        print_json(result)
        return
    print_table(("", arguments.model), _rows(result))
    names = {"original_tasks": arguments.against, "tasks": arguments.model}
    task_results = [(name, result[key]) for key, name in names.items() if key in result]
    if task_results:
        print()
        _print_tasks(task_results)
    if arguments.prompt:
        print(f"\n{result['text']}")


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results, as ``--json`` prints them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from watersic_hf.evaluation import (
        evaluate,
        evaluate_tasks,
        evaluation_text,
        evaluation_windows,
        generation_speed,
    )
    from watersic_hf.integration import ModelSource
    from watersic_hf.streams.precision import in_fast_dtype

    def load(source: Any) -> Any:
        options = {"dtype": arguments.dtype, "device_map": arguments.device_map}
        model = AutoModelForCausalLM.from_pretrained(
            source.name, **source.options, **options
        ).eval()
        chosen = arguments.dtype != "auto" or arguments.device_map
        return model if chosen else in_fast_dtype(model)

    task_options = given_options(arguments, "few_shot", "limit", "batch_size")
    if task_options and not arguments.tasks:
        raise ValueError("--few-shot, --limit and --batch-size require --tasks")
    source = ModelSource(name=arguments.model, **source_options(arguments))
    tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options)
    windows = evaluation_windows(
        evaluation_text(arguments.text),
        tokenizer,
        sequence_length=arguments.sequence_length,
        limit=arguments.windows,
    )
    models = {"tasks": load(source)}
    if arguments.against:
        original = ModelSource(
            name=arguments.against, trust_remote_code=arguments.trust_remote_code
        )
        models["original_tasks"] = load(original)
    model, original = models["tasks"], models.get("original_tasks")
    task_results = {}
    if arguments.tasks:
        # before the perplexity, so that a misspelt name is reported at once
        task_results = {
            key: evaluate_tasks(each, tokenizer, arguments.tasks, **task_options)
            for key, each in models.items()
        }
    result = asdict(evaluate(model, windows, original)) | task_results
    # the files of a model on the Hub are not at hand
    is_local = Path(arguments.model).is_dir()
    result["model_bits"] = model_size(source.folder()).bits if is_local else None
    for key, each in models.items():
        prefix = "original_" if key == "original_tasks" else ""
        speed = asdict(generation_speed(each, windows[0][:32]))
        result |= {f"{prefix}{name}": value for name, value in speed.items()}
    result["residency"] = _residency(model)
    if arguments.prompt:
        prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)
        result["text"] = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return result


def _rows(result: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "windows", result["windows"]
    yield "predicted tokens", result["tokens"]
    if result["model_bits"] is not None:
        yield "bits per parameter, whole model", f"{result['model_bits']:.4f}"
    if result["original_perplexity"] is not None:
        yield "perplexity, original", f"{result['original_perplexity']:.4f}"
        yield "KL to the original, bits per token", f"{result['kl_bits']:.5f}"
        yield "top-1 agreement", f"{result['top1_agreement']:.2%}"
    yield "perplexity", f"{result['perplexity']:.4f}"
    if result["residency"]:
        yield "form of the weights in memory", result["residency"]
    for prefix, suffix in (("original_", ", original"), ("", "")):
        if f"{prefix}memory_bytes" in result:
            memory = result[f"{prefix}memory_bytes"]
            yield f"memory of the weights{suffix}", f"{memory / 1e9:.2f} GB"
            first = result[f"{prefix}first_token_seconds"]
            yield f"time to the first of 64 tokens{suffix}", f"{first:.2f} s"
            rate = result[f"{prefix}tokens_per_second"]
            yield f"tokens per second after that{suffix}", f"{rate:.1f}"


def _residency(model: Any) -> str:
    """Return the residencies of the quantized layers of a model; empty if it has none."""
    from watersic_hf.nn import PackedMatrix

    found = {m.residency for m in model.modules() if isinstance(m, PackedMatrix)}
    return ", ".join(sorted(found))


def _print_tasks(models: Sequence[tuple[str, dict[str, dict[str, float]]]]) -> None:
    """Print a row per task and metric and a column per model, with standard errors if known."""

    def cell(metrics: dict[str, float], metric: str) -> str:
        name, comma, answer_filter = metric.partition(",")
        error = metrics.get(f"{name}_stderr{comma}{answer_filter}")
        return f"{metrics[metric]:.4f}" + ("" if error is None else f" +- {error:.4f}")

    rows = [
        (f"{task}, {metric}", *(cell(found[task], metric) for _, found in models))
        for task, metrics in models[0][1].items()
        for metric in metrics
        if "_stderr" not in metric
    ]
    print_table(("task, metric", *(name for name, _ in models)), rows)
