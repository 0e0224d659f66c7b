"""What `cdkd-edge doctor` shows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.table import Console, Listing, Report, cell
from cdkd_edge.core.errors import printable

if TYPE_CHECKING:
    from cdkd_edge.board.doctor import Diagnosis

DOCTOR_VERSION = 1


def describe_diagnosis(diagnosis: Diagnosis) -> Report:
    """``cdkd-edge doctor``: one line for each thing, and below it what mends it."""
    rows = []
    for finding in diagnosis.findings:
        # Some of it comes from files, drivers and services.
        rows.append((finding.status, finding.name, printable(finding.text, 1000)))
        if finding.mend:
            rows.append(("", "", f"mend: {finding.mend}"))
    counts = diagnosis.counts
    data = {
        "doctor_version": DOCTOR_VERSION,
        "counts": counts,
        "findings": [dataclasses.asdict(finding) for finding in diagnosis.findings],
    }
    title = "this machine: " + ", ".join(f"{count} {status}" for status, count in counts.items())
    return DoctorReport(title, (), data, Listing(("", "what", "found"), tuple(rows)))


class DoctorReport(Report):
    """A report whose listing reads from left to right."""

    def print(self) -> None:
        """Print findings to stdout, statuses in colour on a terminal."""
        from rich.table import Table

        console = Console()
        colors = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for status, name, text in self.listing.rows if self.listing else ():
            table.add_row(cell(status, colors.get(status, "")), cell(name), cell(text))
        console.print(cell(self.title, "bold"))
        console.print(table)
