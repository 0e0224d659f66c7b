"""The doctor: what works on this machine, and how to repair what does not.

A probe is a function that returns a :class:`Finding`; :mod:`.examine` lists the probes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
"""``warn``: works, but less well or less measurably. ``fail``: something that is needed here does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str  # :data:`OK`, :data:`WARN` or :data:`FAIL`
    text: str
    mend: str | None = None  # the command that repairs it
    data: dict[str, Any] = field(default_factory=dict)


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
