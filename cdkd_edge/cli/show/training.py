"""What is shown of a decoder that was tuned, and while it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cdkd_edge.cli.show.live import duration, lines
from cdkd_edge.cli.show.table import Console, Report, cell, percent
from cdkd_edge.core.signals import check

if TYPE_CHECKING:
    from cdkd_edge.training.finetune import FinetuneResult, TrainingListener


def describe_finetune(result: FinetuneResult) -> Report:
    """``cdkd-edge finetune``."""
    from cdkd_edge.quality.metrics import METRICS

    run, scores = result.record["run"], result.record["scores"]
    rows = [
        *(("note", note) for note in result.record["notes"]),
        *(
            (name, "   ".join(f"{metric.label} {percent(row[key])}" for key, metric in METRICS.items()))
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
def live_training() -> Iterator[TrainingListener]:
    """Epochs as lines on stderr; below them a bar with the time left, or where nobody watches a line a minute."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell:
            yield _TrainingLines(console, tell)
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, left="")

        def tell_bar(text: str, **fields: Any) -> None:
            check()
            progress.update(task, description=text, **fields)

        yield _TrainingLines(console, tell_bar, has_bar=True)


class _TrainingLines:
    def __init__(self, console: Console, tell: Callable[..., None], has_bar: bool = False) -> None:
        self._console, self._tell, self._has_bar = console, tell, has_bar

    def step(self, text: str) -> None:
        self._tell(text)

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def batch(self, done: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        if self._has_bar:
            self._tell("training", completed=done, total=total, left=f"steps{left}")
        else:
            self._tell(f"training, step {done} of {total}{left}")

    def epoch(self, row: Mapping[str, Any], epochs: int, best: float | None, seconds_left: float) -> None:
        parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
        if row["mean_iou"] is not None:
            parts.append(f"validation mIoU {percent(row['mean_iou'])} (best {percent(best)})")
        if row["epoch"] < epochs:
            parts.append(f"{duration(seconds_left)} left")
        self._line("  ".join(parts))

    def _line(self, text: str) -> None:
        self._console.print(cell(text), soft_wrap=True)
