"""``watersic verify``: check the integrity of a quantized model."""

import argparse
from typing import Any

from watersic_hf.checkpoint import verify_checkpoint
from watersic_hf.cli.options import model_name
from watersic_hf.cli.output import print_json


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify", parents=[common], help="check all checksums and decode all layers"
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=model_name, help="folder of the quantized model")


def run(arguments: argparse.Namespace) -> None:
    """Verify the model and print how much was checked."""
    checked = verify_checkpoint(arguments.folder)
    if arguments.json:
        print_json(checked)
    else:
        print(
            f"{arguments.folder}: {checked['layers']} layers, {checked['codes']:,} codes, "
            f"{checked['bytes']:,} bytes: all checksums are valid"
        )
