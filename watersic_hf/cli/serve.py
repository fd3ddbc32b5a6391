"""``watersic serve``: serve a model with vLLM."""

import argparse
import importlib.util
import os
import shlex
import sys
from typing import Any

from watersic_hf.cli.options import model_name
from watersic_hf.nn.residency import RESIDENCIES

_SERVER = "vllm.entrypoints.openai.api_server"


def _own_options() -> argparse.ArgumentParser:
    """Return a parser of the options that are not vLLM's."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--residency",
        choices=RESIDENCIES,
        help="form of the weights in memory (default: WATERSIC_RESIDENCY, or auto)",
    )
    own.add_argument("--print", action="store_true", help="print the command instead of running it")
    return own


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "serve",
        parents=[_own_options()],
        help="serve a model with vLLM, over the API of OpenAI",
        description="Start vLLM's server for a model. All other options are those of `vllm serve`, "
        "as in watersic serve MODEL --port 8000 --tensor-parallel-size 2.",
    )
    parser.add_argument("model", type=model_name, help="folder or Hub name of the model")
    parser.add_argument(
        "options", metavar="...", nargs=argparse.REMAINDER, help="options of vllm serve"
    )
    parser.set_defaults(run=run, debug=False)


def run(arguments: argparse.Namespace) -> None:
    """Replace this process by the server."""
    # our own options may also stand behind the model
    arguments, options = _own_options().parse_known_args(arguments.options, arguments)
    # the module works with every distribution of vLLM, the console script with one of them
    command = [sys.executable, "-m", _SERVER, "--model", arguments.model, *options]
    residency = arguments.residency or os.environ.get("WATERSIC_RESIDENCY")
    settings = {} if residency is None else {"WATERSIC_RESIDENCY": residency}
    if arguments.print:
        print(shlex.join([*(f"{name}={value}" for name, value in settings.items()), *command]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError(
            "vLLM is not installed in this environment. Install it beside watersic-hf with "
            "`pip install vllm`, or serve with `watersic run transformers serve`."
        )
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | settings)
