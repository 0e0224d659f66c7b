"""The INA3221 power monitor of a Jetson module, through Linux's hwmon tree.

``/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/``: ``in<N>_label`` names channel N, ``in<N>_input`` is its bus voltage in
mV, ``curr<N>_input`` its current in mA. Channels are found by label: their numbers differ between boards. The chip's
accuracy (shunt and gain, about 1 %) is in no error bound here. Sources: https://docs.kernel.org/hwmon/ina3221.html;
https://www.ti.com/lit/ds/symlink/ina3221.pdf; Linux, arch/arm64/boot/dts/nvidia/tegra234-p3701.dtsi
"""

from __future__ import annotations

import os
from pathlib import Path

from cdkd_edge.board.power.protocol import MODULE, MODULE_RAILS, WATTS, UnusableSourceError

TOTAL = "VDD_IN"  # what the module draws, without the carrier board
MOST_WATTS = 32.76 * 163.8
"""Largest possible reading: full scales of 32.76 V, and of 163.8 mV across a shunt of at least 1 milliohm."""
COVERS = "VDD_IN: the module without its carrier board"
# A Jetson AGX Orin has two chips and no VDD_IN. Which of its rails feed one another is not documented, so there are
# figures per rail and none for the module.
_AGX_ORIN = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")


class Ina3221Reader:
    """Watts of each labelled channel."""

    name = "ina3221"
    quantity = WATTS

    def __init__(self, root: Path) -> None:
        """Find channels below ``root``, where ``/sys`` is, and take a first reading.

        Raises:
            UnusableSourceError: there are none, or one that is needed is not there or cannot be read.
        """
        self._channels = _channels(root)
        if not self._channels:
            raise UnusableSourceError(f"no INA3221 under {root / 'bus/i2c/drivers'}")
        self.total: str | None = TOTAL if TOTAL in self._channels else None
        needed = (TOTAL,) if self.total else _AGX_ORIN
        listed = ", ".join(self._channels)
        if not set(needed) <= set(self._channels):
            # Without it the sum of rails would be taken for the module.
            raise UnusableSourceError(f"the INA3221 has no {TOTAL}, only {listed}")
        self.scope, self.covers = MODULE, COVERS
        if not self.total:
            self.scope, self.covers = MODULE_RAILS, f"{listed}, each for itself: they do not add up to the module"
        try:
            values = self.read()
        except OSError as error:
            raise UnusableSourceError(f"the INA3221 cannot be read: {error}") from None
        if missing := [rail for rail in needed if rail not in values]:
            raise UnusableSourceError(f"{', '.join(missing)} cannot be read")

    def read(self) -> dict[str, float]:
        """Watts per rail. A rail that cannot be read is absent.

        Raises:
            OSError: no rail can be read.
        """
        values = {}
        failure: Exception | None = None
        for rail, (volts, amperes) in self._channels.items():
            try:
                watts = _integer(volts) * _integer(amperes) / 1e6  # mV x mA = uW
                if abs(watts) > MOST_WATTS:
                    raise ValueError(f"{rail} reads {watts:.3g} W, more than the chip can measure")
                values[rail] = watts
            except (OSError, ValueError) as error:  # also an empty or half-written file
                failure = error
        if not values:
            raise OSError(str(failure))
        return values

    def close(self) -> None:
        """Do nothing: no file is held open."""


def _integer(path: Path) -> int:
    """Like ``int(path.read_text())`` in less than half the time; 250 files a second are read."""
    file = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(file, 64))
    finally:
        os.close(file)


def _channels(root: Path) -> dict[str, tuple[Path, Path]]:
    channels: dict[str, tuple[Path, Path]] = {}
    for label in sorted(root.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")):
        folder, number = label.parent, label.name.removeprefix("in").removesuffix("_label")
        files, enabled = (folder / f"in{number}_input", folder / f"curr{number}_input"), folder / f"in{number}_enable"
        try:
            rail = label.read_text().strip()
            if enabled.exists() and enabled.read_text().strip() == "0":
                continue
        except OSError:
            continue
        # Channels that are not connected are labelled NC; "sum of shunt voltages" has no current.
        if rail and rail != "NC" and all(file.exists() for file in files):
            channels[rail if rail not in channels else f"{rail} ({folder.parents[1].name})"] = files
    return channels
