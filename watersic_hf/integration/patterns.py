"""Patterns of layer names that users write: check them, and refuse those that select nothing.

A pattern is a regular expression for whole dotted components; see `module_matches`.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from watersic_hf.nn import component_expression, module_matches

_FLAGS = re.compile(r"\(\?([aiLmsux]+)\)")
#: Prefix that other tools put before a regular expression.
_PREFIX = "re:"
#: Names that an error lists at most, and how alike they are at least, from 0 to 1.
_NEAR_NAMES, _LIKENESS = 4, 0.6


def pattern_list(value: Any) -> Any:
    """Return a string as a list of one pattern, and anything else as it is."""
    return [value] if isinstance(value, str) else value


def check_patterns(name: str, values: Iterable[str] | None) -> None:
    """Check that all values, or all keys of a mapping, can be used as patterns.

    Args:
        name: name of the setting, for messages.
        values: the patterns; None = there are none.

    Raises:
        ValueError: a value is no string, or no regular expression.
    """
    for pattern in values or ():
        if not isinstance(pattern, str):
            raise ValueError(f"{name}: a pattern is a string, but {pattern!r} is none")
        try:
            re.compile(pattern)
            # a valid expression can be invalid as a part of the one that names are compared with
            re.compile(component_expression(pattern))
        except re.error as error:
            raise ValueError(
                f"{name}: {pattern!r} is not a valid regular expression: {error}.{_advice(pattern)}"
            ) from error


def check_pattern_mapping(name: str, value: Any) -> None:
    """Check that a value is a mapping whose keys are patterns.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} is {value!r}, but must be a mapping whose keys are patterns, such as "
            f'{{"down_proj": ...}}'
        )
    check_patterns(name, value)


def require_effect(
    name: str,
    patterns: Iterable[str],
    *,
    selectable: Collection[str],
    modules: Iterable[str],
    dense: Mapping[str, str],
) -> None:
    """Refuse patterns that are the first match of no layer.

    Args:
        name: name of the setting, for messages.
        patterns: the patterns, in order of precedence.
        selectable: names of the layers that the setting can be about.
        modules: names of all modules of the model.
        dense: why modules would stay dense, by name.

    Raises:
        ValueError: a pattern selects nothing; the message lists near names, or says why what it
            matches does not count.
    """
    patterns = list(patterns)
    used = {module_matches(layer, patterns) for layer in selectable}
    for pattern in patterns:
        if pattern in used:
            continue
        covered = [layer for layer in selectable if module_matches(layer, [pattern])]
        others = [module for module in modules if module_matches(module, [pattern])]
        reasons = [f"{module} ({dense[module]})" for module in others if module in dense]
        if covered:
            earlier = module_matches(covered[0], patterns)
            why = f"an earlier pattern, {earlier!r}, counts for {covered[0]}. Put it after this one"
        elif reasons:
            why = f"what it matches stays dense: {', '.join(reasons[:_NEAR_NAMES])}"
        elif others:
            why = f"{others[0]} is no layer that can be quantized"
        else:
            why = _near_names(pattern, selectable) + _advice(pattern).rstrip(".")
        raise ValueError(f"{name}: the pattern {pattern!r} selects nothing; {why}.")


def _near_names(pattern: str, layers: Iterable[str]) -> str:
    """Return a phrase with the names that are most like a pattern, or with some of all names."""
    wanted = pattern.removeprefix(_PREFIX).replace("\\", "").strip("^$.*").lower()
    length = wanted.count(".") + 1
    names: dict[str, str] = {}
    for layer in layers:
        parts = layer.split(".")
        for start in range(len(parts) - length + 1):
            part = ".".join(parts[start : start + length])
            names.setdefault(part.lower(), part)
    near = difflib.get_close_matches(wanted, names, _NEAR_NAMES, _LIKENESS)
    if near:
        return f"near names: {', '.join(names[n] for n in near)}"
    ends = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
    return f"names of layers end with: {', '.join(ends)}"


def _advice(pattern: str) -> str:
    """Return what to write in place of syntax that is of other tools; empty if there is none."""
    flags = _FLAGS.match(pattern)
    if flags:
        return f" Write {f'(?{flags[1]}:{pattern[flags.end() :]})'!r}."
    if pattern.startswith(_PREFIX):
        rest = pattern.removeprefix(_PREFIX)
        return f". A pattern is always a regular expression: write {rest!r}, without `{_PREFIX}`."
    if pattern.startswith("*"):
        return f" Any text is `.*`, and a pattern may leave it out: {pattern.lstrip('*.')!r}."
    return ""
