"""The measures of a distillation, step by step, as a table (CSV) beside the output, and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cdkd_edge.core.files import whole_file, write_text

_MEASURES = ("loss", "distillation", "teacher_pixels", "student_pixels", "classes")
_ROWS_WRITTEN_AT_ONCE = 20
_MOST_POINTS = 2000  # of a curve; more would be finer than the picture
_TITLES = {
    "loss": "loss",
    "distillation": "distillation",
    "teacher_pixels": "pixels, teacher",
    "student_pixels": "pixels, student",
    "classes": "classes",
}


def log_path(output: Path) -> Path:
    """Where the table of a run lies."""
    return output.with_name(f"{output.stem}.steps.csv")


def curves_path(output: Path) -> Path:
    """Where the picture of a run lies."""
    return output.with_name(f"{output.stem}.curves.png")


class MetricsLog:
    """Appends rows to the table of a run. Rows after ``step``, from which the run resumes, are taken away first."""

    def __init__(self, path: Path, pairs: int, step: int) -> None:
        by_pair = [f"{name}_{index + 1}" for name in ("missed", "spread") for index in range(pairs)]
        weights = ("weight_distillation", "weight_teacher_pixels", "weight_student_pixels")
        self.columns = (
            "step", "epoch", "seconds", "learning_rate", *_MEASURES, "ratio", "stage", *weights, *by_pair, "waited",
        )  # fmt: skip
        self.path = path
        kept = [row for row in read_log(path) if int(row["step"]) <= step] if step else []
        self._head = ",".join(self.columns) + "\n"
        write_text(path, self._head + self._lines(kept))
        self._waiting: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row; it is written with others, or by :meth:`flush`."""
        self._waiting.append(row)
        if len(self._waiting) >= _ROWS_WRITTEN_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self.path.exists():  # someone took it away: without its head no row could be read
            write_text(self.path, self._head)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._lines(self._waiting))
        self._waiting = []

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)
        return text.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file, or another. Rows that were cut off or damaged are left out."""
    if not path.exists():
        return []
    text = path.read_text("utf-8", "replace").replace("\0", "")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    if not {"step", "ratio", *_MEASURES} <= set(rows.fieldnames or ()):
        return []
    return [row for row in rows if row["step"].isdecimal() and None not in {*row, *row.values()}]


def write_curves(rows: list[dict[str, str]], transitions: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses, and below them the ratio of the reconstructions with the stages, against the step (PNG).

    Args:
        rows: of :func:`read_log`.
        transitions: of :class:`.schedule.Schedule`.
        path: where to.
    """
    rows = rows[:: max(1, len(rows) // _MOST_POINTS)]
    steps = [int(row["step"]) for row in rows]
    losses = {name: [float(row[name]) for row in rows] for name in _MEASURES[1:]}
    losses = {name: values for name, values in losses.items() if any(values)}
    ratio = [float(row["ratio"]) for row in rows if row["ratio"]]
    with style.context("default"):
        figure = Figure(figsize=(6.5, 4.5 if ratio else 3), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 if ratio else 1, squeeze=False, sharex=True)[:, 0]
        for name, values in losses.items():
            axes[0].plot(steps, values, linewidth=0.4, alpha=0.35)
            axes[0].plot(steps, _smooth(values), color=axes[0].lines[-1].get_color(), label=_TITLES[name])
        axes[0].set_ylabel("loss")
        axes[0].set_ylim(bottom=0)
        if losses:
            axes[0].legend()
        if ratio:
            axes[1].plot(steps[-len(ratio) :], ratio, color="#595959")
            axes[1].set_ylabel("pixels, teacher / student")
            for change in transitions:
                axes[1].axvline(change["step"], color="#d55e00", linewidth=1)
                axes[1].annotate(change["stage"], (change["step"], max(ratio)), rotation=90, va="top", ha="right")
        axes[-1].set_xlabel("step")
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png")


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """A running mean, a plain mean at first."""
    found: list[float] = []
    for index, value in enumerate(values):
        keep = min(decay, 1 - 1 / (index + 1))
        found.append(value if not found else keep * found[-1] + (1 - keep) * value)
    return found
