"""``watersic diff``: compare two models layer by layer."""

import argparse
import json
from collections.abc import Iterable, Mapping
from typing import Any

from watersic_hf.checkpoint import compare_checkpoints, with_reports
from watersic_hf.cli.options import model_name
from watersic_hf.cli.output import optional, print_json, print_table


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "diff", parents=[common], help="compare two models of the same architecture"
    )
    parser.set_defaults(run=run)
    parser.add_argument("a", type=model_name, help="folder of the first model")
    parser.add_argument(
        "b", type=model_name, help="folder of the second model; one of the two may be dense"
    )


def run(arguments: argparse.Namespace) -> None:
    """Compare the models and print their differences."""
    found = compare_checkpoints(arguments.a, arguments.b)
    for side in ("a", "b"):
        for layer, report in with_reports(found["layers"], getattr(arguments, side)):
            layer[f"error_{side}"] = getattr(report, "error", None)
    if arguments.json:
        print_json(found)
        return
    totals, tensors = found["totals"], found["tensors"]
    print_table(
        ("layer", "bits A", "bits B", "error A", "error B", "difference"),
        _rows(found["layers"], totals),
    )
    if found["settings"]:
        print()
        print_table(
            ("setting", "A", "B"),
            [(name, *map(json.dumps, pair)) for name, pair in found["settings"].items()],
        )
    print(
        f"\ntensors: {tensors['identical']} identical, {tensors['different']} different, "
        f"{len(tensors['only_a'])} only in A, {len(tensors['only_b'])} only in B\n"
        f"files: A {totals['file_bytes_a']:,} bytes, B {totals['file_bytes_b']:,} bytes"
    )


def _rows(
    layers: Iterable[Mapping[str, Any]], totals: Mapping[str, Any]
) -> Iterable[tuple[str, ...]]:
    for layer in layers:
        yield (
            layer["name"],
            f"{layer['bits_a']:.4f}",
            f"{layer['bits_b']:.4f}",
            optional(layer["error_a"], ".3g"),
            optional(layer["error_b"], ".3g"),
            "identical" if layer["identical"] else f"{layer['difference']:.3g}",
        )
    bits = (f"{totals['bits_a']:.4f}", f"{totals['bits_b']:.4f}")
    yield f"{totals['layers']} layers", *bits, "", "", f"{totals['difference']:.3g}"
