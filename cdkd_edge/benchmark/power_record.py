"""The record of a measured command or of an imported log: ``power.json``, and its JSON Schema.

``python -m cdkd_edge.benchmark.power_record > docs/schemas/power-1.json`` writes the published schema; its descriptions
are the docstrings and comments of the fields below.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from cdkd_edge import __version__
from cdkd_edge.benchmark.folder import write_trace
from cdkd_edge.benchmark.record import IDLE, LOAD, Phase, schema_of
from cdkd_edge.board.power import window as windows
from cdkd_edge.board.power.energy import Trace, bound_holds
from cdkd_edge.board.power.tegrastats import TegrastatsLog
from cdkd_edge.board.power.window import PowerWindow, RailWindow, Span, rail_windows
from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.files import write_text

POWER_VERSION: Final = 1
RECORD: Final = "power.json"


@dataclass(frozen=True)
class LogFile:
    """The log that figures come from."""

    path: str
    lines: int  # lines that were used
    other_lines: int  # lines that tegrastats did not write
    stamped: bool  # whether date stamps tell when lines were written; else they are taken to be an interval apart


@dataclass(frozen=True)
class PowerRecord:
    """Power and energy of a command, or of a log that tegrastats wrote."""

    command: tuple[str, ...] | None  # the command and its arguments; None for a log
    exit_code: int | None  # of the command; 128 + the number of the signal that ended it; None for a log
    log: LogFile | None  # None for a command
    seconds: float  # length of the window: the command's, or the log's without ``idle_seconds``
    idle_seconds: float  # time before it in which idle power was measured; 0: none
    source: str
    scope: str  # ``module``, ``GPU board`` or ``CPU package``; figures of different scopes cannot be compared
    covers: str
    total: str | None  # the rail that contains all others; None if no rail does
    rails: dict[str, RailWindow]
    readings_per_second: float | None  # None if there were fewer than two
    problems: tuple[str, ...]  # problems met while sampling, or in the log
    bound_holds: str  # the loads for which bounds hold, and their assumptions
    tool: str = field(default=f"cdkd-edge {__version__}")
    power_version: Literal[1] = 1


def record_of_command(command: tuple[str, ...], exit_code: int, window: PowerWindow) -> PowerRecord:
    """The record of a command that ran in a window."""
    words = tuple(map(_text, command))
    return _record(window.trace, window.span, window.idle, window.rails, command=words, exit_code=exit_code)


def record_of_log(log: TegrastatsLog, idle_seconds: float = 0.0) -> tuple[PowerRecord, Span, Span | None]:
    """The record of a log whose first ``idle_seconds`` were idle, its window, and the idle time before.

    Raises:
        UsageError: the log is not longer than that.
    """
    if not 0 <= idle_seconds < log.trace.stop:
        raise UsageError(f"--idle must be 0 or more, and less than the log's {log.trace.stop:.3g} s")
    idle = (0.0, idle_seconds) if idle_seconds else None
    span = (idle_seconds, log.trace.stop)
    file = LogFile(_text(str(log.path)), log.lines, log.other_lines, log.stamped)
    return _record(log.trace, span, idle, rail_windows(log.trace, span, idle, log.slack), log=file), span, idle


def _text(name: str) -> str:
    """A word that was typed, as JSON can hold it: bytes that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _record(
    trace: Trace,
    span: Span,
    idle: Span | None,
    rails: dict[str, RailWindow],
    *,
    command: tuple[str, ...] | None = None,
    exit_code: int | None = None,
    log: LogFile | None = None,
) -> PowerRecord:
    source = trace.source
    holds = bound_holds(source)
    if log is not None:
        holds += "; whether tegrastats averages between two lines is not documented"
        holds += "; the sensor's offset is not in it, because a log has no volts"
    return PowerRecord(
        command=command, exit_code=exit_code, log=log, seconds=span[1] - span[0],
        idle_seconds=idle[1] - idle[0] if idle else 0.0, source=source.name, scope=source.scope, covers=source.covers,
        total=source.total, rails=rails, readings_per_second=trace.rate,
        problems=tuple(problem.message for problem in trace.problems), bound_holds=holds,
    )  # fmt: skip


def write_record(folder: Path, record: PowerRecord, trace: Trace, span: Span, idle: Span | None) -> None:
    """Write ``power.json`` and every reading, as ``bench`` does, in ``trace.csv``."""
    import msgspec

    origin = idle[0] if idle else span[0]
    phases = [Phase(IDLE, 0, idle[0] - origin, idle[1] - origin)] if idle else []
    phases.append(Phase(LOAD, 0, span[0] - origin, span[1] - origin))
    write_trace(folder, trace, phases, origin)
    write_text(folder / RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n")


def power_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``power.json``."""
    modules = sys.modules[__name__], windows
    return schema_of(PowerRecord, modules, "Energy of a command or a log, by cdkd-edge", "power", POWER_VERSION)


if __name__ == "__main__":
    import json

    sys.stdout.write(json.dumps(power_schema(), indent=2, ensure_ascii=False) + "\n")
