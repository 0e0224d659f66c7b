"""The INA3221 power monitor of a Jetson module, through Linux's hwmon tree.

``/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/``: ``in<N>_label`` names channel N, ``in<N>_input`` is its bus voltage in
mV, ``curr<N>_input`` its current in mA. Channels are found by label: their numbers differ between boards. VDD_IN
is what the module draws, without the carrier board. The chip's own accuracy (shunt and gain, about 1 %) is not part of
any error bound here.

A Jetson AGX Orin has no VDD_IN. Its two chips measure VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0 and VDDQ_VDD2_1V8AO. Which
of them feed one another is not documented, so there are figures per rail and none for the module.
Sources: https://docs.kernel.org/hwmon/ina3221.html; https://www.ti.com/lit/ds/symlink/ina3221.pdf;
Linux, arch/arm64/boot/dts/nvidia/tegra234-p3701.dtsi
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cdkd_edge.board.power.protocol import MODULE, MODULE_RAILS, WATTS

SYS = Path("/sys")
TOTAL = "VDD_IN"
MOST_WATTS = 32.76 * 163.8
"""Largest possible reading: full scales of 32.76 V, and of 163.8 mV across a shunt of at least 1 milliohm."""
COVERS = "VDD_IN: the module without its carrier board"
_AGX_ORIN = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")


class Ina3221Reader:
    """Watts of each labelled channel."""

    name = "ina3221"
    quantity = WATTS

    def __init__(self, channels: dict[str, tuple[Path, Path]]) -> None:
        """Use ``probe`` instead; ``channels`` maps a rail to the files of its voltage and its current."""
        self._channels = channels
        self.total: str | None = TOTAL if TOTAL in channels else None
        if self.total:
            self.scope, self.covers = MODULE, COVERS
        else:
            self.scope = MODULE_RAILS
            self.covers = f"{', '.join(channels)}, each for itself: they do not add up to the module"

    @classmethod
    def probe(cls, root: Path = SYS) -> tuple[Ina3221Reader | None, str]:
        """Find channels by an actual reading.

        Returns:
            The reader and an empty string, or None and the reason.
        """
        channels = _channels(root)
        if not channels:
            return None, f"no INA3221 under {root / 'bus/i2c/drivers'}"
        needed = (TOTAL,) if TOTAL in channels else _AGX_ORIN
        if not set(needed) <= set(channels):
            # Without it the sum of rails would be taken for the module.
            return None, f"the INA3221 has no {TOTAL}, only {', '.join(channels)}"
        reader = cls(channels)
        try:
            values = reader.read()
        except OSError as error:
            return None, f"the INA3221 cannot be read: {error}"
        missing = [rail for rail in needed if rail not in values]
        if missing:
            return None, f"{', '.join(missing)} cannot be read"
        return reader, ""

    def read(self) -> dict[str, float]:
        """Watts per rail. A rail that cannot be read is absent.

        Raises:
            OSError: no rail can be read.
        """
        values = {}
        failure: Exception | None = None
        for rail, (volts, amperes) in self._channels.items():
            try:
                # mV x mA = uW
                watts = _integer(volts) * _integer(amperes) / 1e6
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
    for folder in sorted(root.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*")):
        for label in sorted(folder.glob("in*_label")):
            match = re.fullmatch(r"in(\d+)_label", label.name)
            if not match:
                continue
            files = folder / f"in{match[1]}_input", folder / f"curr{match[1]}_input"
            try:
                rail = label.read_text().strip()
                enabled = folder / f"in{match[1]}_enable"
                if enabled.exists() and enabled.read_text().strip() == "0":
                    continue
            except OSError:
                continue
            # Channels that are not connected are labelled NC; "sum of shunt voltages" has no current.
            if rail and rail != "NC" and all(file.exists() for file in files):
                chip = folder.parents[1].name
                channels[rail if rail not in channels else f"{rail} ({chip})"] = files
    return channels
