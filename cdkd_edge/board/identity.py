"""What the board is and how it is set: the part of a measurement's record that does not change while it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.jetson import (
    MODEL,
    current_mode,
    generation,
    gpu_folder,
    installed_jetpack,
    is_jetson,
    jetson_linux,
)
from cdkd_edge.board.nvpmodel import CONFIG, PowerMode, parse_modes
from cdkd_edge.board.tree import read
from cdkd_edge.core.errors import printable

SYS_CPU = "sys/devices/system/cpu"


@dataclass(frozen=True)
class BoardIdentity:
    """A board, and its settings at one moment. What cannot be read, or does not exist here, is None."""

    model: str | None
    """Of the device tree; None on machines that have none."""
    jetson: bool
    l4t: str | None
    """Jetson Linux, e.g. ``R36.4.3``."""
    jetpack: str | None
    """Version of the installed package ``nvidia-jetpack``, else the major number that belongs to Jetson Linux."""
    power_mode: PowerMode | None
    power_modes: tuple[PowerMode, ...]
    """All that ``/etc/nvpmodel.conf`` has."""
    jetson_clocks: bool | None
    """Whether GPU and CPU are held at their maximum: each one's lowest allowed clock is its highest."""
    fan_profile: str | None


def describe_board(root: Path = Path("/")) -> BoardIdentity:
    """Describe the machine whose file tree is at ``root``. Never raises for what cannot be read."""
    model = printable(read(root, MODEL).text or "") or None
    jetson = is_jetson(root)
    release = jetson_linux(root) if jetson else None
    modes = read_modes(root) if jetson else ()
    return BoardIdentity(
        model=model,
        jetson=jetson,
        l4t=release[1] if release else None,
        jetpack=(installed_jetpack(root) or (generation(release[0]) if release else None)) if jetson else None,
        power_mode=mode_of(modes, current_mode(root)) if jetson else None,
        power_modes=modes,
        jetson_clocks=clocks_held(root) if jetson else None,
        fan_profile=_fan_profile(root) if jetson else None,
    )


def read_modes(root: Path) -> tuple[PowerMode, ...]:
    """The board's power modes, in the order of its configuration; empty where there is none."""
    return tuple(PowerMode(mode.id, mode.name) for mode in parse_modes(read(root, CONFIG).text or ""))


def mode_of(modes: tuple[PowerMode, ...], number: int | None) -> PowerMode | None:
    """The mode of that number."""
    return next((mode for mode in modes if mode.id == number), None)


def clocks_held(root: Path) -> bool | None:
    """Whether the clocks of GPU and CPU cannot fall; None where the GPU's cannot be read."""
    folder = gpu_folder(root)
    low, high = (read(root, f"{folder}/{key}_freq").number for key in ("min", "max"))
    if low is None or high is None or high <= 0:
        return None
    return low >= high and all(least >= most for least, most in _cpu_limits(root))


def _cpu_limits(root: Path) -> list[tuple[int, int]]:
    """Lowest and highest allowed clock of each CPU, kHz. A CPU that is off has none."""
    limits = []
    for folder in sorted((root / SYS_CPU).glob("cpu[0-9]*/cpufreq")):
        place = f"/{folder.relative_to(root)}"
        low, high = (read(root, f"{place}/scaling_{key}_freq").number for key in ("min", "max"))
        if low is not None and high is not None:
            limits.append((low, high))
    return limits


def _fan_profile(root: Path) -> str | None:
    # The running profile, where nvfancontrol has noted one; else what it starts with.
    for path, pattern in (
        ("/var/lib/nvfancontrol/status", r"PROFILE\s*[:=]\s*(\w+)"),
        ("/etc/nvfancontrol.conf", r"FAN_DEFAULT_PROFILE\s+(\w+)"),
    ):
        match = re.search(pattern, read(root, path).text or "", re.IGNORECASE)
        if match:
            return match[1]
    return None
