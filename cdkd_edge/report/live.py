"""What is seen on stderr while something takes its time.

Whoever tells how far it is learns here that it was interrupted (:mod:`cdkd_edge.interrupts`), watched or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cdkd_edge.errors import printable
from cdkd_edge.interrupts import check
from cdkd_edge.report.table import Console, cell


@contextlib.contextmanager
def live_steps() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names the current step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: check()
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
    # Where nobody watches, a bar would leave blank lines between the messages that matter.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(printable(title), total=None)

        def tell(done: int, total: int) -> None:
            check()
            progress.update(task, completed=done, total=total)

        yield tell
