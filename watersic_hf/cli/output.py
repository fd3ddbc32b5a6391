"""Print results on stdout, as tables or as JSON."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


def print_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    table = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def optional(value: float | None, form: str) -> str:
    """Format a number; an empty cell if it is not known."""
    return "" if value is None else format(value, form)
