"""``cdkd-edge power``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cdkd_edge.board.power.sampler import SourceReport
from cdkd_edge.cli.show.table import Listing, Report


def describe_power(reports: Sequence[SourceReport]) -> Report:
    """Which sources answer, and why the others do not."""
    first = next((report for report in reports if report.info), None)
    rows = []
    listing = []
    for report in reports:
        if report.info is None:
            rows.append((report.name, f"not usable: {report.reason}" + (f" — {report.hint}" if report.hint else "")))
            continue
        rate = f"{report.rate:.1f} readings/s" if report.rate else "one reading"
        asked = f"(asked for {1 / report.info.interval:g})"
        rows.append((report.name, f"{report.info.scope}: {report.info.covers}; {rate} {asked}"))
        rows += [("", problem) for problem in report.problems]
        for rail in report.info.rails:
            watts = f"{report.watts[rail]:.2f}" if rail in report.watts else "not measured"
            listing.append((f"{report.name}  {rail}", watts, report.info.scope))
    title = f"power: {first.name} would be used" if first else "power: no source answers"
    data = {
        "used": first.name if first else None,
        "sources": [
            {
                "name": report.name,
                "usable": report.info is not None,
                "info": dataclasses.asdict(report.info) if report.info else None,
                "watts": report.watts,
                "rate": report.rate,
                "problems": list(report.problems),
                "reason": report.reason or None,
                "hint": report.hint,
            }
            for report in reports
        ],
    }
    return Report(title, tuple(rows), data, Listing(("rail", "W", "scope"), tuple(listing)) if listing else None)
