"""Intel/AMD running average power limit counters, through Linux's powercap tree.

``/sys/class/powercap/intel-rapl:N/energy_uj`` counts microjoules and wraps at ``max_energy_range_uj``; since Linux 5.10
only root may read it. Source: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from cdkd_edge.board.power.protocol import CPU_PACKAGE, JOULES, UnusableSourceError


class RaplReader:
    """Energy of each CPU package."""

    name = "RAPL"
    scope = CPU_PACKAGE
    covers = "the processor, without memory modules, GPU and the rest of the machine"
    quantity = JOULES
    total: str | None = None

    def __init__(self, root: Path) -> None:
        """Find packages below ``root`` and take a first reading.

        Raises:
            UnusableSourceError: there is none, or it cannot be read.
        """
        self._zones: dict[str, Path] = {}
        for zone in sorted(root.glob("*-rapl:*")):
            with contextlib.suppress(OSError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package"):
                    self._zones[name] = zone
        if not self._zones:
            raise UnusableSourceError(f"RAPL: no CPU package under {root}")
        self._last: dict[str, int] = {}
        self._total = dict.fromkeys(self._zones, 0)
        try:
            self._range = {rail: _integer(zone / "max_energy_range_uj") for rail, zone in self._zones.items()}
            self.read()
        except (OSError, ValueError) as error:
            raise UnusableSourceError(f"RAPL: {error} (readable by root only on current kernels)") from None

    def read(self) -> dict[str, float]:
        """Joules per package since the first reading, corrected for wrap-arounds.

        Raises:
            OSError, ValueError: a counter cannot be read.
        """
        for rail, zone in self._zones.items():
            now = _integer(zone / "energy_uj")
            step = now - self._last.get(rail, now)
            self._last[rail] = now
            self._total[rail] += step if step >= 0 else step + self._range[rail]
        return {rail: total / 1e6 for rail, total in self._total.items()}

    def close(self) -> None:
        """Do nothing: no file is held open."""


def _integer(path: Path) -> int:
    return int(path.read_text())
