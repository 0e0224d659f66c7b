"""Intel/AMD running average power limit counters, through Linux's powercap tree.

``/sys/class/powercap/intel-rapl:N/energy_uj`` counts microjoules and wraps at
``max_energy_range_uj``; since Linux 5.10 only root may read it.
Source: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from pathlib import Path

from cdkd_edge.board.power.protocol import CPU_PACKAGE, JOULES

POWERCAP = Path("/sys/class/powercap")


class RaplReader:
    """Energy of each CPU package."""

    name = "RAPL"
    scope = CPU_PACKAGE
    covers = "the processor, without memory modules, GPU and the rest of the machine"
    quantity = JOULES
    total: str | None = None

    def __init__(self, zones: dict[str, Path]) -> None:
        """Use ``probe`` instead; ``zones`` maps a rail's name to its powercap folder."""
        self._zones = zones
        self._range = {rail: _integer(zone / "max_energy_range_uj") for rail, zone in zones.items()}
        self._last: dict[str, int] = {}
        self._total = dict.fromkeys(zones, 0)

    @classmethod
    def probe(cls, root: Path = POWERCAP) -> tuple[RaplReader | None, str]:
        """Find packages by an actual reading.

        Returns:
            The source and an empty string, or None and the reason.
        """
        zones = {}
        for zone in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
            try:
                name = (zone / "name").read_text().strip()
            except OSError:
                continue
            if name.startswith("package"):
                zones[name] = zone
        if not zones:
            return None, f"RAPL: no CPU package under {root}"
        try:
            source = cls(zones)
            source.read()
        except (OSError, ValueError) as error:
            return None, f"RAPL: {error} (readable by root only on current kernels)"
        return source, ""

    def read(self) -> dict[str, float]:
        """Joules per package since the first reading, wrap-arounds undone.

        Raises:
            OSError, ValueError: a counter cannot be read.
        """
        for rail, zone in self._zones.items():
            now = _integer(zone / "energy_uj")
            step = now - self._last.get(rail, now)
            if step < 0:
                step += self._range[rail]
            self._last[rail] = now
            self._total[rail] += step
        return {rail: total / 1e6 for rail, total in self._total.items()}

    def close(self) -> None:
        """Nothing is held open."""


def _integer(path: Path) -> int:
    return int(path.read_text())
