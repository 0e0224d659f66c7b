"""A run's folder: ``summary.json`` and the tables beside it, written and read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cdkd_edge.benchmarks.record import SUMMARY_VERSION, BenchSummary, Span
from cdkd_edge.errors import BenchError
from cdkd_edge.files import write_text
from cdkd_edge.power.protocol import JOULES, WATTS
from cdkd_edge.power.trace import Trace

SUMMARY, TILES, TRACE, CONDITIONS = "summary.json", "tiles.csv", "trace.csv", "conditions.csv"
PICTURE, PAGE = "trace.png", "report.html"

_UNITS = {WATTS: "w", JOULES: "j"}


@dataclass(frozen=True)
class TimedBatch:
    """One run of the engine in a warm-up or load phase."""

    repeat: int
    phase: str
    start: float
    """s from the start of the run."""
    latency: float
    """s."""


@dataclass(frozen=True)
class Series:
    """A column against time: moments (s from the start of the run) and values; what could not be read is not there."""

    times: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A run read back."""

    folder: Path
    summary: BenchSummary
    tiles: tuple[TimedBatch, ...]
    watts: dict[str, Series]
    """Per rail; empty without power. Of a counter, the mean watts of each step at its middle."""
    conditions: dict[str, Series]
    """Per column of ``conditions.csv``, whose names end in their units."""


def write_summary(folder: Path, summary: BenchSummary) -> None:
    """Write ``summary.json``.

    Raises:
        ValueError: a number in it is infinite or none; in JSON it would silently become null.
    """
    import msgspec

    _require_finite(msgspec.to_builtins(summary), "summary")
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
    write_text(folder / SUMMARY, text + "\n")


def _require_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    if isinstance(value, dict):
        for name, one in value.items():
            _require_finite(one, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            _require_finite(one, f"{where}[{index}]")


def write_tiles(folder: Path, batches: Iterable[TimedBatch]) -> None:
    """Write ``tiles.csv``: every run of the engine, warm-up included."""
    rows = (
        (one.repeat, one.phase, number, f"{one.start:.6f}", f"{one.latency * 1e3:.3f}")
        for number, one in enumerate(batches)
    )
    _write(folder / TILES, ("repeat", "phase", "batch", "start_s", "latency_ms"), rows)


def write_trace(folder: Path, trace: Trace, spans: Sequence[Span], origin: float) -> None:
    """Write ``trace.csv``: every reading, in the source's own quantity.

    Args:
        folder: of the run.
        trace: what was sampled.
        spans: phases; a reading outside all of them has neither repeat nor phase.
        origin: start of the run, s on CLOCK_MONOTONIC.
    """
    rails, unit = trace.source.rails, _UNITS[trace.source.quantity]
    rows = []
    for sample in trace.samples:
        time = sample.time - origin
        span = next((span for span in spans if span.start <= time < span.stop), None)
        place = (span.repeat, span.name) if span else ("", "")
        values = (f"{sample.values[rail]:.6f}" if rail in sample.values else "" for rail in rails)
        rows.append((f"{time:.6f}", f"{sample.uncertainty:.6f}", *place, *values))
    _write(folder / TRACE, ("time_s", "uncertainty_s", "repeat", "phase", *(f"{rail}_{unit}" for rail in rails)), rows)


def write_conditions(folder: Path, rows: Sequence[tuple[float, dict[str, float]]]) -> None:
    """Write ``conditions.csv``: moments (s from the start of the run) and what the board said; absent is empty."""
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    table = (
        (f"{time:.3f}", *(f"{values[name]:g}" if name in values else "" for name in names)) for time, values in rows
    )
    _write(folder / CONDITIONS, ("time_s", *names), table)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_summary(folder: Path) -> BenchSummary:
    """Read and check ``summary.json`` of a run's folder.

    Raises:
        BenchError: there is none, it is damaged, or of another version.
    """
    import msgspec

    path = folder / SUMMARY
    try:
        document = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise BenchError(f"{folder} is no benchmark run: there is no {SUMMARY} in it") from None
    except (OSError, UnicodeDecodeError, RecursionError, msgspec.DecodeError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    version = document.get("summary_version") if isinstance(document, dict) else None
    if version != SUMMARY_VERSION:
        raise BenchError(
            f"{path} has summary version {version}; this release reads {SUMMARY_VERSION}",
            hint="measure again with `cdkd-edge bench`",
        )
    try:
        return msgspec.convert(document, BenchSummary)
    except msgspec.ValidationError as error:
        raise BenchError(f"{path} is damaged: {error}") from None


def read_run(folder: Path) -> Run:
    """Read a run's folder, its tables included.

    Raises:
        BenchError: a file is missing or damaged.
    """
    summary = read_summary(folder)
    tiles = []
    for row in _rows(folder / TILES, ("repeat", "phase", "start_s", "latency_ms")):
        try:
            start, latency = _number(row["start_s"]), _number(row["latency_ms"])
            if start is None or latency is None:
                raise ValueError
            tiles.append(TimedBatch(int(row["repeat"]), row["phase"], start, latency / 1e3))
        except ValueError:
            raise BenchError(f"{folder / TILES} is damaged") from None
    watts: dict[str, Series] = {}
    if (folder / TRACE).exists():
        for name, series in _columns(folder / TRACE, ("uncertainty_s", "repeat", "phase")).items():
            rail, _, unit = name.rpartition("_")
            watts[rail] = _steps(series) if unit == _UNITS[JOULES] else series
    conditions = _columns(folder / CONDITIONS, ()) if (folder / CONDITIONS).exists() else {}
    return Run(folder, summary, tuple(tiles), watts, conditions)


def _steps(counter: Series) -> Series:
    """Mean watts between two readings of a counter; where it began anew there is none."""
    steps = [
        ((t1 + t2) / 2, (v2 - v1) / (t2 - t1))
        for (t1, v1), (t2, v2) in pairwise(zip(counter.times, counter.values, strict=True))
        if t2 > t1 and v2 >= v1
    ]
    return Series(tuple(time for time, _ in steps), tuple(watts for _, watts in steps))


def _columns(path: Path, others: Sequence[str]) -> dict[str, Series]:
    """Every numeric column of a table with ``time_s``."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in _rows(path, ("time_s", *others)):
        for name, text in row.items():
            if name == "time_s" or name in others:
                continue
            times, values = columns.setdefault(name, ([], []))
            try:
                time, value = _number(row["time_s"]), _number(text)
            except ValueError:
                raise BenchError(f"{path} is damaged") from None
            if time is not None and value is not None:
                times.append(time)
                values.append(value)
    return {name: Series(tuple(times), tuple(values)) for name, (times, values) in columns.items()}


def _number(text: str | None) -> float | None:
    """A finite number; None where there is no text.

    Raises:
        ValueError: it is none.
    """
    if not text:
        return None
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _rows(path: Path, expected: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            missing = set(expected) - set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    if missing or any(None in row for row in rows):
        raise BenchError(f"{path} is damaged: " + (f"no column {min(missing)}" if missing else "rows of other lengths"))
    return rows
