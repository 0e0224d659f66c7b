"""What commands print: a result as one table for a person or as JSON for a program; notes on stderr.

No text from a file, another program or a service steers the terminal or its colours.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
import typer
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cdkd_edge.core.errors import UsageError, printable

LISTED = 15  # layers or kernels shown without ``--all``


class Console(rich.console.Console):
    """Where results (stdout) and progress (stderr) are shown. Values are not cut off where it is no terminal."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
        super().__init__(stderr=stderr, quiet=quiet, width=width, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What is written, piece by piece. Rich's own control sequences are pieces of another kind."""
        for piece in super().render(renderable, options):
            text, style, control = piece
            if not control and not text.isprintable():
                text = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
            yield Segment(text, style, control)

    def print_line(self, text: str) -> None:
        """Print a line of text of unknown origin, however long it is."""
        self.print(cell(text), soft_wrap=True)


def cell(text: str, style: str = "") -> Text:
    """Text of unknown origin as part of a table: on one line, nothing in it is markup."""
    return Text(printable(text), style)


Rows = list[tuple[str, ...]]  # names, and a value in the last column
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Listing:
    """A table below a report's rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def print(self, console: Console) -> None:
        """Print it below an empty line."""
        console.print()
        if self.title:
            console.print(cell(self.title, "bold"))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for index, name in enumerate(self.columns):
            table.add_column(cell(name), overflow="fold", justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(cell, row))
        console.print(table)


@dataclass(frozen=True)
class Report:
    """Rows of names and values under a title, tables below them, and the data they come from."""

    title: str
    rows: Rows
    data: Any
    listings: tuple[Listing, ...] = ()

    def print(self, *, stderr: bool = False) -> None:
        """Print the tables to stdout, or to stderr."""
        console = Console(stderr=stderr)
        console.print(cell(self.title, "bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for _ in range(max(map(len, self.rows), default=1) - 1):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for *names, value in self.rows:
            table.add_row(*(cell(name, _STATUS_STYLES.get(name, "dim")) for name in names), cell(value))
        if self.rows:
            console.print(table)
        for listing in self.listings:
            listing.print(console)

    def show(self, as_json: bool, *, stderr: bool = False) -> None:
        """Print the tables, to stderr where stdout is somebody else's, or the data as JSON to stdout."""
        print_json(self.data) if as_json else self.print(stderr=stderr)


def print_json(data: Any) -> None:
    """Print data (see :func:`plain`) as indented JSON to stdout."""
    typer.echo(json.dumps(plain(data), indent=2))


def say(text: str) -> None:
    """Print a line to stderr."""
    typer.echo(printable(text), err=True)


def write_json(path: Path, data: Any) -> None:
    """Write data (see :func:`plain`) as indented JSON, atomically."""
    from cdkd_edge.core.files import write_text

    write_text(path, json.dumps(plain(data), indent=2) + "\n")


@contextlib.contextmanager
def new_folder(folder: Path | None) -> Iterator[Path | None]:
    """A folder that appears, with everything written into it, when the block succeeds; None stays None.

    Raises:
        UsageError: there is a file of that name, or a folder that is not empty.
    """
    from cdkd_edge.core.files import whole_folder

    if folder is None:
        yield None
        return
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            what = "not empty" if folder.is_dir() else "not a folder"
            raise UsageError(f"{folder} is {what}", hint="name another --output")
        folder.rmdir()
    with whole_folder(folder) as place:
        yield place


def plural(count: int, thing: str) -> str:
    """A count and what is counted."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def in_brackets(count: int, text: str) -> str:
    """A count in brackets; nothing if it is zero."""
    return f" ({count} {text})" if count else ""


def fields_of(value: Any, *names: str) -> dict[str, Any]:
    """Some of an object's attributes, by name."""
    return {name: getattr(value, name) for name in names}


def plain(value: Any) -> Any:
    """Data as JSON has it: dataclasses become objects, and paths text."""
    import msgspec

    return msgspec.to_builtins(value, enc_hook=str)
