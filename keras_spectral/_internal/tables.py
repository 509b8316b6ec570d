"""Pieces that all printed tables share."""

import re
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.text import Text

_FEWEST = 3  # rows that share a line


def grouped(
    rows: Iterable[Any], key: Callable[[Any], Hashable]
) -> list[tuple[Text, list[Any]]]:
    """Rows that differ in nothing but where they are, together.

    Args:
        rows: Anything with a `path`.
        key: What else rows of one group have in common; the path's last name
            always, numbers at its end left out.

    Returns:
        What to call each group (a path, `12 x .../query` or
        `12 x .../block_*`) and its rows, in the order of the first ones.
    """
    groups: dict[Hashable, list[Any]] = {}
    for row in rows:
        name = re.sub(r"_\d+$", "", _name(row))
        groups.setdefault((name, key(row)), []).append(row)
    named = []
    for group in groups.values():
        if len(group) < _FEWEST:
            named += [(Text(row.path), [row]) for row in group]
        else:
            named.append((Text(f"{len(group)} x {_common(group)}"), group))
    return named


def _common(group):
    names = {_name(row) for row in group}
    name = names.pop()
    if names:
        name = re.sub(r"_\d+$", "", name) + "_*"
    return f".../{name}" if any("/" in row.path for row in group) else name


def _name(row):
    return row.path.rpartition("/")[2]


def show(console: rich.console.Console | None, table: Any) -> None:
    """Prints a table, on a new console by default."""
    if console is None:
        console = rich.console.Console()
    if not hasattr(console, "print"):
        raise ValueError(
            f"Received console={console!r}. Expected a rich.console.Console, "
            "or None."
        )
    console.print(table)
