"""What is shown of a decoder that was tuned, and while it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cdkd_edge.interrupts import check
from cdkd_edge.report.table import Console, Report, cell, percent

if TYPE_CHECKING:
    from cdkd_edge.training.finetune import FinetuneResult, Listener


def describe_finetune(result: FinetuneResult) -> Report:
    """``cdkd-edge finetune``."""
    run, scores = result.record["run"], result.record["scores"]
    rows = [
        *(("note", note) for note in result.record["notes"]),
        *(
            (name, f"mIoU {percent(row['mean_iou'])}   OA {percent(row['overall_accuracy'])}")
            for name, row in scores.items()
        ),
        *((f"IoU {name}", percent(iou)) for name, iou in next(iter(scores.values()))["iou"].items()),
        ("time", f"{run['seconds'] / 60:.1f} min on {run['device']}"),
        ("card", str(result.card)),
        ("next", f"cdkd-edge export {result.checkpoint}"),
    ]
    data = {"path": str(result.checkpoint), "card": str(result.card), "training": dict(result.record)}
    return Report(f"checkpoint {result.checkpoint}", tuple(rows), data)


@contextlib.contextmanager
def live_training() -> Iterator[Listener]:
    """Epochs as lines on stderr, and below them a bar with the time left where somebody watches."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _TrainingLines(console, progress)


_LINE_EVERY_S = 60.0
"""A log file without a bar gets a line at least this often."""


class _TrainingLines:
    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("", total=None, left="")
        self._last_line = time.monotonic()

    def step(self, text: str) -> None:
        check()
        self._progress.update(self._task, description=text)

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        check()
        left = "" if seconds_left is None else f"{_duration(seconds_left)} left"
        self._progress.update(self._task, description="training", completed=done, total=total, left=f"steps, {left}")
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._line(f"step {done}/{total}  {left}")

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
        if row["mean_iou"] is not None:
            parts.append(f"validation mIoU {percent(row['mean_iou'])} (best {percent(best)})")
        if row["epoch"] < epochs:
            parts.append(f"{_duration(seconds_left)} left")
        self._line("  ".join(parts))

    def _line(self, text: str) -> None:
        self._console.print(cell(text), soft_wrap=True)
        self._last_line = time.monotonic()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min"
