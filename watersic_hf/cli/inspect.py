"""``watersic inspect``: what a quantized model consists of, layer by layer."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from watersic_hf.checkpoint import experts_together, inspect_checkpoint, with_reports
from watersic_hf.cli.options import model_name
from watersic_hf.cli.output import optional, print_json, print_table

_HEAD = ("layer", "shape", "bits", "H pooled", "H class", "payload", "error", "classes", "max")
_AVERAGES = ("bits", "pooled_entropy", "class_entropy", "payload_bits")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "inspect", parents=[common], help="show the contents of a quantized model, layer by layer"
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=model_name, help="folder of the quantized model")
    parser.add_argument(
        "--html", metavar="FILE", help="also write the report to this file, as an HTML page"
    )


def run(arguments: argparse.Namespace) -> None:
    """Decode all layers of the model and print what they hold."""
    from watersic_hf.integration.names import names_in_model
    from watersic_hf.report import read_facts, write_page

    found = inspect_checkpoint(arguments.folder, renamed=names_in_model(arguments.folder))
    for layer, report in with_reports(found["layers"], arguments.folder):
        for field in ("error", "tokens", "pooled"):
            layer[field] = getattr(report, field, None)
    if arguments.html:
        write_page(arguments.html, read_facts(arguments.folder, found))
    if arguments.json:
        print_json(found)
        return
    totals = found["totals"]
    print_table(_HEAD, _rows(experts_together(found["layers"]), totals))
    print()
    print_table(
        ("dense", "tensors", "bytes", "reason"),
        [(d["name"], d["tensors"], f"{d['bytes']:,}", d["reason"]) for d in found["dense"]],
    )
    print(
        f"\nquantized {totals['quantized_bytes']:,} bytes, dense {totals['dense_bytes']:,} bytes, "
        f"files {totals['file_bytes']:,} bytes; whole model {totals['model_parameters']:,} "
        f"parameters, {totals['model_bits']:.4f} bits per parameter"
    )


def _rows(
    layers: Iterable[Mapping[str, Any]], totals: Mapping[str, Any]
) -> Iterable[tuple[Any, ...]]:
    for layer in layers:
        yield (
            layer["name"],
            f"{layer['rows']} x {layer['columns']}",
            *(f"{layer[field]:.4f}" for field in _AVERAGES),
            optional(layer["error"], ".3g"),
            f"{layer['row_classes']} + {layer['column_classes']}",
            layer["max_abs_code"],
        )
    averages = [f"{totals[field]:.4f}" for field in _AVERAGES]
    yield f"{totals['layers']} layers", f"{totals['weights']:,}", *averages, "", "", ""
    if count := totals["tables"]:
        name = "vocabulary matrix" if count == 1 else "vocabulary matrices"
        weights, bits = totals["table_weights"], totals["table_bits"]
        yield f"{count} {name}", f"{weights:,}", f"{bits:.4f}", *[""] * 6
