"""``watersic run``: run another program in a process that knows the format."""

import argparse
import importlib.metadata
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "run",
        help="run a program that loads models with transformers",
        description="Run a console script, a Python file or a module in this process, in which "
        "from_pretrained loads quantized models: watersic run transformers serve, watersic run "
        "lm_eval --model hf, watersic run train.py, watersic run -m package.module. Processes that "
        "the program starts do not know the format: put watersic run into their command.",
    )
    parser.add_argument("-m", "--module", action="store_true", help="COMMAND is a module")
    parser.add_argument("command", metavar="COMMAND", help="console script, Python file or module")
    parser.add_argument("options", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    # the errors of the program are its own: they are shown as it shows them
    parser.set_defaults(run=run, debug=True)


def run(arguments: argparse.Namespace) -> None:
    """Run the program; its exit status is that of this process."""
    program = find_program(arguments.command, arguments.options, module=arguments.module)
    if program is None:
        kind = "module" if arguments.module else "console script, file or module"
        raise SystemExit(
            f"watersic run: there is no {kind} {arguments.command}. Install it in the environment "
            f"of watersic, {sys.prefix}."
        )
    sys.exit(program())


def find_program(
    command: str, options: Sequence[str], *, module: bool = False
) -> Callable[[], Any] | None:
    """Return a function that runs a program as the main program of this process.

    Args:
        command: name of a console script, path of a Python file, or name of a module.
        options: arguments of the program.
        module: whether `command` can only be a module.

    Returns:
        The function, which returns an exit status as console scripts do, or None if there is no
        such program.
    """
    if not module:
        if Path(command).is_file():

            def run_file() -> None:
                sys.argv = [command, *options]
                sys.path.insert(0, os.path.dirname(os.path.abspath(command)))
                runpy.run_path(command, run_name="__main__")

            return run_file
        scripts = importlib.metadata.entry_points(group="console_scripts", name=command)
        if scripts:
            (script, *_) = scripts

            def run_script() -> Any:
                sys.argv = [command, *options]
                return script.load()()

            return run_script
    if not _exists(command):
        return None

    def run_module() -> None:
        sys.argv = [command, *options]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command, run_name="__main__", alter_sys=True)

    return run_module


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
