"""The command about the machine itself: doctor."""

from __future__ import annotations

from pathlib import Path

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import show
from cdkd_edge.cli.options import JsonOption, WorkspaceOption


@app.command()
def doctor(workspace: WorkspaceOption = Path(), as_json: JsonOption = False) -> None:
    """What this machine is and can do; what is wrong, and the command that mends it. Changes nothing.

    Leaves with 0 unless something failed, then with 15. Warnings do not count.
    """
    from cdkd_edge.board.doctor.examine import examine
    from cdkd_edge.cli.show.doctor import describe_diagnosis
    from cdkd_edge.core.errors import DoctorError

    diagnosis = examine(workspace)
    show(describe_diagnosis(diagnosis), as_json)
    if diagnosis.failed:
        raise DoctorError(f"to be mended: {', '.join(finding.name for finding in diagnosis.failed)}")
