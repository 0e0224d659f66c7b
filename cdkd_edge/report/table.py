"""A result as one table for a person, and the same facts as data for a program."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Listing:
    """A table below a report's rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """Rows of (name, value) under a title, and the data they come from."""

    title: str
    rows: tuple[tuple[str, str], ...]
    data: dict[str, Any]
    listing: Listing | None = None

    def print(self) -> None:
        """Print the table to stdout, without truncating values where stdout is not a terminal."""
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(Text(name), Text(value))
        console.print(Text(self.title, style="bold"))
        console.print(table)
        if self.listing is not None:
            console.print()
            listing = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for index, name in enumerate(self.listing.columns):
                listing.add_column(name, overflow="fold", justify="right" if index else "left")
            for row in self.listing.rows:
                listing.add_row(*map(Text, row))
            console.print(listing)


def percent(value: float | None) -> str:
    """A score of 0..1, which may be missing."""
    return "none" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def plural(count: int, thing: str) -> str:
    """A count and what is counted."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def in_brackets(count: int, text: str) -> str:
    """A count that is worth a word only if it is not zero."""
    return f" ({count} {text})" if count else ""


def plain(value: Any) -> Any:
    """Dataclasses as JSON data; paths as text."""
    import msgspec

    return msgspec.to_builtins(value, enc_hook=str)
