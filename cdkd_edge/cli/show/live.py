"""What is seen on stderr while something takes its time.

On a terminal a bar, a spinner or a line that changes; elsewhere (a log file, a job scheduler) a line a minute.

Whoever tells how far it is learns here that it was interrupted (:mod:`cdkd_edge.core.signals`), watched or not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cdkd_edge.cli.show.table import Console, cell
from cdkd_edge.core.errors import printable
from cdkd_edge.core.signals import check

LINE_EVERY_S = 60.0


@contextlib.contextmanager
def lines(console: Console) -> Iterator[Callable[[str], None]]:
    """For a stderr that is no terminal: the newest text that was told, once a minute, with the time that passed."""
    newest, started, ended = "", time.monotonic(), threading.Event()

    def write() -> None:
        while not ended.wait(LINE_EVERY_S):
            if newest:
                text = f"after {duration(time.monotonic() - started)}: {newest}"
                console.print(cell(text), soft_wrap=True)

    def tell(text: str) -> None:
        nonlocal newest
        check()
        newest = text

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield tell
    finally:
        ended.set()
        writer.join()


@contextlib.contextmanager
def live_steps() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names the current step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell_lines:
            yield tell_lines
        return
    with console.status("starting") as status:

        def tell(step: str) -> None:
            check()
            status.update(cell(step))

        yield tell


@contextlib.contextmanager
def live_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with the time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell_lines:
            yield lambda done, total: tell_lines(f"{title}: {done} of {total} tiles")
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(printable(title), total=None)

        def tell(done: int, total: int) -> None:
            check()
            progress.update(task, completed=done, total=total)

        yield tell


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min"
