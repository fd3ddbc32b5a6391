"""``watersic verify``: check the integrity of a quantized model."""

import argparse
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import verify_checkpoint
from watersic_hf.cli.options import model_name
from watersic_hf.cli.output import print_json


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify", parents=[common], help="check all checksums, decode all layers, miss no tensor"
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=model_name, help="folder of the quantized model")


def run(arguments: argparse.Namespace) -> None:
    """Verify the model and print how much was checked."""
    from watersic_hf.integration.completeness import require_tensors

    checked = verify_checkpoint(arguments.folder)
    if Path(arguments.folder, "config.json").is_file():
        require_tensors(arguments.folder)
    if arguments.json:
        print_json(checked)
    else:
        print(
            f"{arguments.folder}: {checked['layers']} layers, {checked['codes']:,} codes, "
            f"{checked['bytes']:,} bytes: all checksums are valid"
        )
