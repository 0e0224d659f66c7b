"""Devices of the roofline: constants from data sheets, in ``devices/*.toml`` or in a TOML file of the user.

A file has ``title``, ``rates`` (dense operations per multiprocessor and clock), optionally ``parts``, ``gpu_names`` and
``note``, and a table ``modes``::

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
from dataclasses import dataclass, fields, replace
from importlib import resources
from itertools import chain
from pathlib import Path

from cdkd_edge.board.jetson import device_tree
from cdkd_edge.core.errors import UsageError, printable
from cdkd_edge.core.files import converted, read_toml


@dataclass(frozen=True)
class Rates:
    """Dense operations per multiprocessor and clock, by precision."""

    fp32: float  # without TF32
    fp16: float
    int8: float

    def __post_init__(self) -> None:
        _require_positive(self)


_FILES = resources.files("cdkd_edge.benchmark.roofline") / "devices"
RATES = tuple(one.name for one in fields(Rates))  # precisions that a device has a rate for
MOST_MODES = 100  # largest number of power modes: all are modelled unless one is chosen


@dataclass(frozen=True)
class ModeLimits:
    """The limits of a device in a power mode."""

    multiprocessors: int
    clock_mhz: float
    bandwidth_gb_s: float  # memory bandwidth, 10^9 bytes per second
    name: str = ""

    def __post_init__(self) -> None:
        _require_positive(self)


@dataclass(frozen=True)
class Device:
    """A GPU and its memory."""

    title: str
    rates: Rates
    modes: dict[str, ModeLimits]
    parts: tuple[str, ...] = ()  # part numbers of a Jetson module, as its device tree gives them (``p3767-0000``)
    gpu_names: tuple[str, ...] = ()  # names of the GPU as the CUDA driver gives them
    note: str = ""
    name: str = ""

    def mode(self, name: str) -> ModeLimits:
        """A power mode by its name, in capital or small letters; UsageError if there is none."""
        for key, mode in self.modes.items():
            if key.casefold() == name.casefold():
                return mode
        raise UsageError(f"{self.title} has no power mode {name!r}", hint=f"it has {', '.join(self.modes)}")

    def peak(self, mode: ModeLimits, precision: str) -> float:
        """Peak operations per second of the multiprocessors."""
        rate: float = getattr(self.rates, precision)
        return rate * mode.multiprocessors * mode.clock_mhz * 1e6


def device_names() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    return tuple(sorted(item.name.removesuffix(".toml") for item in _FILES.iterdir() if item.name.endswith(".toml")))


def load_device(name: str) -> Device:
    """A device by its name, or from a TOML file; UsageError if it does not exist or describes none."""
    if name in device_names():
        with resources.as_file(_FILES / f"{name}.toml") as file:
            return _device(name, read_toml(file))
    if not name.endswith(".toml"):
        raise UsageError(f"there is no device {name!r}", hint=f"one of {', '.join(device_names())}, or a .toml file")
    try:
        return _device(Path(name).stem, read_toml(Path(name)))
    except OSError as error:
        raise UsageError(f"{name} is not a device file: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{name} is not a device file: {error}", hint=f"see {__name__}") from None


def find_device(*, part: str | None = None, gpu: str | None = None) -> Device | None:
    """The device of a machine, by the text with its module's part number, else by the GPU's name; None if not known."""
    devices = [load_device(name) for name in device_names()]
    by_part = (device for device in devices if part and any(number in part for number in device.parts))
    by_gpu = (device for device in devices if gpu in device.gpu_names)
    return next(chain(by_part, by_gpu), None)


def default_device(root: Path = Path("/")) -> Device:
    """This board if it is a known one; otherwise the paper's, an Orin NX 16 GB."""
    return find_device(part=device_tree(root, "compatible").text) or load_device("orin-nx-16gb")


def _require_positive(values: Rates | ModeLimits) -> None:
    for name, value in vars(values).items():
        if name != "name" and not 1e-6 <= value <= 1e9:
            raise ValueError(f"{name} must be a number from 1e-6 to 1e9, got {value:g}")


def _device(name: str, data: Mapping[str, object]) -> Device:
    device = converted(data, Device)
    if not 1 <= len(device.modes) <= MOST_MODES:
        raise ValueError(f"it has {len(device.modes)} modes; 1 to {MOST_MODES} are allowed")
    modes = {title: replace(mode, name=title) for key, mode in device.modes.items() for title in [printable(key, 60)]}
    title, note = printable(device.title, 100), printable(device.note, 1000)
    return replace(device, name=name, modes=modes, title=title, note=note)
