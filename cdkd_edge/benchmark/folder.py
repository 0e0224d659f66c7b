"""Write and read the folder of a run: ``summary.json`` and the tables beside it."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cdkd_edge.benchmark.record import LOAD, SUMMARY_VERSION, WARM_UP, BenchSummary, Phase
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.protocol import JOULES, WATTS
from cdkd_edge.core.errors import BenchError, printable
from cdkd_edge.core.files import read_json, read_small, write_text

SUMMARY, TILES, TRACE, CONDITIONS = "summary.json", "tiles.csv", "trace.csv", "conditions.csv"
LAYERS, PICTURE, PAGE = "layers.csv", "trace.png", "report.html"

MOST = 1e15  # largest number that is accepted, in any unit
MOST_TABLE = 64 << 20  # largest table that is read, bytes: 1.6 million batches
MOST_COLUMNS = 1000

_UNITS = {WATTS: "w", JOULES: "j"}


@dataclass(frozen=True)
class TimedBatch:
    """A batch in a warm-up or load phase."""

    repeat: int
    phase: str
    start: float  # s from the start of the run
    latency: float  # s


@dataclass(frozen=True)
class Series:
    """A column of a table: times (s from the start of the run) and values, without those that could not be read."""

    times: tuple[float, ...]
    values: tuple[float, ...]

    def within(self, phase: Phase) -> tuple[float, ...]:
        """The values that were read in a phase."""
        points = zip(self.times, self.values, strict=True)
        return tuple(value for time, value in points if phase.start <= time < phase.stop)


@dataclass(frozen=True)
class Run:
    """A run, read from its folder."""

    folder: Path
    summary: BenchSummary
    tiles: tuple[TimedBatch, ...]
    # By rail; empty without power. For a counter of joules: the mean watts between two readings, at their middle.
    watts: dict[str, Series]
    conditions: dict[str, Series]  # by column of ``conditions.csv``; names end in their units


def write_summary(folder: Path, summary: BenchSummary) -> None:
    """Write ``summary.json``; ValueError if a number is infinite or NaN, which would silently become null in JSON."""
    import msgspec

    for where, number in _numbers(msgspec.to_builtins(summary), "summary"):
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}")
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
    write_text(folder / SUMMARY, text + "\n")


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """All numbers in JSON data, with their places."""
    if isinstance(value, float | int):
        yield where, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _numbers(one, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _numbers(one, f"{where}[{index}]")


def write_tiles(folder: Path, batches: Iterable[TimedBatch]) -> None:
    """Write ``tiles.csv``: every batch, including those of the warm-up."""
    rows = (
        (one.repeat, one.phase, number, f"{one.start:.6f}", f"{one.latency * 1e3:.3f}")
        for number, one in enumerate(batches)
    )
    _write(folder / TILES, ("repeat", "phase", "batch", "start_s", "latency_ms"), rows)


def write_trace(folder: Path, trace: Trace, phases: Sequence[Phase], origin: float) -> None:
    """Write ``trace.csv``: every power reading, in watts or joules as the source gives them.

    ``origin`` is the start of the run, s on CLOCK_MONOTONIC. Outside all phases, repeat and phase are empty.
    """
    rails, unit = trace.source.rails, _UNITS[trace.source.quantity]
    rows = []
    for sample in trace.samples:
        time = sample.time - origin
        place = next(((one.repeat, one.name) for one in phases if one.start <= time < one.stop), ("", ""))
        values = (f"{sample.values[rail]:.6f}" if rail in sample.values else "" for rail in rails)
        rows.append((f"{time:.6f}", f"{sample.uncertainty:.6f}", *place, *values))
    _write(folder / TRACE, ("time_s", "uncertainty_s", "repeat", "phase", *(f"{rail}_{unit}" for rail in rails)), rows)


def write_conditions(folder: Path, rows: Sequence[tuple[float, dict[str, float]]]) -> None:
    """Write ``conditions.csv`` from rows of time (s from the start of the run) and values; missing ones stay empty."""
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    table = (
        (f"{time:.3f}", *(f"{values[name]:g}" if name in values else "" for name in names)) for time, values in rows
    )
    _write(folder / CONDITIONS, ("time_s", *names), table)


def write_layers(folder: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write ``layers.csv``: name, part of the network, block and milliseconds of every kernel."""
    _write(folder / LAYERS, ("kernel", "layer", "block", "ms"), rows)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_summary(folder: Path) -> BenchSummary:
    """Read and check the ``summary.json`` of a run.

    Raises:
        BenchError: the file is missing, damaged, or of another version.
    """
    import msgspec

    path = folder / SUMMARY
    try:
        document = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BenchError(f"{folder} is not a benchmark run: it has no {SUMMARY}") from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {_reason(error)}") from None
    version = document.get("summary_version") if isinstance(document, dict) else None
    if version != SUMMARY_VERSION:
        raise BenchError(
            f"{path} has summary version {version}; this release reads {SUMMARY_VERSION}",
            hint="measure again with `cdkd-edge bench`",
        )
    try:
        for where, number in _numbers(document, "summary"):
            if not abs(number) <= MOST:
                raise ValueError(f"{where} is {number:.3g}")
        return msgspec.convert(document, BenchSummary)
    except (msgspec.ValidationError, ValueError) as error:
        raise BenchError(f"{path} is damaged: {error}") from None


def read_run(folder: Path, *, curves: bool = True, bounded: bool = True) -> Run:
    """Read the folder of a run; without ``curves``, only its summary and batches.

    ``bounded`` refuses tables that are larger than a run of this length writes.

    Raises:
        BenchError: a file is missing or damaged.
    """
    summary = read_summary(folder)
    seconds = max((phase.stop for phase in summary.phases), default=0.0)
    # 25,000 batches a second in rows of 40 bytes, and a margin.
    most = int(min(MOST_TABLE, 4e6 + 1e6 * max(0.0, seconds))) if bounded else None
    tiles = _read_tiles(folder / TILES, most)
    watts: dict[str, Series] = {}
    if curves and (folder / TRACE).exists():
        for name, series in _columns(folder / TRACE, ("uncertainty_s", "repeat", "phase"), most).items():
            rail, _, unit = name.rpartition("_")
            watts[rail] = _steps(series) if unit == _UNITS[JOULES] else series
    conditions = _columns(folder / CONDITIONS, (), most) if curves and (folder / CONDITIONS).exists() else {}
    return Run(folder, summary, tiles, watts, conditions)


def _read_tiles(path: Path, most: int | None) -> tuple[TimedBatch, ...]:
    tiles = []
    for row in _rows(path, ("repeat", "phase", "start_s", "latency_ms"), most):
        try:
            repeat, phase = int(row["repeat"]), sys.intern(row["phase"])
            start, latency = _number(row["start_s"]), _number(row["latency_ms"])
            if start is None or latency is None or start < 0 or latency < 0 or phase not in (WARM_UP, LOAD):
                raise ValueError
        except (TypeError, ValueError):
            raise BenchError(f"{path} is damaged: {printable(str(dict(row)), 200)} is not a batch") from None
        tiles.append(TimedBatch(repeat, phase, start, latency / 1e3))
    return tuple(tiles)


def _steps(counter: Series) -> Series:
    """Mean watts between two readings of a counter of joules, except where it was reset."""
    pairs = pairwise(zip(counter.times, counter.values, strict=True))
    kept = [(t1, v1, t2, v2) for (t1, v1), (t2, v2) in pairs if t2 > t1 and v2 >= v1]
    watts = tuple((v2 - v1) / (t2 - t1) for t1, v1, t2, v2 in kept)
    return Series(tuple((t1 + t2) / 2 for t1, _, t2, _ in kept), watts)


def _columns(path: Path, others: Sequence[str], most: int | None) -> dict[str, Series]:
    """The columns of a table with ``time_s``, except ``others``."""
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(path, ("time_s", *others), most):
        for name in (name for name in row if name not in ("time_s", *others)):
            try:
                time, value = _number(row["time_s"]), _number(row[name])
            except ValueError:
                raise BenchError(f"{path} is damaged") from None
            points = columns.setdefault(name, [])
            if time is not None and value is not None:
                points.append((time, value))
    return {name: Series(*zip(*points, strict=True)) if points else Series((), ()) for name, points in columns.items()}


def _number(text: str | None) -> float | None:
    """The number in a cell; None if the cell is empty; ValueError if it is not a possible number."""
    number = float(text) if text else None
    if number is not None and not abs(number) <= MOST:
        raise ValueError(text)
    return number


def _rows(path: Path, expected: Sequence[str], most: int | None) -> Iterator[dict[str, str]]:
    try:
        content = path.read_bytes() if most is None else read_small(path, most)
        reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline=""))
        names = reader.fieldnames or ()
        if missing := set(expected) - set(names):
            raise BenchError(f"{path} is damaged: no column {min(missing)}")
        if len(names) > MOST_COLUMNS:
            raise BenchError(f"{path} is damaged: it has {len(names)} columns")
        for row in reader:
            if None in row or None in row.values():
                raise BenchError(f"{path} is damaged: rows differ in length")
            yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The error without the name of the file."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
