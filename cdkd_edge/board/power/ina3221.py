"""The INA3221 power monitor of a Jetson module, through Linux's hwmon tree.

``/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/``: ``in<N>_label`` names channel N, ``in<N>_input`` is its bus voltage in
mV, ``curr<N>_input`` its current in mA. Channels are found by label: their numbers differ between boards.

The chip converts shunt and bus voltage of its channels one after the other, 1.1 ms each: with three channels a cycle
takes 6.6 ms (``update_interval``). Linux's driver answers a read of ``in<N>_input`` or ``curr<N>_input`` only with a
conversion that nobody has read yet, and reads one file at a time, so six files take 40 ms. A current that was read is
one from the last cycle before the read ended.

Values come in steps of 40 uV across the shunt (``shunt<N>_resistor``) and of 8 mV. The offset of up to 80 uV is the
same in every reading. Errors in proportion to the power are in no bound here: gain (0.25 % for each voltage), the
offset of the bus voltage (16 mV, 0.3 % of 5 V), the shunt's tolerance, and the offset's drift (0.5 uV per degree).

Sources: https://docs.kernel.org/hwmon/ina3221.html; Linux, drivers/hwmon/ina3221.c; electrical characteristics in
https://www.ti.com/lit/ds/symlink/ina3221.pdf; Linux, arch/arm64/boot/dts/nvidia/tegra234-p3701.dtsi
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cdkd_edge.board.power.polled import PolledStream
from cdkd_edge.board.power.protocol import MODULE, MODULE_RAILS, WATTS, Accuracy, Sample, UnusableSourceError

TOTAL = "VDD_IN"  # what the module draws, without the carrier board
MOST_WATTS = 32.76 * 163.8
"""Largest possible reading: full scales of 32.76 V, and of 163.8 mV across a shunt of at least 1 milliohm."""
COVERS = "VDD_IN: the module without its carrier board"
CYCLE = 0.0066  # seconds in which the chip converts its three channels, as it is after a reset
OFFSET, SHUNT_STEP, BUS_STEP = 80e-6, 40e-6, 8e-3  # volts: largest offset across the shunt, steps
STEPS = 15  # readings of the total in an interval, if the chip is fast enough
ATTEMPTS = 2  # at reading a rail: the driver gives up (ETIMEDOUT) where no conversion ends within two cycles
VOLTS_AGE = 4  # intervals after which the voltage of a rail is read again; of the total, one
# A Jetson AGX Orin has two chips and no VDD_IN. Which of its rails feed one another is not documented, so there are
# figures per rail and none for the module.
_AGX_ORIN = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")


@dataclass(frozen=True)
class Channel:
    """The files of a rail."""

    volts: Path
    amperes: Path
    shunt: Path

    def accuracy(self) -> Accuracy:
        """At the voltage of now. OSError, ValueError or ZeroDivisionError: a file does not say it."""
        volts, ohms = _integer(self.volts) / 1e3, _integer(self.shunt) / 1e6
        return Accuracy(volts * OFFSET / ohms, volts * SHUNT_STEP / ohms, BUS_STEP / volts)


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
        self._volts: dict[str, int] = {}  # mV, as they were read last
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
        self.rails = tuple(values)

    def read(self) -> dict[str, float]:
        """Watts per rail. A rail that cannot be read is absent.

        Raises:
            OSError: no rail can be read.
        """
        values = {}
        failure: Exception | None = None
        for rail in [rail for rail in self._channels for _ in range(ATTEMPTS)]:
            if rail in values:
                continue
            try:
                self.read_volts(rail)
                values[rail] = self.read_watts(rail)
            except (OSError, ValueError) as error:  # also an empty or half-written file
                failure = error
        if not values:
            raise OSError(str(failure))
        return values

    def read_volts(self, rail: str) -> None:
        """Read the voltage of a rail, for its watts from now on; OSError or ValueError: it cannot be read."""
        self._volts[rail] = _integer(self._channels[rail].volts)

    def read_watts(self, rail: str) -> float:
        """Read the current of a rail: its watts at the voltage that was read last.

        Raises:
            OSError, ValueError: it cannot be read, or is more than ``MOST_WATTS``.
        """
        watts = self._volts[rail] * _integer(self._channels[rail].amperes) / 1e6  # mV x mA = uW
        if abs(watts) > MOST_WATTS:
            raise ValueError(f"{rail} reads {watts:.3g} W, more than the chip can measure")
        return watts

    def cycle(self) -> tuple[float, int]:
        """Seconds between two conversions of a channel, and of how many samples each is the mean."""
        cycle, samples = 0.0, 1
        for channel in self._channels.values():
            with contextlib.suppress(OSError, ValueError):
                cycle = max(cycle, _integer(channel.volts.with_name("update_interval")) / 1000)
                samples = max(samples, _integer(channel.volts.with_name("samples")))
        return cycle or CYCLE, samples

    def close(self) -> None:
        """Do nothing: no file is held open."""


class Ina3221Stream(PolledStream):
    """The total up to 15 times in an interval, or as often as the chip has a new value; the other rails once.

    Without a total, all rails in turn. Only the current is read every time, because every file costs a cycle: the
    voltage, which regulators hold, is read once in an interval, that of other rails once in four. A reading of a rail
    has the moment of its own current.

    It waits at random before each reading: what is left of the step, on average, and never less than up to a quarter
    of what a reading takes. The turns of the other rails come at random as well, so that loads are not in step with the
    readings. (A load in step with the chip's own cycle still is: see
    :func:`~cdkd_edge.board.power.energy.bound_holds`.)
    """

    def __init__(self, reader: Ina3221Reader, interval: float, accuracy: dict[str, Accuracy] | None = None) -> None:
        """Take a first reading of all rails; if it fails, raise UnusableSourceError."""
        super().__init__(reader, interval)
        self._chip = reader
        rails, total = reader.rails, reader.total
        self._cycle, samples = reader.cycle()
        round_of_all = 2 * len(rails) * self._cycle
        notes: tuple[str, ...] = ()
        if 2 * self._cycle > interval:
            notes = (f"the INA3221 has a new value every {self._cycle:.2g} s only (samples: {samples})",)
        self.info = replace(
            self.info,
            rails=rails,
            source_interval=round_of_all,
            cycle=self._cycle,
            notes=notes,
            accuracy=accuracy or {},
        )
        self._cost = self._cycle  # seconds that a reading takes, by the last ones
        self._main = itertools.cycle([total] if total else rails)
        self._other_due = {rail: self._soon() for rail in rails if total and rail != total}
        self._volts_due = {rail: self._soon(1 if rail == total else VOLTS_AGE) for rail in rails}
        self._was_other = False

    def _soon(self, intervals: float = 1) -> float:
        """A random moment, so many intervals from now on average."""
        return time.monotonic() + intervals * self.info.nominal_interval * random.uniform(0.5, 1.5)

    def _wait(self) -> None:
        step = max(self._cycle, self.info.interval / STEPS)
        time.sleep(random.uniform(0, max(2 * (step - self._cost), self._cost / 4)))

    def _read(self) -> Sample | str:
        rail = self._turn()
        try:
            if time.monotonic() >= self._volts_due[rail]:
                self._chip.read_volts(rail)
                self._volts_due[rail] = self._soon(1 if rail == self.info.total else VOLTS_AGE)
            before = time.monotonic()
            watts = self._chip.read_watts(rail)
        except (OSError, ValueError):
            return self._read_all()  # once more, and the others: which rails fail?
        after = time.monotonic()
        self._cost += (after - before - self._cost) / 10
        # The value is of the last cycle before the read, or of one during it.
        earliest = before - self._cycle
        return Sample((earliest + after) / 2, (after - earliest) / 2, {rail: watts}, (rail,))

    def _turn(self) -> str:
        """The rail to read. There is a reading of the total between those of two others."""
        rail = min(self._other_due, key=self._other_due.__getitem__, default=None)
        self._was_other = rail is not None and not self._was_other and self._other_due[rail] <= time.monotonic()
        if rail is None or not self._was_other:
            return next(self._main)
        self._other_due[rail] = self._soon()
        return rail


def find_accuracy(root: Path) -> dict[str, Accuracy]:
    """Of each rail whose shunt is known; ``root`` is where ``/sys`` is."""
    found = {}
    for rail, channel in _channels(root).items():
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            found[rail] = channel.accuracy()
    return found


def _integer(path: Path) -> int:
    """Like ``int(path.read_text())`` in less than half the time, and in one read: a second one would wait as well."""
    file = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(file, 64))
    finally:
        os.close(file)


def _channels(root: Path) -> dict[str, Channel]:
    channels: dict[str, Channel] = {}
    for label in sorted(root.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")):
        folder, number = label.parent, label.name.removeprefix("in").removesuffix("_label")
        enabled, volts, amperes = (
            folder / name.format(number) for name in ("in{}_enable", "in{}_input", "curr{}_input")
        )
        try:
            rail = label.read_text().strip()
            if enabled.exists() and enabled.read_text().strip() == "0":
                continue
        except OSError:
            continue
        # Channels that are not connected are labelled NC; "sum of shunt voltages" has no current.
        if rail and rail != "NC" and volts.exists() and amperes.exists():
            rail = rail if rail not in channels else f"{rail} ({folder.parents[1].name})"
            channels[rail] = Channel(volts, amperes, folder / f"shunt{number}_resistor")
    return channels
