"""Declare a setting once: its default, its description, its check and its command-line option.

A configuration is a dataclass whose fields are made by `setting`.  The docstring of the class, the
checks of its values, what is saved, and the options of the command line are all read from there.
"""

import dataclasses
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

#: Option of the command line that takes ``NAME=VALUE`` for settings without an option of their own.
SET_OPTION = "--set"

_KEY = "setting"
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that is declared about one setting."""

    default: Any
    summary: str
    """What it is, as a phrase that fits on the help page of the command line."""
    details: str = ""
    """Sentences that only the docstring of the class has."""
    default_text: str = ""
    """What the default amounts to, where its value does not say it."""
    check: Callable[[str, Any], None] | None = None
    """Raises ValueError unless it is given a name and a value that is allowed."""
    saved: bool = True
    """Whether it is part of ``config.json``."""
    option: str | None = SET_OPTION
    """Option of the command line that sets it; None for what is not up to the user there."""
    metavar: str | None = None
    """Placeholder of the option's value on the help page."""

    @property
    def help(self) -> str:
        """Summary and default, for the command line."""
        # as it is typed there
        default = self.default if isinstance(self.default, str) else json.dumps(self.default)
        if self.default is None:
            default = "none"
        return f"{self.summary} (default: {self.default_text or default})"

    @property
    def description(self) -> str:
        """Summary, details and default, for a docstring."""
        default = self.default_text or repr(self.default)
        sentences = [f"{self.summary}.", self.details, f"Default: {default}."]
        return " ".join(filter(None, sentences[:2] if self.option is None else sentences))


def setting(default: Any, summary: str, details: str = "", **declared: Any) -> Any:
    """Return the dataclass field of a setting; `declared` are further fields of `Setting`."""
    declaration = Setting(default=default, summary=summary, details=details, **declared)
    return dataclasses.field(default=default, metadata={_KEY: declaration})


def settings_of(configuration: Any) -> dict[str, Setting]:
    """Return the settings of a configuration, or of its class, by name and in their order."""
    fields = dataclasses.fields(configuration)
    return {field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata}


def with_arguments(configuration: _Class) -> _Class:
    """Replace ``{arguments}`` in the docstring of a class by the descriptions of its settings."""
    entries = [
        textwrap.fill(
            f"{name}: {declared.description}",
            width=100,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for name, declared in settings_of(configuration).items()
    ]
    # python -OO removes docstrings
    if configuration.__doc__ is not None:
        text = "\n".join(entries).lstrip()
        configuration.__doc__ = configuration.__doc__.replace("{arguments}", text)
    return configuration


def positive_integer(name: str, value: Any) -> None:
    """Check that a value is a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be a positive integer")
