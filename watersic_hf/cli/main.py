"""Parse the command line, run one command, and report its errors."""

import argparse
import os
import sys
from collections.abc import Sequence

from watersic_hf.cli import (
    audit,
    demo,
    diff,
    evaluate,
    finetune,
    inspect,
    quantize,
    run,
    serve,
    verify,
)

#: In the order of the help page.  Each has ``add_parser(commands, common)`` and ``run(arguments)``.
COMMANDS = (quantize, finetune, evaluate, inspect, verify, diff, audit, serve, run, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line on stderr unless ``--debug`` is given.

    Args:
        argv: arguments without the name of the program. Default: those of the process.

    Returns:
        The exit status: 0, or 1 after an error.

    Raises:
        SystemExit: the arguments are invalid (status 2), or ask for help (status 0).
    """
    arguments = build_parser().parse_args(argv)
    # torch on Linux: use huge pages for large tensors; a sixth of a run is page faults otherwise
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("watersic: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader of stdout is gone, as after `| head`; without this, Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        rank = os.environ.get("RANK")
        program = "watersic" if rank is None else f"watersic, process {rank}"
        print(f"{program}: error: {message}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; it stores the command's function as ``run``."""
    parser = argparse.ArgumentParser(prog="watersic", description="WaterSIC weight quantization.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")
    common.add_argument(
        "--debug", action="store_true", help="show the traceback if an error occurs"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands, common)
    return parser
