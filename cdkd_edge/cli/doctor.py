"""``cdkd-edge doctor``: what this machine can do, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.cli.options import JSON, WORKSPACE
from cdkd_edge.cli.report import Report, Rows
from cdkd_edge.core.errors import DoctorError, printable

if TYPE_CHECKING:
    from cdkd_edge.board.doctor import Diagnosis

_DOCUMENT_VERSION = 1


def doctor(workspace: Path = WORKSPACE, as_json: bool = JSON) -> None:
    """Show what this machine can do, what is wrong with it, and the command that repairs it. Changes nothing.

    Exits with 15 if something failed, else with 0; warnings do not count.
    """
    from cdkd_edge.board.doctor import examine

    diagnosis = examine(workspace)
    _describe(diagnosis).show(as_json)
    if diagnosis.failed:
        raise DoctorError(f"to be repaired: {', '.join(finding.name for finding in diagnosis.failed)}")


def _describe(diagnosis: Diagnosis) -> Report:
    rows: Rows = []
    for finding in diagnosis.findings:
        # Some of it comes from files, drivers and services.
        rows.append((finding.status, finding.name, printable(finding.text, 1000)))
        if finding.mend:
            rows.append(("", "", f"repair: {finding.mend}"))
    data = {"doctor_version": _DOCUMENT_VERSION, "counts": diagnosis.counts, "findings": diagnosis.findings}
    title = "this machine: " + ", ".join(f"{count} {status}" for status, count in diagnosis.counts.items())
    return Report(title, rows, data)
