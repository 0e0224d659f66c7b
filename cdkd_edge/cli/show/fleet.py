"""What ``cdkd-edge segment`` shows while scenes come to their end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cdkd_edge.cli.show.live import lines, live_bar
from cdkd_edge.cli.show.segment import class_rows, describe_segment
from cdkd_edge.cli.show.table import Console, Report, cell
from cdkd_edge.core.signals import check
from cdkd_edge.segment.many.dispatch import RunObserver
from cdkd_edge.segment.many.jobs import JobReport, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdkd_edge.segment.many.jobs import Job


def describe_job(report: JobReport) -> Report:
    """One scene of a run that did not fail."""
    data = report.document()
    if report.result is not None:
        made = describe_segment(report.scene, report.result, report.products)
        return Report(made.title, (*made.rows, *(("note", note) for note in report.notes)), data)
    assert report.kept is not None, "a failed scene is an error, not a result"
    kept = report.kept
    total = max(1, kept.height * kept.width)
    rows = [
        ("scene", f"{report.scene}, {kept.width} x {kept.height} px"),
        *(("note", note) for note in report.notes),
        *class_rows(kept.areas, total),
        ("no data", f"{kept.no_data_pixels / total:.1%}"),
        *([("confidence", str(kept.confidence))] if kept.confidence else []),
        *report.products.items(),
    ]
    was_there = "" if report.status == Status.DONE else ", kept: it was there"
    return Report(f"label map {report.output}{was_there}", tuple(rows), data)


@contextlib.contextmanager
def live_fleet(scenes: list[str], as_json: bool) -> Iterator[FleetLines]:
    """Results on stdout as they come; progress and what failed on stderr."""
    if len(scenes) == 1:
        with live_bar(Path(scenes[0]).name) as update:
            yield FleetLines(as_json, update=update)
        return
    columns = (TextColumn("scenes"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell:
            yield FleetLines(as_json, console=console, tell=lambda text, _: tell(f"scenes {text}"), scenes=len(scenes))
        return
    # What goes to stdout must not be redirected to stderr, unless both are the terminal that the bar is on.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=len(scenes))

        def tell_bar(text: str, completed: float) -> None:
            progress.update(task, completed=completed, description=text)

        yield FleetLines(as_json, console=console, tell=tell_bar, scenes=len(scenes))


class FleetLines(RunObserver):
    """Shows a run as it goes; keeps the reports."""

    def __init__(
        self,
        as_json: bool,
        update: Callable[[int, int], None] | None = None,
        console: Console | None = None,
        tell: Callable[[str, float], None] | None = None,
        scenes: int = 1,
    ) -> None:
        self.reports: list[JobReport] = []
        self._as_json, self._update, self._console = as_json, update, console
        self._tell, self._scenes = tell, scenes
        self._started = time.monotonic()
        self._parts: dict[int, tuple[int, int]] = {}
        """Tiles done and in all, of every scene that was begun."""

    def begun(self, index: int, job: Job) -> None:
        """See :class:`~cdkd_edge.segment.many.crew.RunObserver`."""
        check()
        self._parts[index] = (0, 1)
        self._show()

    def tiles(self, index: int, done: int, total: int) -> None:
        """See :class:`~cdkd_edge.segment.many.crew.RunObserver`."""
        check()
        self._parts[index] = (done, total)
        if self._update:
            self._update(done, total)
        self._show()

    def finished(self, report: JobReport) -> None:
        """See :class:`~cdkd_edge.segment.many.crew.RunObserver`."""
        self.reports.append(report)
        if report.error is None and not self._as_json:
            describe_job(report).print()
        if report.error is not None:
            hint = f" — {report.error.hint}" if report.error.hint else ""
            named = "" if str(report.scene) in report.error.message else f"{report.scene}: "
            self._say(f"failed: {named}{report.error.message}{hint}")
        self._show()

    def note(self, text: str) -> None:
        """See :class:`~cdkd_edge.segment.many.crew.RunObserver`."""
        self._print(f"note: {text}", self._console or Console(stderr=True))

    def _say(self, text: str) -> None:
        if self._console:  # of one scene the error itself says it
            self._print(text, self._console)

    def _print(self, text: str, console: Console) -> None:
        console.print(cell(text), soft_wrap=True)

    def _show(self) -> None:
        if self._tell is None:
            return
        bad = sum(report.status == Status.FAILED for report in self.reports)
        tiles = sum(done for done, _ in self._parts.values())
        rate = tiles / max(1e-3, time.monotonic() - self._started)
        text = f"{len(self.reports)}/{self._scenes}, {rate:.1f} tiles/s" + (f", {bad} failed" if bad else "")
        under_way = sum(done / total for done, total in self._parts.values() if done < total and total)
        self._tell(text, len(self.reports) + min(under_way, 1.0))
