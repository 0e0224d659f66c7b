"""What a probe found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
"""``warn``: works, but less well or less measurably. ``fail``: something that is needed here does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str
    """``ok``, ``warn`` or ``fail``."""
    text: str
    mend: str | None = None
    """The command that mends it."""
    data: dict[str, Any] = field(default_factory=dict)
