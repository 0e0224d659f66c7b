"""Power sources as energy counters, and the meter that reads them while something runs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

from cdkd_edge.power.rapl import RaplSource


class PowerSource(Protocol):
    """A set of energy counters, one per rail."""

    name: str
    scope: str
    """What the figure covers: ``CPU package``, ``module``, ``GPU board``. Scopes are never compared."""

    def read(self) -> dict[str, float]:
        """Joules per rail since some fixed moment; never decreasing."""


@dataclass(frozen=True)
class PowerSample:
    """Energy used between two readings."""

    start: float
    """Seconds on :func:`time.perf_counter`'s clock."""
    stop: float
    joules: dict[str, float]


def find_source() -> tuple[PowerSource | None, str]:
    """The first source that answers a reading, or None and why there is none."""
    source, reason = RaplSource.probe()
    return source, reason


class EnergyMeter:
    """Reads a source in a thread until stopped. Use as a context manager.

    Readings must be closer together than a counter's wrap-around, which for RAPL is minutes.
    """

    def __init__(self, source: PowerSource, interval: float = 0.1) -> None:
        """Prepare to read ``source`` every ``interval`` seconds."""
        self.source = source
        self.samples: list[PowerSample] = []
        self.error: Exception | None = None
        """Set if a reading failed; the samples before it stand, nothing is filled in after it."""
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="power")

    def __enter__(self) -> EnergyMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def watts(self, start: float, stop: float) -> dict[str, float] | None:
        """Mean power per rail between two moments, or None if no sample lies within."""
        inside = [sample for sample in self.samples if sample.start >= start and sample.stop <= stop]
        if not inside:
            return None
        seconds = sum(sample.stop - sample.start for sample in inside)
        return {rail: sum(sample.joules[rail] for sample in inside) / seconds for rail in inside[0].joules}

    def _poll(self) -> None:
        try:
            before, at = self.source.read(), time.perf_counter()
            while not self._stop.wait(self._interval):
                now, moment = self.source.read(), time.perf_counter()
                self.samples.append(PowerSample(at, moment, {rail: now[rail] - before[rail] for rail in now}))
                before, at = now, moment
        except (OSError, ValueError, KeyError) as error:
            self.error = error
