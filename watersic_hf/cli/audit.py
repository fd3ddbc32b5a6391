"""``watersic audit``: where the bytes of a model are, in any format."""

import argparse
from dataclasses import asdict
from typing import Any

from watersic_hf.cli.output import print_json, print_table


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "audit",
        parents=[common],
        help="show where the bytes of any model are: true bits per weight, part by part",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        help="folder, safetensors or GGUF file, or Hub name; quantized in any format, or not",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the headers of the files and print what they hold."""
    from watersic_hf.integration.audit import audit

    found = audit(arguments.model)
    if arguments.json:
        print_json(
            asdict(found)
            | {"parameters": found.parameters, "bytes": found.nbytes, "groups": found.groups}
        )
        return
    total = found.nbytes
    print_table(
        ("part", "modules", "parameters", "bytes", "of file", "bits", "stored as"),
        [
            (
                row.name,
                row.modules,
                f"{row.parameters:,}",
                f"{row.nbytes:,}",
                f"{row.nbytes / total:.1%}",
                _bits(row.nbytes, row.parameters),
                row.dtypes,
            )
            for row in found.rows
        ],
    )
    print()
    groups = [
        (name, f"{parameters:,}", f"{nbytes:,}", f"{nbytes / total:.1%}", _bits(nbytes, parameters))
        for name, (parameters, nbytes) in found.groups.items()
    ]
    if found.other_bytes is not None:
        other = found.other_bytes
        groups.append(("headers, metadata", "", f"{other:,}", f"{other / total:.1%}", ""))
    whole = f"{found.parameters:,}", f"{total:,}", "100.0%", _bits(total, found.parameters)
    print_table(("", "parameters", "bytes", "of file", "bits"), [*groups, ("whole model", *whole)])
    if not found.exact:
        print("\nParameters are counted as the files hold them: no config.json tells more.")


def _bits(nbytes: int, parameters: int) -> str:
    """Return the bits per parameter, or nothing if there are no parameters."""
    return f"{8 * nbytes / parameters:.3f}" if parameters else ""
