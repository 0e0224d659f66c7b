"""All probes, in the order of the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.doctor import board, resources, service
from cdkd_edge.board.doctor.finding import FAIL, OK, WARN, Finding
from cdkd_edge.board.doctor.service import User
from cdkd_edge.board.doctor.software import (
    Software,
    probe_binding,
    probe_cuda,
    probe_gpu,
    probe_packages,
    probe_python,
    probe_tensorrt,
    read_software,
)


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not work."""
        return tuple(finding for finding in self.findings if finding.status == FAIL)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by status."""
        counted = Counter(finding.status for finding in self.findings)
        return {status: counted[status] for status in (OK, WARN, FAIL)}


def examine(
    workspace: Path, *, root: Path = Path("/"), software: Software | None = None, user: User | None = None
) -> Diagnosis:
    """Look at this machine, or at a tree of files in its place.

    Args:
        workspace: where space on the disk is looked for.
        root: of the file tree.
        software: what is installed. Default: asked of this Python, with child processes.
        user: who asks. Default: the user of this process.
    """
    asks_jtop = service.socket_exists(root)
    software = software or read_software(ask_jtop=asks_jtop)
    user = user or service.current_user()
    return Diagnosis(
        (
            board.probe_board(root),
            board.probe_jetpack(root),
            probe_python(root, software),
            probe_packages(software),
            probe_gpu(root, software),
            probe_cuda(root, software),
            probe_tensorrt(root, software),
            probe_binding(software),
            service.probe_jtop_service(root, software),
            service.probe_jtop_group(root, user),
            board.probe_power_mode(root, software.nvpmodel),
            board.probe_clocks(root),
            board.probe_restore(root),
            resources.probe_memory(root),
            resources.probe_swap(root),
            resources.probe_disk(workspace),
        )
    )
