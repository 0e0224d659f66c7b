"""``cdkd-edge power``: which sources of power answer here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typer import Option

from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.cli.options import JSON
from cdkd_edge.cli.report import Listing, Report, Rows, fields_of
from cdkd_edge.core.numbers import ABSENT, significant

if TYPE_CHECKING:
    from cdkd_edge.board.power.sampler import SourceReport


def power(
    source: str | None = Option(None, help=f"Only this one: {', '.join(SOURCES)}. Default: all."),
    seconds: float = Option(2.0, help="How long to read, seconds.", min=0.2, max=3600),
    interval: float = Option(0.1, help="Time between readings to ask for, seconds.", min=0.02, max=60),
    as_json: bool = JSON,
) -> None:
    """Show which sources of power answer here: what they cover, watts now, readings per second; or why none does.

    Exits with 16 if the one that --source names cannot be used.
    """
    from cdkd_edge.board.power.sampler import list_sources
    from cdkd_edge.core.errors import PowerError

    reports = list_sources(source, seconds, interval)
    if source is not None and reports[0].info is None:
        raise PowerError(reports[0].reason, hint=reports[0].hint)
    _describe(reports).show(as_json)


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
