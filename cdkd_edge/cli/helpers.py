"""What commands do besides calling one function: find the workspace, show results and progress."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cdkd_edge.core.errors import MissingExtraError, UsageError, printable

if TYPE_CHECKING:
    from cdkd_edge.core.workspace import Workspace


def workspace_at(root: Path) -> Workspace:
    """The workspace in a directory."""
    from cdkd_edge.core.workspace import Workspace

    return Workspace(root)


def stem_of(artefact: Path) -> str:
    """A file's name without its suffix, or without all that checkpoints have: ``best`` of ``best.pth.tar``."""
    name = re.sub(r"(?i)(?<=.)(\.(pt|pth|bin|ckpt|safetensors|tar|zip))+$", "", artefact.name)
    return artefact.stem if name == artefact.name else name


def command_line() -> str:
    """What was typed, for a card. The number of a pipe (``<(...)``) means nothing later: LIST stands in its place."""
    import re
    import shlex

    piped = re.compile(r"/dev/(fd/\d+|stdin)$|/proc/\w+/fd/\d+$")
    return shlex.join(["cdkd-edge", *(piped.sub("LIST", part) for part in sys.argv[1:])])


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON, atomically."""
    import json

    from cdkd_edge.core.files import write_text

    write_text(path, json.dumps(data, indent=2) + "\n")


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
            raise UsageError(
                f"{folder} is not {'empty' if folder.is_dir() else 'a folder'}", hint="name another --output"
            )
        folder.rmdir()
    with whole_folder(folder) as place:
        yield place


def need(package: str, extra: str, purpose: str) -> None:
    """Make sure that an optional package is there, before work begins.

    Raises:
        MissingExtraError: it is not.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def show(report: Any, as_json: bool) -> None:
    """Print a report as a table, or its data as JSON."""
    if as_json:
        print_json(report.data)
    else:
        report.print()


def say(text: str) -> None:
    """A line on stderr; text from files and from other programs does not steer the terminal."""
    typer.echo(printable(text), err=True)


def print_json(data: Any) -> None:
    """Print data as indented JSON."""
    import json

    typer.echo(json.dumps(data, indent=2))


@contextlib.contextmanager
def steps() -> Iterator[Any]:
    """A spinner on stderr that names the current step; says what is kept where a signal ends it."""
    from cdkd_edge.cli.show.live import live_steps

    with telling_what_is_kept(), live_steps() as step:
        yield step


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar of tiles on stderr; says what is kept where a signal ends it."""
    from cdkd_edge.cli.show.live import live_bar

    with telling_what_is_kept(), live_bar(title) as progress:
        yield progress


@contextlib.contextmanager
def telling_what_is_kept(
    kept: Callable[[], str] = lambda: "nothing that was begun is kept; the same command starts again",
) -> Iterator[None]:
    """Where a signal ends the block (Ctrl-C, SIGTERM, SIGHUP), say on stderr what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        typer.echo(f"interrupted; {kept()}", err=True)
        raise
