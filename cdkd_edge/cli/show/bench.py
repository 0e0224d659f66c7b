"""What ``cdkd-edge bench`` shows: a status line while it measures, then one table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.live import lines
from cdkd_edge.cli.show.table import Console, Listing, Report, cell, plain
from cdkd_edge.core.signals import check

if TYPE_CHECKING:
    from cdkd_edge.bench.phases import LiveStatus
    from cdkd_edge.bench.record import BenchSummary


def describe_bench(summary: BenchSummary, folder: Path) -> Report:
    """``cdkd-edge bench``."""
    from cdkd_edge.bench.describe import ORIN_NX, PAPER, bench_rows, beside_the_paper

    paper = beside_the_paper(summary)
    listing = Listing(("", "this run", f"{ORIN_NX.device}, {PAPER}"), paper) if paper else None
    return Report(
        f"benchmark {folder}",
        tuple(bench_rows(summary)),
        {"folder": str(folder), "summary": plain(summary)},
        listing,
    )


@contextlib.contextmanager
def live_bench() -> Iterator[tuple[Callable[[str], None], Callable[[LiveStatus], None]]]:
    """A status line on stderr. It is drawn only when it changes, because drawing takes time from the measurement."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell:
            yield tell, lambda live: tell(live_text(live))
        return

    from rich.live import Live as LiveLine

    with LiveLine(console=console, auto_refresh=False, transient=True) as line:

        def draw(text: str) -> None:
            check()
            line.update(cell(text), refresh=True)

        yield draw, lambda live: draw(live_text(live))


def live_text(live: LiveStatus) -> str:
    """The line, e.g. ``load 2/3   12.41 tiles/s   18.9 W   61 °C   34 s left``."""
    parts = [live.phase + (f" {min(live.repeat + 1, live.repeats)}/{live.repeats}" if live.repeats > 1 else "")]
    for value, form in (
        (live.tiles_per_second, "{:.2f} tiles/s"),
        (live.watts, "{:.1f} W"),
        (live.celsius, "{:.0f} °C"),
        (live.seconds_left, "{:.0f} s left" if live.phase != "warm-up" else "{:.0f} s left at most"),
    ):
        if value is not None:
            parts.append(form.format(value))
    return "   ".join(parts)
