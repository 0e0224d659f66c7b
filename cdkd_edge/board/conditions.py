"""Clocks, temperatures, fan and throttling of the board during a measurement, read once a second.

All of it comes from files below ``/sys``, ``/proc`` and ``/var/lib``; a reading takes about a millisecond and starts no
process. A value that cannot be read is absent. Over-current events are those of NVIDIA's ``soctherm-oc-event`` driver
(hwmon ``soctherm_oc``, files ``oc<N>_event_cnt``; Jetson Linux Developer Guide, "Platform Power and Performance",
Jetson Orin series); x86 counts thermal throttling in ``cpu*/thermal_throttle``.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cdkd_edge.board.jetson import SYS_CPU, current_mode, gpu_folder, mode_of, read_modes, resolve
from cdkd_edge.core.errors import printable

_MOST_CPUS = 16  # number of CPUs whose clocks are read: on old x86 kernels each reading may take 10 ms
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower")
_COLDEST, _HOTTEST = -40.0, 150.0  # degrees Celsius that are believed; on a Jetson a sensor that is off reads -256

Probe = Callable[[], "float | None"]


@dataclass(frozen=True)
class Conditions:
    """One reading. A key is missing where its file could not be read."""

    time: float  # when reading began, seconds on the clock of ``time.monotonic``
    temperatures: Mapping[str, float] = field(default_factory=dict)  # Celsius by zone (``tj-thermal`` ...) or sensor
    clocks_mhz: Mapping[str, float] = field(default_factory=dict)  # ``gpu``, ``cpu`` (mean), ``emc`` (memory; to root)
    clock_limits_mhz: Mapping[str, float] = field(default_factory=dict)  # highest allowed in this power mode
    fan: Mapping[str, float] = field(default_factory=dict)  # ``percent`` of the full duty cycle, ``rpm``
    throttle_events: Mapping[str, int] = field(default_factory=dict)
    """Counters since the machine started: ``oc1`` ... of a Jetson, ``core_throttle``, ``package_throttle`` of x86."""
    power_mode: str | None = None
    memory_available_bytes: int | None = None
    others_seconds: float | None = None
    """Processor time that other programs have used since the machine started, seconds per processor that this process
    may use; includes the time that a host took from a virtual machine."""


class ConditionsMonitor:
    """A block in which a thread reads the conditions below ``root`` every ``interval`` seconds."""

    def __init__(self, root: Path = Path("/"), interval: float = 1.0) -> None:
        self._root, self._interval = root, interval
        self._readings: list[Conditions] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="conditions", daemon=True)

    def latest(self) -> Conditions | None:
        """The latest reading; None before the first."""
        return self._readings[-1] if self._readings else None

    def readings(self) -> tuple[Conditions, ...]:
        """All readings so far, in order."""
        return tuple(self._readings)

    def __enter__(self) -> ConditionsMonitor:
        self._reader = ConditionsReader(self._root)
        self._readings.append(self._reader.read())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()  # after a last reading
        self._thread.join(2.0)  # no longer: a file may hang

    def _watch(self) -> None:
        due = time.monotonic()
        stopping = False
        while not stopping:
            # After a reading that took longer than the interval, the next is due an interval from now.
            due = max(due + self._interval, time.monotonic())
            stopping = self._stopping.wait(due - time.monotonic())
            self._readings.append(self._reader.read())


class ConditionsReader:
    """Finds the files below ``root`` once, and reads them again and again."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._modes = read_modes(root)
        self._temperatures = _find_temperatures(root)
        self._clocks, self._limits = _find_clocks(root)
        self._fan = _find_fan(root)
        self._events = _find_events(root)

    def read(self) -> Conditions:
        """One reading; never raises."""
        now = time.monotonic()
        mode = mode_of(self._modes, current_mode(self._root)) if self._modes else None
        degrees = _values(self._temperatures)
        return Conditions(
            time=now,
            temperatures={key: value for key, value in degrees.items() if _COLDEST < value < _HOTTEST},
            clocks_mhz=_values(self._clocks),
            clock_limits_mhz=_values(self._limits),
            fan=_values(self._fan),
            throttle_events={key: int(value) for key, value in _values(self._events).items()},
            power_mode=mode.name if mode else None,
            memory_available_bytes=_meminfo(self._root / "proc/meminfo"),
            others_seconds=_others_seconds(self._root / "proc/stat"),
        )


def _values(probes: dict[str, Probe]) -> dict[str, float]:
    read = ((key, probe()) for key, probe in probes.items())
    return {key: value for key, value in read if value is not None}


def _file(path: Path, scale: float = 1.0) -> Probe:
    return lambda: _number(path, scale)


def _number(path: Path, scale: float = 1.0) -> float | None:
    try:
        return int(path.read_text()) * scale
    except (OSError, ValueError):  # an empty or half-written file is no reading
        return None


def _name(path: Path) -> str:
    try:
        return printable(path.read_text(errors="replace"), 60)
    except OSError:
        return ""


def _of_files(paths: list[Path], join: Callable[[list[float]], float], scale: float = 1.0) -> Probe:
    """A probe that joins (mean, sum, ...) the values of those files that can be read."""

    def probe() -> float | None:
        values = [value for path in paths if (value := _number(path, scale)) is not None]
        return join(values) if values else None

    return probe


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Matching paths, with numbers in numerical order; none where the folder cannot be read."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found += folder.glob(pattern)
    return sorted(found, key=lambda path: [int(part) for part in re.findall(r"\d+", str(path))])


def _find_temperatures(root: Path) -> dict[str, Probe]:
    zones = _glob(root / "sys/class/thermal", "thermal_zone[0-9]*")
    zones = zones or _glob(root / "sys/devices/virtual/thermal", "thermal_zone[0-9]*")
    named = [(_name(zone / "type"), zone / "temp") for zone in zones]
    for sensor in _hwmon(root, _CPU_SENSORS):
        for path in _glob(sensor, "temp[0-9]*_input"):
            label = _name(path.with_name(path.name.replace("_input", "_label")))
            named.append((f"{_name(sensor / 'name')} {label}".strip(), path))
    found: dict[str, Probe] = {}
    for name, path in named:
        if name:
            keys = (name, *(f"{name} {number}" for number in range(2, len(named) + 1)))
            found[next(key for key in keys if key not in found)] = _file(path, 1e-3)
    return found


def _hwmon(root: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder for folder in _glob(root / "sys/class/hwmon", "hwmon[0-9]*") if _name(folder / "name") in names]


def _find_clocks(root: Path) -> tuple[dict[str, Probe], dict[str, Probe]]:
    gpu = resolve(root, gpu_folder(root))
    cpus = _glob(root / SYS_CPU, "cpu[0-9]*/cpufreq")
    cpus = cpus[:: max(1, -(-len(cpus) // _MOST_CPUS))]
    emc = root / "sys/kernel/debug/bpmp/debug/clk/emc"
    caps = [root / f"sys/kernel/{name}" for name in ("nvpmodel_clk_cap/emc", "nvpmodel_emc_cap/emc_iso_cap")]

    def emc_limit() -> float | None:
        top = _number(emc / "max_rate", 1e-6)
        cap = next((value for path in caps if (value := _number(path, 1e-6))), None)  # 0: no cap
        return None if top is None else min(top, cap) if cap else top

    now: dict[str, Probe] = {
        "gpu": _file(gpu / "cur_freq", 1e-6),
        "cpu": _of_files([cpu / "scaling_cur_freq" for cpu in cpus], statistics.fmean, 1e-3),
        "emc": _file(emc / "rate", 1e-6),
    }
    most: dict[str, Probe] = {
        "gpu": _file(gpu / "max_freq", 1e-6),
        "cpu": _of_files([cpu / "scaling_max_freq" for cpu in cpus], statistics.fmean, 1e-3),
        "emc": emc_limit,
    }
    return now, most


def _find_fan(root: Path) -> dict[str, Probe]:
    found: dict[str, Probe] = {}
    for folder in _hwmon(root, ("pwmfan", "pwm_tach", "tachometer")):
        for key, name, scale in (("percent", "pwm1", 100 / 255), ("rpm", "rpm", 1.0), ("rpm", "fan1_input", 1.0)):
            if key not in found and _number(folder / name) is not None:
                found[key] = _file(folder / name, scale)
    return found


def _find_events(root: Path) -> dict[str, Probe]:
    found: dict[str, Probe] = {}
    for folder in _hwmon(root, ("soctherm_oc",)):
        for path in _glob(folder, "oc[0-9]*_event_cnt"):
            name = path.name.partition("_")[0]
            # An event that is not armed counts but does not throttle.
            if _number(path.with_name(f"{name}_throt_en")) != 0:
                found[name] = _file(path)
    throttled = _glob(root / SYS_CPU, "cpu[0-9]*/thermal_throttle")
    if throttled:
        found["core_throttle"] = _of_files([folder / "core_throttle_count" for folder in throttled], sum)
        # All CPUs of a package show the same counter.
        found["package_throttle"] = _of_files([folder / "package_throttle_count" for folder in throttled], max)
    return found


def _meminfo(path: Path) -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(match[1]) * 1024 if match else None


def _others_seconds(path: Path) -> float | None:
    """See :attr:`Conditions.others_seconds`. Children count as this program once they have ended."""
    own = sum(os.times()[:4])
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.startswith("cpu")]
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user. Source: proc(5).
        counts = [[int(count) for count in row[1:9]] for row in rows if row[0] in usable]
    except (OSError, ValueError):
        return None
    if not counts or not all(len(row) == 8 and any(row) for row in counts):
        return None
    busy = sum(sum(row) - row[3] - row[4] for row in counts) / os.sysconf("SC_CLK_TCK")
    return (busy - own) / len(counts)
