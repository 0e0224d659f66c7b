"""``/etc/nvpmodel.conf``: power modes of a Jetson. Their numbers differ between boards: read, never assumed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cdkd_edge.core.errors import printable

CONFIG = "/etc/nvpmodel.conf"
_MODE = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>\s*$")
_DEFAULT = re.compile(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", re.MULTILINE)


@dataclass(frozen=True)
class PowerMode:
    """A power mode's number and name."""

    id: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (id {self.id})"


@dataclass(frozen=True)
class NvpMode:
    """One power mode, and what it allows the GPU."""

    id: int
    name: str
    gpu_hz: int | None
    """Cap of the GPU's clock; None: not capped."""
    multiprocessors: int | None
    """Of the GPU that are on; None: not said."""

    def gpu_rate(self, top_hz: int | None) -> float:
        """What the GPU may do at most, as multiprocessors x Hz; ``top_hz`` is the GPU's own highest clock."""
        own = float("inf") if top_hz is None else float(top_hz)
        return (self.multiprocessors or 1) * min(self.gpu_hz or own, own)


def parse_modes(text: str) -> list[NvpMode]:
    """All power modes of a configuration, in its order; what is not understood is passed over."""
    modes: list[NvpMode] = []
    for line in text.splitlines():
        words = line.split()
        match = _MODE.match(line)
        if match:
            modes.append(NvpMode(int(match[1]), printable(match[2]), None, None))
        elif modes and len(words) == 3 and re.fullmatch(r"-?\d+", words[2]):
            last, value = modes[-1], int(words[2])
            if words[:2] == ["GPU", "MAX_FREQ"]:
                modes[-1] = NvpMode(last.id, last.name, value if value > 0 else None, last.multiprocessors)
            elif words[:2] == ["TPC_POWER_GATING", "TPC_PG_MASK"] and 0 <= value < 256:
                # A set bit of eight takes a TPC, two multiprocessors, off.
                on = 2 * (8 - bin(value).count("1"))
                modes[-1] = NvpMode(last.id, last.name, last.gpu_hz, on)
    return modes


def default_mode(text: str) -> int | None:
    """Number of the mode after boot."""
    match = _DEFAULT.search(text)
    return int(match[1]) if match else None
