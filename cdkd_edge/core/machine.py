"""What this machine is, read from the system, for manifests and benchmark reports."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DEVICE_TREES = ("/proc/device-tree", "/device-tree")
"""Folders of the device tree: the kernel's, and where a container has it mounted. Docker hides the first, because it is
below ``/sys/firmware``, which its masked paths and its AppArmor profile close (moby, daemon/pkg/oci/defaults.go)."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cdkd-edge`` or ``~/.cache/cdkd-edge``: where logs and caches go. RuntimeError: no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "cdkd-edge"


@dataclass(frozen=True)
class Machine:
    """A description of the machine; fields that cannot be read are None."""

    cpu: str
    cores: int  # cores this process may use
    memory_bytes: int | None
    os: str
    kernel: str
    board: str | None  # the device tree's model, on boards that have one
    l4t: str | None  # Jetson Linux release, e.g. ``R36.4.0``


def describe_machine() -> Machine:
    """Describe the machine that this process runs on."""
    release = jetson_linux(_text("/etc/nv_tegra_release") or "")
    cpu = _found(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo")
    memory = _found(r"^MemTotal:\s*(\d+) kB", "/proc/meminfo")
    return Machine(
        cpu=cpu.strip() if cpu else platform.processor() or platform.machine(),
        cores=available_cores(),
        memory_bytes=int(memory) * 1024 if memory else None,
        os=_found(r'^PRETTY_NAME="?([^"\n]+)', "/etc/os-release") or platform.system(),
        kernel=platform.release(),
        board=next(filter(None, (_text(f"{place}/model") for place in DEVICE_TREES)), None),
        l4t=release[1] if release else None,
    )


def jetson_module() -> str | None:
    """Part number of the Jetson's module (``p3767-0000``: Orin NX 16 GB), by the device tree; None if it has none.

    The model's name is no help: it is the carrier board's, and changes with the software (``... Developer Kit Super``).
    """
    part = r"nvidia,(?:p[\d-]+\+)?(p\d{4}-\d{4})"
    return next(filter(None, (_found(part, f"{place}/compatible") for place in DEVICE_TREES)), None)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def peak_memory() -> int:
    """Largest resident size of this process since :func:`forget_peak_memory`, or since it began; bytes."""
    peak = _found(r"^VmHWM:\s*(\d+) kB", "/proc/self/status")
    return (int(peak) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def forget_peak_memory() -> bool:
    """Reset :func:`peak_memory`; False where the system does not allow it (proc(5), ``clear_refs``)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def hand_memory_back() -> None:
    """Return freed memory to the system: glibc keeps 80 to 150 MB after a wide scene, in sizes that nobody needs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def library_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages, where they are installed, and of Python."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def jetson_linux(release: str) -> tuple[int, str] | None:
    """Major number and name (``R36.4.3``) of Jetson Linux, by the text of ``/etc/nv_tegra_release``."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    return (int(match[1]), f"R{match[1]}.{match[2]}") if match else None


def _found(pattern: str, path: str) -> str | None:
    """The group of a pattern in a file of the system."""
    match = re.search(pattern, _text(path) or "", re.MULTILINE)
    return match[1] if match else None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
    except OSError:
        return None
