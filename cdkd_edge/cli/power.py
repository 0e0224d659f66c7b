"""``cdkd-edge power``: which sources of power answer here; energy of any command, or of a log of tegrastats."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer import Argument, BadParameter, Option

from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.cli.options import JSON
from cdkd_edge.cli.report import Listing, Report, Rows, fields_of, new_folder, say
from cdkd_edge.core.errors import CommandError, PowerError
from cdkd_edge.core.numbers import ABSENT, duration, estimate, significant

if TYPE_CHECKING:
    from cdkd_edge.benchmark.power_record import PowerRecord
    from cdkd_edge.board.power.sampler import SourceReport
    from cdkd_edge.board.power.window import RailWindow

_IDLE = 5.0  # seconds before a command in which idle power is measured
_INTERVAL = 0.1  # seconds between readings that are asked for


def power(
    command: list[str] | None = Argument(
        None, metavar="COMMAND", help="With --run: the command and its arguments, behind --."
    ),
    run: bool = Option(False, help="Run COMMAND and measure its energy. Its table goes to stderr when it has ended."),
    log: Path | None = Option(
        None, "--import", help="Measure from a log of `tegrastats --interval MS --logfile FILE`.", metavar="FILE"
    ),
    source: str | None = Option(None, help=f"Only this one: {', '.join(SOURCES)}. Default: all; the first that works."),
    seconds: float | None = Option(None, help="How long to read, seconds. Default: 2.", min=0.2, max=3600),
    interval: float | None = Option(
        None,
        help="Time between readings to ask for, seconds. Default: 0.1. With --import: between lines without dates.",
        min=0.02,
        max=60,
    ),
    idle: float | None = Option(
        None,
        help="Time of idle power, seconds, for net energy: before COMMAND (default 5), or at the log's begin (0).",
        min=0,
        max=3600,
    ),
    output: Path | None = Option(None, "--output", "-o", help="New folder for power.json and every reading as CSV."),
    as_json: bool = JSON,
) -> None:
    """Show which sources of power answer here, or measure the energy of any command: `power --run -- COMMAND ARGS...`

    With --run, stdin, stdout and the exit code are the command's own. With --json as well, stdout is our JSON alone and
    the command's stdout goes to stderr; `-o` leaves both as they are. Exits with 16 if there is no source of power, and
    with 127 if the command cannot be started.
    """
    _require_sense(bool(command), run, log is not None, {"--seconds": seconds, "--source": source, "--idle": idle})
    with new_folder(output) as folder:
        if run:
            code = _run(tuple(command or ()), source, interval, _IDLE if idle is None else idle, folder, as_json)
        elif log is not None:
            code = _import(log, interval, idle or 0.0, folder, as_json)
        elif output is not None:
            raise BadParameter("only --run and --import have something to write", param_hint="--output")
        else:
            code = _list(source, seconds, interval, as_json)
    if code:
        raise typer.Exit(code)


def _require_sense(command: bool, run: bool, log: bool, given: dict[str, Any]) -> None:
    """Refuse options that do not go together."""
    if run and log:
        raise BadParameter("choose one of --run and --import", param_hint="--import")
    if run and not command:
        raise BadParameter("it needs a command: cdkd-edge power --run -- COMMAND ARGS...", param_hint="--run")
    if command and not run:
        raise BadParameter("to measure a command, put --run before it", param_hint="COMMAND")
    for option in ("--idle",) if not (run or log) else ("--seconds", "--source")[: 2 if log else 1]:
        if given[option] is not None:
            here = "--import" if log else "--run" if run else "a list of sources"
            raise BadParameter(f"it means nothing to {here}", param_hint=option)


def _list(source: str | None, seconds: float | None, interval: float | None, as_json: bool) -> int:
    from cdkd_edge.board.power.sampler import list_sources

    reports = list_sources(source, seconds or 2.0, interval or _INTERVAL)
    if source is not None and reports[0].info is None:
        raise PowerError(reports[0].reason, hint=reports[0].hint)
    _describe(reports).show(as_json)
    return 0


def _run(
    command: tuple[str, ...],
    source: str | None,
    interval: float | None,
    idle: float,
    folder: Path | None,
    as_json: bool,
) -> int:
    from cdkd_edge.benchmark.power_record import record_of_command, write_record
    from cdkd_edge.board.power.window import open_window
    from cdkd_edge.core.process import run_in_foreground

    if shutil.which(command[0]) is None:  # known before idle power is measured
        hint = "name a program on PATH or give its path; for words of a shell: --run -- sh -c 'WORDS'"
        raise CommandError(f"{command[0]} is no command that can be run", hint=hint)
    if idle:
        say(f"measuring idle power for {idle:g} s, then running {command[0]}")
    with open_window(command[0], source=source, interval=interval or _INTERVAL, idle=idle) as window:
        try:
            code = run_in_foreground(command, sys.stderr if as_json else None)
        except OSError as error:
            raise CommandError(f"{command[0]} cannot be started: {error.strerror}") from None
    record = record_of_command(command, code, window)
    if folder is not None:
        write_record(folder, record, window.trace, window.span, window.idle)
    describe_power(record, f"power of {shlex.join(command)}").show(as_json, stderr=not as_json)
    return code


def _import(log: Path, interval: float | None, idle: float, folder: Path | None, as_json: bool) -> int:
    from cdkd_edge.benchmark.power_record import record_of_log, write_record
    from cdkd_edge.board.power.tegrastats import read_log

    read = read_log(log, interval)
    record, span, rest = record_of_log(read, idle)
    if folder is not None:
        write_record(folder, record, read.trace, span, rest)
    describe_power(record, f"power in {log}").show(as_json)
    return 0


def describe_power(record: PowerRecord, title: str) -> Report:
    """What was measured of a command or in a log."""
    rows: Rows = [("time", duration(record.seconds))]
    if record.exit_code:
        rows.append(("exit code", str(record.exit_code)))
    if record.idle_seconds:
        rows.append(("idle before", duration(record.idle_seconds)))
    rate = f"{significant(record.readings_per_second)} readings/s" if record.readings_per_second else "one reading"
    rows.append((record.source, f"{record.scope}: {record.covers}; {rate}"))
    rows += [("", problem) for problem in record.problems]
    for reason in dict.fromkeys(rail.reason for rail in record.rails.values() if rail.reason):
        which = [name for name, rail in record.rails.items() if rail.reason == reason]
        rows.append(("no joules", reason if len(which) == len(record.rails) else f"{', '.join(which)}: {reason}"))
    rows.append(("± holds", record.bound_holds))
    table = tuple((name, *_figures(rail)) for name, rail in record.rails.items())
    columns = ("rail", "J", "W", "net J", "net W", "idle W")
    return Report(title, rows, record, (Listing(columns, table),))


def _figures(rail: RailWindow) -> tuple[str, ...]:
    pairs = ((rail.joules, rail.bound_joules), (rail.watts, rail.bound_watts), (rail.net_joules, rail.net_bound_joules))
    shown = [
        ABSENT if value is None or bound is None else estimate(value, value - bound, value + bound, digits=4)
        for value, bound in pairs
    ]
    net_watts = None if rail.net_watts is None else round(rail.net_watts, 3)  # a difference may be a rounding error
    return (*shown, significant(net_watts), significant(rail.idle_watts))


def _describe(reports: Sequence[SourceReport]) -> Report:
    first = next((report for report in reports if report.info), None)
    rows: Rows = []
    watts: list[tuple[str, ...]] = []
    for report in reports:
        if report.info is None:
            rows.append((report.name, f"not usable: {report.reason}" + (f" — {report.hint}" if report.hint else "")))
            continue
        rate = f"{significant(report.rate)} readings/s" if report.rate else "one reading"
        asked = f"(asked for {1 / report.info.interval:g})"
        rows.append((report.name, f"{report.info.scope}: {report.info.covers}; {rate} {asked}"))
        rows += [("", problem) for problem in report.problems]
        for rail in report.info.rails:
            read = significant(report.watts[rail], 4) if rail in report.watts else ABSENT
            watts.append((f"{report.name}  {rail}", read, report.info.scope))
    title = f"power: {first.name} would be used" if first else "power: no source answers"
    names = ("name", "info", "watts", "rate", "problems", "hint")
    sources = [
        {**fields_of(report, *names), "usable": report.info is not None, "reason": report.reason or None}
        for report in reports
    ]
    data = {"used": first.name if first else None, "sources": sources}
    return Report(title, rows, data, (Listing(("rail", "W", "scope"), tuple(watts)),) if watts else ())
