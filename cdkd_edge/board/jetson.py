"""Which Jetson a file tree belongs to, and where its GPU's clock is."""

from __future__ import annotations

import re
from pathlib import Path

from cdkd_edge.board.tree import read, resolve
from cdkd_edge.core.errors import printable

MODEL = "/proc/device-tree/model"
RELEASE = "/etc/nv_tegra_release"
_GPUS = ("17000000.gpu", "17000000.ga10b")
"""Orin's GPU below ``/sys/class/devfreq``: since JetPack 6, and before."""


def is_jetson(root: Path) -> bool:
    """Whether the tree is that of an NVIDIA Jetson."""
    named = f"{read(root, MODEL).text or ''} {read(root, '/proc/device-tree/compatible').text or ''}".casefold()
    return "jetson" in named or "nvidia,tegra" in named or read(root, RELEASE).text is not None


def jetson_linux(root: Path) -> tuple[int, str] | None:
    """Major number and name (``R36.4.3``) of Jetson Linux; None where the release file does not say."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(root, RELEASE).text or "")
    return (int(match[1]), f"R{match[1]}.{match[2]}") if match else None


def installed_jetpack(root: Path) -> str | None:
    """Version of the package ``nvidia-jetpack``, e.g. ``6.2+b77``; None where it is not installed."""
    match = re.search(
        r"^Package: nvidia-jetpack\n(?:\S.*\n| .*\n)*?Version: (\S+)",
        read(root, "/var/lib/dpkg/status").text or "",
        re.M,
    )
    return printable(match[1]) if match else None


def generation(major: int) -> str:
    """JetPack's major number by that of Jetson Linux."""
    return {35: "5", 36: "6"}.get(major, "7" if major >= 38 else "4 or older")


def gpu_folder(root: Path) -> str:
    """The GPU's folder of clocks, as a path of the system."""
    base = "/sys/class/devfreq"
    return next((f"{base}/{gpu}" for gpu in _GPUS if resolve(root, f"{base}/{gpu}").is_dir()), f"{base}/{_GPUS[0]}")


def current_mode(root: Path, asked: str | None = None) -> int | None:
    """Number of the power mode, from what ``nvpmodel -q`` answered (``asked``), else from its status file."""
    if asked is not None:  # NV Power Mode: MAXN, and its number on the next line
        match = re.search(r"^\s*(\d+)\s*$", asked, re.M)
        if match:
            return int(match[1])
    match = re.search(r"pmode:\s*(\d+)", read(root, "/var/lib/nvpmodel/status").text or "")
    return int(match[1]) if match else None
