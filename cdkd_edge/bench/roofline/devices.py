"""Devices of a roofline: constants from data sheets, in ``devices/*.toml``, or in a file of one's own.

A file has ``title``, ``rates`` (dense operations per multiprocessor and clock), optionally ``parts``,
``gpu_names`` and ``note``, and a table ``modes``::

    title = "My board"
    gpu_names = ["Orin"]
    rates = { fp16 = 2048, int8 = 4096, fp32 = 256 }

    [modes.MAXN]
    multiprocessors = 8
    clock_mhz = 918
    bandwidth_gb_s = 102.4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import UsageError, printable
from cdkd_edge.core.files import read_toml

RATES = ("fp32", "fp16", "int8")
MOST_MODES = 100
"""Power modes of a device; all are modelled unless one is chosen."""


@dataclass(frozen=True)
class PowerMode:
    """What a device may do at most in a power mode."""

    name: str
    multiprocessors: int
    clock_mhz: float
    bandwidth_gb_s: float
    """10^9 bytes per second to memory."""


@dataclass(frozen=True)
class Device:
    """A GPU and its memory."""

    name: str
    title: str
    rates: Mapping[str, float]
    """Dense operations per multiprocessor and clock by precision; ``fp32`` without TF32."""
    modes: Mapping[str, PowerMode]
    parts: tuple[str, ...] = ()
    """Part numbers of a Jetson module, as its device tree names them (``p3767-0000``)."""
    gpu_names: tuple[str, ...] = ()
    """As the CUDA driver says."""
    note: str = ""

    def mode(self, name: str) -> PowerMode:
        """A power mode by its name, in any case.

        Raises:
            UsageError: the device has no such mode.
        """
        for key, mode in self.modes.items():
            if key.casefold() == name.casefold():
                return mode
        raise UsageError(f"{self.title} has no power mode {name!r}", hint=f"it has {', '.join(self.modes)}")

    def peak(self, mode: PowerMode, precision: str) -> float:
        """Operations per second that the multiprocessors can do at most."""
        return self.rates[precision] * mode.multiprocessors * mode.clock_mhz * 1e6


def device_names() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    folder = resources.files("cdkd_edge.bench.roofline") / "devices"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def load_device(name: str) -> Device:
    """A device by its name, or from a TOML file.

    Raises:
        UsageError: there is no such device, or the file is not one of a device.
    """
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return _device(path.stem, read_toml(path))
        except OSError as error:
            raise UsageError(f"{name} is not a device file: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{name} is not a device file: {_said(error)}", hint=f"see {__name__}") from None
    if name not in device_names():
        raise UsageError(f"there is no device {name!r}", hint=f"one of {', '.join(device_names())}, or a .toml file")
    with resources.as_file(resources.files("cdkd_edge.bench.roofline") / "devices" / f"{name}.toml") as file:
        return _device(name, read_toml(file))


def find_device(*, part: str | None = None, gpu: str | None = None) -> Device | None:
    """The device that a machine has: by its module's part number, else by its GPU's name; None if it is not known.

    Args:
        part: what the device tree calls the machine (``/proc/device-tree/compatible``), any text that holds the number.
        gpu: name of the GPU as the CUDA driver says it.
    """
    devices = [load_device(name) for name in device_names()]
    for device in devices:
        if part and any(number in part for number in device.parts):
            return device
    return next((device for device in devices if gpu and gpu in device.gpu_names), None)


def default_device(root: Path = Path("/")) -> Device:
    """The board that this is, if it is a known one; else the paper's, an Orin NX 16 GB.

    Args:
        root: of the file tree with ``proc/device-tree``.
    """
    try:
        part = (root / "proc/device-tree/compatible").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        part = ""
    return find_device(part=part) or load_device("orin-nx-16gb")


def _device(name: str, data: Mapping[str, Any]) -> Device:
    for key, kind, words in (("modes", dict, "a table"), ("rates", dict, "a table"), ("parts", list, "a list")):
        if key in data and not isinstance(data[key], kind):
            raise ValueError(f"{key} is not {words}")
    if len(data["modes"]) > MOST_MODES:
        raise ValueError(f"it has {len(data['modes'])} modes (at most {MOST_MODES})")
    modes = {
        key: PowerMode(
            printable(key, 60),
            int(_positive(item, "multiprocessors", 1)),
            _positive(item, "clock_mhz"),
            _positive(item, "bandwidth_gb_s"),
        )
        for key, item in data["modes"].items()
    }
    if not modes:
        raise ValueError("it has no modes")
    return Device(
        name=name,
        title=printable(str(data["title"]), 100),
        rates={rate: _positive(data["rates"], rate) for rate in RATES},
        modes=modes,
        parts=tuple(map(str, data.get("parts", ()))),
        gpu_names=tuple(map(str, data.get("gpu_names", ()))),
        note=printable(str(data.get("note", "")), 1000),
    )


def _positive(table: Mapping[str, Any], key: str, least: float = 1e-6) -> float:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1e9:
        raise ValueError(f"{key} is not a number from {least:g} to 1e9")
    return float(value)


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
