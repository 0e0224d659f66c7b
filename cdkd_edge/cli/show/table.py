"""A result as one table for a person, and the same facts as data for a program."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import rich.console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cdkd_edge.core.errors import printable


class Console(rich.console.Console):
    """Where results (stdout) and progress (stderr) are shown; no text from a file steers the terminal or its colours.

    Values are not truncated where stdout is not a terminal.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        width = None if stderr or sys.stdout.isatty() else 200
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What is written, piece by piece. Rich's own control sequences are pieces of another kind."""
        for piece in super().render(renderable, options):
            text, style, control = piece
            if not control and not text.isprintable():
                text = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
            yield Segment(text, style, control)


def cell(text: str, style: str = "") -> Text:
    """Text of unknown origin as part of a table: on one line, nothing in it is markup."""
    return Text(printable(text), style)


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
        """Print the table to stdout."""
        console = Console()
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(cell(name), cell(value))
        console.print(cell(self.title, "bold"))
        console.print(table)
        if self.listing is not None:
            console.print()
            listing = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for index, name in enumerate(self.listing.columns):
                listing.add_column(cell(name), overflow="fold", justify="right" if index else "left")
            for row in self.listing.rows:
                listing.add_row(*map(cell, row))
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
