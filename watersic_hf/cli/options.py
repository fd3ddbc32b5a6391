"""Types and helpers for the options of several commands."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from watersic_hf.integration import WaterSICConfig
from watersic_hf.integration.settings import settings_of


def model_name(name: str) -> str:
    """Return `name` if it is a folder or could be a name on the Hub.

    Whether the Hub has such a model shows when it is loaded.

    Raises:
        argparse.ArgumentTypeError: it can only be a path, and there is no such folder.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or path.exists() or len(path.parts) > 2):
        raise argparse.ArgumentTypeError(f"there is no folder {name}")
    return name


def add_setting(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Add the option of a setting of `WaterSICConfig`, with its default and help.

    Args:
        parser: parser of a command.
        name: name of the setting.
        changes: arguments of `add_argument` that differ from those of a plain value.
    """
    setting = settings_of(WaterSICConfig)[name]
    setting = replace(setting, default=changes.get("default", setting.default))
    plain = {"default": setting.default, "metavar": setting.metavar, "help": setting.help}
    if isinstance(setting.default, int | float):
        plain["type"] = type(setting.default)
    if changes.get("action") == "append":
        plain["help"] += "; may be repeated"
    parser.add_argument(setting.option, dest=name, **plain | changes)


def given_options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; for the others the library's defaults apply."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the model, its configuration and its tokenizer are loaded."""
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--subfolder", default="", help="folder within the repository that holds the model"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code of the repository, for models that bring their own",
    )


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_source_options` say."""
    return {
        "revision": arguments.revision,
        "subfolder": arguments.subfolder,
        "trust_remote_code": arguments.trust_remote_code,
    }
