"""What is shown on stderr while a command works: a bar, a spinner or a changing line; in a log file a line a minute.

The functions that a command calls to report progress also raise what a signal should have raised
(:mod:`cdkd_edge.core.signals`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cdkd_edge.cli.report import Console, cell, say
from cdkd_edge.core.errors import printable
from cdkd_edge.core.numbers import duration
from cdkd_edge.core.signals import check

LINE_EVERY_S = 60.0


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """A spinner that names the current step."""
    console = Console(stderr=True)
    with saying_what_is_kept():
        if not console.is_terminal:
            with lines(console) as note:
                yield note
            return
        with console.status("starting") as status:

            def show(step: str) -> None:
                check()
                status.update(cell(step))

            yield show


@contextlib.contextmanager
def tile_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of tiles with the time left."""
    with saying_what_is_kept(), plain_tile_bar(title) as progress:
        yield progress


@contextlib.contextmanager
def plain_tile_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """:func:`tile_bar`, silent where a signal ends it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as note:
            yield lambda done, total: note(f"{title}: {done} of {total} tiles")
        return
    what = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with bar(console, (*what, *times), description=printable(title)) as update:
        yield lambda done, total: update(completed=done, total=total)


@contextlib.contextmanager
def bar(console: Console, columns: tuple[Any, ...], **fields: Any) -> Iterator[Callable[..., None]]:
    """Rich's bar with these columns; what is yielded updates its fields."""
    from rich.progress import Progress

    # What goes to stdout must not be redirected to stderr, unless both are the terminal that the bar is on.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task(fields.pop("description", ""), **{"total": None, **fields})

        def update(**changed: Any) -> None:
            check()
            progress.update(task, **changed)

        yield update


@contextlib.contextmanager
def lines(console: Console) -> Iterator[Callable[[str], None]]:
    """For a stderr that is no terminal: the newest note once a minute, with the time that passed."""
    newest, started, ended = "", time.monotonic(), threading.Event()

    def write() -> None:
        while not ended.wait(LINE_EVERY_S):
            if newest:
                console.print_line(f"after {duration(time.monotonic() - started)}: {newest}")

    def note(text: str) -> None:
        nonlocal newest
        check()
        newest = text

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield note
    finally:
        ended.set()
        writer.join()


@contextlib.contextmanager
def saying_what_is_kept(
    kept: Callable[[], str] = lambda: "nothing is kept; the same command starts again", *, quiet: bool = False
) -> Iterator[None]:
    """Where a signal ends the block (Ctrl-C, SIGTERM, SIGHUP), say on stderr what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not quiet:
            say(f"interrupted; {kept()}")
        raise
