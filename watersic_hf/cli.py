"""The command line: ``watersic quantize | finetune | eval | inspect | diff | verify | demo``."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import (
    compare_checkpoints,
    experts_together,
    inspect_checkpoint,
    model_size,
    verify_checkpoint,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors are one line on standard error unless ``--debug`` is given.

    Returns:
        The exit status: 0, 1 after an error, 2 for bad arguments.
    """
    arguments = _parser().parse_args(argv)
    # torch on Linux: huge pages for large tensors; a sixth of a run is page faults otherwise
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("watersic: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # nobody reads on, as after `| head`; without this, Python's end would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK")
        who = "watersic" if rank is None else f"watersic, process {rank}"
        print(f"{who}: error: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="watersic", description="WaterSIC weight quantization.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", parents=[common], help="quantize a model")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", type=_model, help="folder or hub name of a model")
    quantize.add_argument("out", help="folder to save to")
    quantize.add_argument("--bits", type=float, default=3.0, help="stored bits per weight (3.0)")
    quantize.add_argument(
        "--dataset",
        default="pydoc",
        help="calibration set: self, pydoc, wikitext2, c4, a file, a hub name, or none (pydoc)",
    )
    quantize.add_argument("--tokenizer", type=_model, help="folder or hub name (the model's own)")
    quantize.add_argument("--samples", type=int, default=128, help="calibration windows (128)")
    quantize.add_argument("--sequence-length", type=int, default=2048, help="their tokens (2048)")
    quantize.add_argument("--batch-size", type=int, default=8, help="windows at a time (8)")
    quantize.add_argument(
        "--layer-bits",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="bits for the layers that a pattern selects; may be repeated",
    )
    quantize.add_argument(
        "--skip", action="append", metavar="PATTERN", help="layers to leave dense; may be repeated"
    )
    quantize.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of WaterSICConfig, its value in JSON: drift=0, mixing=true; may be "
        "repeated",
    )
    quantize.add_argument("--seed", type=int, default=0)
    quantize.add_argument("--dtype", default="auto", help="of the dense rest (the model's own)")
    quantize.add_argument("--device-map", help="device to compute on (a GPU if there is one)")
    quantize.add_argument("--max-shard-size", default="5GB")
    quantize.add_argument(
        "--dry-run",
        action="store_true",
        help="print what it would take: memory, disk, hours; only config.json of the model is read",
    )
    quantize.add_argument(
        "--processes", type=int, default=1, help="that share the work, for --dry-run (1)"
    )

    finetune = commands.add_parser(
        "finetune", parents=[common], help="train the scales of a quantized model; same bits"
    )
    finetune.set_defaults(run=_finetune)
    finetune.add_argument("quantized", type=_model, help="folder or hub name of a quantized model")
    finetune.add_argument("out", help="folder to save to")
    finetune.add_argument(
        "--teacher",
        type=_model,
        required=True,
        metavar="ORIGINAL",
        help="the model that was quantized",
    )
    finetune.add_argument(
        "--dataset", default="pydoc", help="text to train on, as for quantize (pydoc)"
    )
    finetune.add_argument(
        "--tokenizer", type=_model, help="folder or hub name (the quantized model's)"
    )
    finetune.add_argument(
        "--samples", type=int, default=64, help="windows; the last eighth is held out (64)"
    )
    finetune.add_argument("--sequence-length", type=int, default=512, help="their tokens (512)")
    finetune.add_argument("--epochs", type=int, help="passes over the windows (4)")
    finetune.add_argument(
        "--learning-rate", type=float, help="relative to every scale, at the first step (2e-3)"
    )
    finetune.add_argument("--batch-size", type=int, help="windows per optimizer step (8)")
    finetune.add_argument("--seed", type=int, help="of the choice and order of the windows (0)")
    finetune.add_argument(
        "--resume", metavar="FOLDER", help="keep the state here, and go on from what is there"
    )
    finetune.add_argument("--dtype", default="auto", help="of both models (their own)")
    finetune.add_argument("--device-map", help="as in from_pretrained")

    evaluate = commands.add_parser("eval", parents=[common], help="perplexity, KL, tasks, speed")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", type=_model, help="folder or hub name")
    evaluate.add_argument(
        "--against", type=_model, metavar="ORIGINAL", help="model to compare with"
    )
    evaluate.add_argument(
        "--text", help="text file; default: topics of Python's documentation held out for this"
    )
    evaluate.add_argument("--sequence-length", type=int, default=512)
    evaluate.add_argument("--windows", type=int, help="at most so many windows (all)")
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME_OR_YAML",
        help="tasks of lm-evaluation-harness: names, task files, folders of them",
    )
    evaluate.add_argument(
        "--few-shot", type=int, help="solved examples before every question of a task (0)"
    )
    evaluate.add_argument("--limit", type=int, help="at most so many questions of a task (all)")
    evaluate.add_argument("--batch-size", type=int, help="sequences of a task at a time (1)")
    evaluate.add_argument("--dtype", default="auto")
    evaluate.add_argument("--device-map")
    evaluate.add_argument("--prompt", help="also print a greedy continuation of this text")

    for name, run, text in (
        ("inspect", _inspect, "what a quantized folder holds, layer by layer"),
        ("verify", _verify, "check every checksum and decode everything"),
    ):
        command = commands.add_parser(name, parents=[common], help=text)
        command.set_defaults(run=run)
        command.add_argument("folder", type=_model)
        if name == "inspect":
            command.add_argument(
                "--html", metavar="FILE", help="also draw it, as a page for browsers"
            )

    diff = commands.add_parser("diff", parents=[common], help="two models of one kind side by side")
    diff.set_defaults(run=_diff)
    diff.add_argument("a", type=_model, help="folder of a model")
    diff.add_argument("b", type=_model, help="folder of another; one of the two may be dense")

    demo = commands.add_parser("demo", parents=[common], help="the main job on a real model")
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--model", type=_model, help="folder or hub name (SmolLM2-135M-Instruct from a package)"
    )
    demo.add_argument("--bits", type=float, default=3.0)
    demo.add_argument("--out", help="keep the quantized model in this folder")
    return parser


def _model(name: str) -> str:
    """A folder, or a name on the hub, which tells of its own what is wrong with it."""
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or path.exists() or len(path.parts) > 2):
        raise argparse.ArgumentTypeError(f"there is no folder {name}")
    return name


def _quantize(arguments: argparse.Namespace) -> None:
    from watersic_hf.checkpoint import average_bits
    from watersic_hf.integration import WaterSICConfig, quantize_to_folder
    from watersic_hf.streams.processes import process_group, rank_and_size

    config = WaterSICConfig(
        bits=arguments.bits,
        dataset=None if arguments.dataset == "none" else arguments.dataset,
        tokenizer=arguments.tokenizer,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        layer_bits=dict(_pattern_bits(arguments.layer_bits)),
        modules_to_not_convert=arguments.skip,
        seed=arguments.seed,
        **dict(_settings(arguments.set)),
    )
    if arguments.dry_run:
        _print_plan(arguments, config)
        return
    with process_group():
        reports = quantize_to_folder(
            arguments.model, arguments.out, config, dtype=arguments.dtype,
            device_map=arguments.device_map, max_shard_size=arguments.max_shard_size,
        )  # fmt: skip
        if rank_and_size()[0] > 0:
            return
    page = _write_page(arguments.out)
    stored, size = average_bits(reports), model_size(arguments.out)
    if arguments.json:
        _print_json(
            {
                "bits": arguments.bits,
                "stored": stored,
                "model_parameters": size.parameters,
                "model_bits": size.bits,
                "layers": [asdict(r) for r in reports],
            }
        )
        return
    layers = [report for report in reports if not report.table]
    print(
        f"{arguments.out}: {len(layers)} layers, {sum(r.weights for r in layers):,} weights, "
        f"{stored:.4f} bits per weight stored ({arguments.bits:g} asked)"
    )
    for table in (report for report in reports if report.table):
        print(
            f"{table.name}: {table.weights:,} weights, {table.bits:.4f} bits per weight stored "
            f"({table.asked:g} asked)"
        )
    print(
        f"whole model: {size.parameters:,} parameters, {size.bits:.4f} bits per parameter, "
        f"{size.nbytes:,} bytes; {page} shows it"
    )


def _write_page(folder: str) -> Path:
    """Put the page about a model into its folder, without decoding its layers."""
    from watersic_hf.report import PAGE_FILE, read_facts, write_page

    page = Path(folder) / PAGE_FILE
    write_page(page, read_facts(folder, inspect_checkpoint(folder, decode=False)))
    return page


def _print_plan(arguments: argparse.Namespace, config: Any) -> None:
    from watersic_hf.integration.folder import compute_device
    from watersic_hf.integration.plan import plan

    found = plan(
        arguments.model, config, dtype=arguments.dtype, processes=arguments.processes,
        device=compute_device(arguments.device_map),
    )  # fmt: skip
    if arguments.json:
        _print_json(asdict(found))
        return
    print(
        f"{found.model}: {found.layers} layers in {found.blocks} blocks, {found.weights:,} weights "
        f"at {config.bits:g} bits, {found.tokens:,} calibration tokens, {found.processes} "
        f"process{'es' if found.processes > 1 else ''}\n"
    )
    parts = (
        ("memory of a process, GB", found.memory, 1e9),
        ("disk, GB", found.disk, 1e9),
        ("time, hours", found.seconds, 3600),
    )
    rows = []
    for title, amounts, unit in parts:
        rows.append((title, f"{sum(amounts.values()) / unit:.2f}"))
        rows += [(f"  {what}", f"{amount / unit:.2f}") for what, amount in amounts.items()]
    _print_table(("", "at most"), rows)
    print(f"\nrates measured on {found.rates.machine}; an estimate, good to a factor of two")


def _pattern_bits(texts: Iterable[str]) -> Iterable[tuple[str, float]]:
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        try:
            yield pattern, float(bits)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--layer-bits {text!r} must be PATTERN=BITS, as in down_proj=3.5")


def _settings(texts: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """The settings that are named on the command line; the others have options of their own."""
    names = ("allocation", "row_importance", "drift", "residual", "attention", "mixing",
             "zero_rows", "damping", "rescale", "quantize_head", "quantize_embeddings")  # fmt: skip
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise ValueError(f"--set {text!r} must be NAME=VALUE with a name among {names}")
        try:
            yield name, json.loads(value)
        except json.JSONDecodeError:
            yield name, value


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that are on the command line; the others keep the library's defaults."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _finetune(arguments: argparse.Namespace) -> None:
    from watersic_hf.finetuning import FinetuneSettings, finetune_to_folder

    given = _given(arguments, "epochs", "learning_rate", "batch_size", "seed")
    report = finetune_to_folder(
        arguments.quantized, arguments.out, arguments.teacher, dataset=arguments.dataset,
        tokenizer=arguments.tokenizer, samples=arguments.samples,
        sequence_length=arguments.sequence_length, settings=FinetuneSettings(**given),
        resume_folder=arguments.resume, dtype=arguments.dtype, device_map=arguments.device_map,
    )  # fmt: skip
    _write_page(arguments.out)
    before, after = report.kl_bits_before, report.kl_bits_after
    if arguments.json:
        _print_json(asdict(report) | {"kl_bits_before": before, "kl_bits_after": after})
        return
    rows = [("0", "", f"{report.kl_bits_before:.5f}")]
    epochs = zip(report.train_kl_bits, report.validation_kl_bits[1:], strict=True)
    rows += [(str(n), f"{t:.5f}", f"{v:.5f}") for n, (t, v) in enumerate(epochs, 1)]
    _print_table(("epoch", "KL trained on", "KL held out, bits per token"), rows)
    kept = f"scales of epoch {report.kept_epoch}"
    if report.kept_epoch == 0:
        kept = "no epoch was better, scales as they were"
    print(
        f"\n{arguments.out}: {report.layers} layers, {kept}, "
        f"KL {before:.5f} -> {after:.5f} bits per token; bits per weight as before"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from watersic_hf.evaluation import (
        evaluate,
        evaluate_tasks,
        evaluation_text,
        evaluation_windows,
        generation_speed,
    )

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=arguments.dtype, device_map=arguments.device_map
        ).eval()

    task_options = _given(arguments, "few_shot", "limit", "batch_size")
    if task_options and not arguments.tasks:
        raise ValueError("--few-shot, --limit and --batch-size are for --tasks, which is missing")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = evaluation_windows(
        evaluation_text(arguments.text),
        tokenizer,
        sequence_length=arguments.sequence_length,
        limit=arguments.windows,
    )
    model = load(arguments.model)
    original = load(arguments.against) if arguments.against else None
    task_results = {}
    if arguments.tasks:
        # before the perplexity, so that a misspelt name shows first
        task_results["tasks"] = evaluate_tasks(model, tokenizer, arguments.tasks, **task_options)
        if original is not None:
            task_results["original_tasks"] = evaluate_tasks(
                original, tokenizer, arguments.tasks, **task_options
            )
    result = asdict(evaluate(model, windows, original)) | task_results
    result["model_bits"] = _model_bits(arguments.model)
    result["tokens_per_second"] = generation_speed(model, windows[0][:32])
    if arguments.prompt:
        prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        result["text"] = tokenizer.decode(tokens[0], skip_special_tokens=True)
    if arguments.json:
        _print_json(result)
        return
    _print_table(("", arguments.model), _evaluation_rows(result))
    if task_results:
        print()
        names = {"original_tasks": arguments.against, "tasks": arguments.model}
        _print_tasks([(names[key], task_results[key]) for key in names if key in task_results])
    if arguments.prompt:
        print(f"\n{result['text']}")


def _model_bits(model: str) -> float | None:
    """Stored bits per parameter of a local model; None for a model of the hub."""
    return model_size(model).bits if Path(model).is_dir() else None


def _evaluation_rows(result: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """What `watersic eval` prints of one model."""
    yield "windows", result["windows"]
    yield "predicted tokens", result["tokens"]
    if result["model_bits"] is not None:
        yield "bits per parameter, whole model", f"{result['model_bits']:.4f}"
    if result["original_perplexity"] is not None:
        yield "perplexity, original", f"{result['original_perplexity']:.4f}"
        yield "KL to the original, bits per token", f"{result['kl_bits']:.5f}"
        yield "top-1 agreement", f"{result['top1_agreement']:.2%}"
    yield "perplexity", f"{result['perplexity']:.4f}"
    yield "tokens per second", f"{result['tokens_per_second']:.1f}"


def _print_tasks(models: Sequence[tuple[str, dict[str, dict[str, float]]]]) -> None:
    """A row per task and metric, a column per model; a standard error stands by its metric."""

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
    _print_table(("task, metric", *(name for name, _ in models)), rows)


def _inspect(arguments: argparse.Namespace) -> None:
    from watersic_hf.checkpoint import read_report
    from watersic_hf.integration.names import names_in_model
    from watersic_hf.report import read_facts, write_page

    found = inspect_checkpoint(arguments.folder, renamed=names_in_model(arguments.folder))
    reports = {report.stored_name: report for report in read_report(arguments.folder)}
    for layer in found["layers"]:
        report = reports.get(layer["name"])
        layer["error"] = None if report is None else report.error
        layer["tokens"] = None if report is None else report.tokens
        layer["pooled"] = None if report is None else report.pooled
    if arguments.html:
        write_page(arguments.html, read_facts(arguments.folder, found))
    if arguments.json:
        _print_json(found)
        return
    head = ("layer", "shape", "bits", "H pooled", "H class", "payload", "error", "classes", "max")
    rows = [
        (
            layer["name"],
            f"{layer['rows']} x {layer['columns']}",
            f"{layer['bits']:.4f}",
            f"{layer['pooled_entropy']:.4f}",
            f"{layer['class_entropy']:.4f}",
            f"{layer['payload_bits']:.4f}",
            "" if layer["error"] is None else f"{layer['error']:.3g}",
            f"{layer['row_classes']} + {layer['column_classes']}",
            layer["max_abs_code"],
        )
        for layer in experts_together(found["layers"])
    ]
    totals = found["totals"]
    rows.append(
        (
            f"{totals['layers']} layers",
            f"{totals['weights']:,}",
            f"{totals['bits']:.4f}",
            f"{totals['pooled_entropy']:.4f}",
            f"{totals['class_entropy']:.4f}",
            f"{totals['payload_bits']:.4f}",
            "",
            "",
            "",
        )
    )
    if totals["tables"]:
        cells = (f"{totals['tables']} tables", f"{totals['table_weights']:,}")
        rows.append((*cells, f"{totals['table_bits']:.4f}", *[""] * 6))
    _print_table(head, rows)
    print()
    _print_table(
        ("dense", "tensors", "bytes", "reason"),
        [(d["name"], d["tensors"], f"{d['bytes']:,}", d["reason"]) for d in found["dense"]],
    )
    print(
        f"\nquantized {totals['quantized_bytes']:,} bytes, dense {totals['dense_bytes']:,} bytes, "
        f"files {totals['file_bytes']:,} bytes; whole model {totals['model_parameters']:,} "
        f"parameters, {totals['model_bits']:.4f} bits per parameter"
    )


def _diff(arguments: argparse.Namespace) -> None:
    from watersic_hf.checkpoint import read_report

    found = compare_checkpoints(arguments.a, arguments.b)
    for side in ("a", "b"):
        errors = {r.stored_name: r.error for r in read_report(getattr(arguments, side))}
        for layer in found["layers"]:
            layer[f"error_{side}"] = errors.get(layer["name"])
    if arguments.json:
        _print_json(found)
        return

    def error(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    rows = [
        (
            layer["name"],
            f"{layer['bits_a']:.4f}",
            f"{layer['bits_b']:.4f}",
            error(layer["error_a"]),
            error(layer["error_b"]),
            "same bytes" if layer["identical"] else f"{layer['difference']:.3g}",
        )
        for layer in found["layers"]
    ]
    totals = found["totals"]
    bits = (f"{totals['bits_a']:.4f}", f"{totals['bits_b']:.4f}")
    rows.append((f"{totals['layers']} layers", *bits, "", "", f"{totals['difference']:.3g}"))
    _print_table(("layer", "bits A", "bits B", "error A", "error B", "difference"), rows)
    if found["settings"]:
        print()
        _print_table(
            ("setting", "A", "B"),
            [(name, *map(json.dumps, pair)) for name, pair in found["settings"].items()],
        )
    tensors = found["tensors"]
    print(
        f"\ntensors: {tensors['identical']} the same bytes, {tensors['different']} different, "
        f"{len(tensors['only_a'])} only in A, {len(tensors['only_b'])} only in B\n"
        f"files: A {totals['file_bytes_a']:,} bytes, B {totals['file_bytes_b']:,} bytes"
    )


def _verify(arguments: argparse.Namespace) -> None:
    checked = verify_checkpoint(arguments.folder)
    if arguments.json:
        _print_json(checked)
    else:
        print(
            f"{arguments.folder}: {checked['layers']} layers, {checked['codes']:,} codes, "
            f"{checked['bytes']:,} bytes: all checksums right"
        )


def _demo(arguments: argparse.Namespace) -> None:
    from watersic_hf.demo import run_demo

    result = run_demo(model=arguments.model, bits=arguments.bits, out=arguments.out)
    if arguments.out:
        _write_page(arguments.out)
    if arguments.json:
        _print_json(result)
        return

    def megabytes(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} MB"

    ppl = (f"{result[f'perplexity_{when}']:.3f}" for when in ("before", "after"))
    sizes = {
        kind: [megabytes(result[f"{kind}_mb_{when}"]) for when in ("before", "after")]
        for kind in ("linear", "file")
    }
    rows = [
        ("linear layers", *sizes["linear"]),
        ("whole model", *sizes["file"]),
        ("bits per parameter, whole model", "16", f"{result['model_bits']:.4f}"),
        ("bits per weight", "16", f"{result['bits_stored']:.4f} ({result['bits_asked']:g} asked)"),
        ("perplexity, held-out text", *ppl),
        ("KL, bits per token", "", f"{result['kl_bits']:.4f}"),
        ("top-1 agreement", "", f"{result['top1_agreement']:.1%}"),
        ("seconds to quantize", "", f"{result['quantize_seconds']:.0f}"),
        ("tokens per second", "", f"{result['tokens_per_second']:.1f}"),
    ]
    _print_table((Path(result["model"]).name, "before", "after"), rows)
    print(f"\nThe quantized model, reloaded in a new process:\n{result['text']}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns; the first to the left, the others to the right."""
    table = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


if __name__ == "__main__":
    sys.exit(main())
