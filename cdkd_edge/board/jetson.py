"""What the board is and how it is set, read from its files below a root; a test gives a tree of its own for ``/``.

Nothing here raises for a file that is missing or damaged: what cannot be read is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.core import machine
from cdkd_edge.core.errors import printable

RELEASE = "/etc/nv_tegra_release"
CONFIG = "/etc/nvpmodel.conf"
SYS_CPU = "sys/devices/system/cpu"
_DEVFREQ = "/sys/class/devfreq"
_GPUS = ("17000000.gpu", "17000000.ga10b")  # folder of Orin's GPU clock: since JetPack 6, and before
_MODE = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>\s*$")
_DEFAULT = re.compile(r"^<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """A file's text, or why there is none."""

    text: str | None
    reason: str = ""  # empty where the file does not exist

    @property
    def number(self) -> int | None:
        """The text as a number, if it is one."""
        try:
            return int((self.text or "").split()[0])
        except (ValueError, IndexError):
            return None


def read(root: Path, path: str) -> Text:
    """Read a text file of the system, without the zero bytes of the device tree. Absolute links stay below the root."""
    place = resolve(root, path)
    try:
        return Text(place.read_bytes().decode("utf-8", errors="replace").replace("\0", "\n").strip())
    except (FileNotFoundError, NotADirectoryError):
        return Text(None)
    except OSError as error:
        return Text(None, error.strerror or str(error))


def resolve(root: Path, path: str) -> Path:
    """Where a path of the system lies below a root, with links followed there."""
    place = root / path.lstrip("/")
    for _ in range(8):
        if not place.is_symlink():
            break
        target = place.readlink()
        place = root / str(target).lstrip("/") if target.is_absolute() else place.parent / target
    return place


def device_tree(root: Path, name: str) -> Text:
    """A file of the device tree, for instance ``model``: the kernel's, else the copy that a container has mounted."""
    found = [read(root, f"{place}/{name}") for place in machine.DEVICE_TREES]
    return next((one for one in found if one.text is not None), found[0])


def is_jetson(root: Path) -> bool:
    """Whether the tree is that of an NVIDIA Jetson.

    A container without mounts sees neither device tree nor release, but the GPU's clock and the kernel's name.
    """
    named = f"{device_tree(root, 'model').text or ''} {device_tree(root, 'compatible').text or ''}".casefold()
    return (
        "jetson" in named
        or "nvidia,tegra" in named
        or read(root, RELEASE).text is not None
        or resolve(root, gpu_folder(root)).is_dir()
        or (read(root, "/proc/sys/kernel/osrelease").text or "").endswith("-tegra")
    )


def jetson_linux(root: Path) -> tuple[int, str] | None:
    """Major number and name (``R36.4.3``) of Jetson Linux."""
    return machine.jetson_linux(read(root, RELEASE).text or "")


def installed_jetpack(root: Path) -> str | None:
    """Version of the package ``nvidia-jetpack``, e.g. ``6.2+b77``."""
    packages = read(root, "/var/lib/dpkg/status").text or ""
    match = re.search(r"^Package: nvidia-jetpack\n(?:\S.*\n| .*\n)*?Version: (\S+)", packages, re.M)
    return printable(match[1]) if match else None


def generation(major: int) -> str:
    """JetPack's major number for a major number of Jetson Linux."""
    return {35: "5", 36: "6"}.get(major, "7" if major >= 38 else "4 or older")


@dataclass(frozen=True)
class PowerMode:
    """A power mode of ``/etc/nvpmodel.conf``. Numbers differ between boards: they are read, never assumed."""

    id: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (id {self.id})"


@dataclass(frozen=True)
class GpuLimits:
    """What a power mode allows the GPU."""

    hertz: int | None = None  # highest clock; None: not limited
    multiprocessors: int | None = None  # multiprocessors that are on; None: not said

    def rate(self, top_hz: int | None) -> float:
        """The most the GPU may do, as multiprocessors x Hz; ``top_hz`` is its own highest clock."""
        own = float("inf") if top_hz is None else float(top_hz)
        return (self.multiprocessors or 1) * min(self.hertz or own, own)


def parse_modes(text: str) -> dict[PowerMode, GpuLimits]:
    """The power modes of a configuration, in its order. Lines that are not understood are skipped."""
    modes: dict[PowerMode, GpuLimits] = {}
    mode = None
    for line in text.splitlines():
        words = line.split()
        if match := _MODE.match(line):
            mode = PowerMode(int(match[1]), printable(match[2]))
            modes[mode] = GpuLimits()
        elif mode and len(words) == 3 and re.fullmatch(r"-?\d+", words[2]):
            value = int(words[2])
            if words[:2] == ["GPU", "MAX_FREQ"]:
                modes[mode] = replace(modes[mode], hertz=value if value > 0 else None)
            elif words[:2] == ["TPC_POWER_GATING", "TPC_PG_MASK"] and 0 <= value < 256:
                # Each set bit of eight turns a TPC off, which has two multiprocessors. (GPU_PG_MASK is Thor's.)
                modes[mode] = replace(modes[mode], multiprocessors=2 * (8 - bin(value).count("1")))
    return modes


def default_mode(text: str) -> int | None:
    """Number of the mode after boot, by a configuration."""
    match = _DEFAULT.search(text)
    return int(match[1]) if match else None


def read_modes(root: Path) -> tuple[PowerMode, ...]:
    """The board's power modes, in the order of its configuration."""
    return tuple(parse_modes(read(root, CONFIG).text or ""))


def mode_of(modes: tuple[PowerMode, ...], number: int | None) -> PowerMode | None:
    """The mode with a number."""
    return next((mode for mode in modes if mode.id == number), None)


def current_mode(root: Path, answer: str | None = None) -> int | None:
    """Number of the power mode, from the ``answer`` of ``nvpmodel -q``, else from its status file."""
    match = re.search(r"^\s*(\d+)\s*$", answer or "", re.M)  # NV Power Mode: MAXN, and its number on the next line
    match = match or re.search(r"pmode:\s*(\d+)", read(root, "/var/lib/nvpmodel/status").text or "")
    return int(match[1]) if match else None


def gpu_folder(root: Path) -> str:
    """The folder of the GPU's clock, as a path of the system."""
    found = (f"{_DEVFREQ}/{gpu}" for gpu in _GPUS if resolve(root, f"{_DEVFREQ}/{gpu}").is_dir())
    return next(found, f"{_DEVFREQ}/{_GPUS[0]}")


def gpu_clock(root: Path) -> dict[str, Text]:
    """The files with the GPU's lowest, present and highest clock, Hz: ``min``, ``cur``, ``max``."""
    return {key: read(root, f"{gpu_folder(root)}/{key}_freq") for key in ("min", "cur", "max")}


def clocks_held(root: Path) -> bool | None:
    """Whether GPU and CPU are held at their maximum (``jetson_clocks``); None where the GPU's clock cannot be read."""
    clock = gpu_clock(root)
    low, high = clock["min"].number, clock["max"].number
    if low is None or high is None or high <= 0:
        return None
    return low >= high and all(least >= most for least, most in _cpu_limits(root))


def _cpu_limits(root: Path) -> list[tuple[int, int]]:
    """Lowest and highest allowed clock of each CPU, kHz. A CPU that is off has none."""
    places = [f"/{folder.relative_to(root)}" for folder in sorted((root / SYS_CPU).glob("cpu[0-9]*/cpufreq"))]
    limits = [[read(root, f"{place}/scaling_{key}_freq").number for key in ("min", "max")] for place in places]
    return [(low, high) for low, high in limits if low is not None and high is not None]


def _fan_profile(root: Path) -> str | None:
    # The running profile, where nvfancontrol has noted it; else the one it starts with.
    for path, pattern in (
        ("/var/lib/nvfancontrol/status", r"PROFILE\s*[:=]\s*(\w+)"),
        ("/etc/nvfancontrol.conf", r"FAN_DEFAULT_PROFILE\s+(\w+)"),
    ):
        match = re.search(pattern, read(root, path).text or "", re.IGNORECASE)
        if match:
            return match[1]
    return None


@dataclass(frozen=True)
class BoardIdentity:
    """A board and its settings at one moment: the part of a measurement's record that does not change in a run."""

    model: str | None  # from the device tree; None on machines without one
    jetson: bool
    l4t: str | None  # Jetson Linux, e.g. ``R36.4.3``
    jetpack: str | None  # version of the package ``nvidia-jetpack``, else the major number for this Jetson Linux
    power_mode: PowerMode | None
    power_modes: tuple[PowerMode, ...]  # all modes of ``/etc/nvpmodel.conf``
    jetson_clocks: bool | None  # whether GPU and CPU are held at their maximum
    fan_profile: str | None


def describe_board(root: Path = Path("/")) -> BoardIdentity:
    """Describe the machine whose file tree is at ``root``."""
    jetson = is_jetson(root)
    release = jetson_linux(root) if jetson else None
    modes = read_modes(root) if jetson else ()
    return BoardIdentity(
        model=printable(device_tree(root, "model").text or "") or None,
        jetson=jetson,
        l4t=release[1] if release else None,
        jetpack=(installed_jetpack(root) or (generation(release[0]) if release else None)) if jetson else None,
        power_mode=mode_of(modes, current_mode(root)) if jetson else None,
        power_modes=modes,
        jetson_clocks=clocks_held(root) if jetson else None,
        fan_profile=_fan_profile(root) if jetson else None,
    )
