"""Energy of a window of time: a block of Python, a command, a log.

Gross figures are those of the window. Net ones leave out idle power, measured just before it. Each has the bound of
:mod:`cdkd_edge.board.power.energy`; where that cannot be had there are no joules but a reason.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from cdkd_edge.board.power.energy import RailEnergy, Trace, net_bound, rail_energy
from cdkd_edge.board.power.protocol import WATTS, SourceInfo
from cdkd_edge.board.power.sampler import PowerSampler, find_source
from cdkd_edge.core.errors import PowerError, UsageError
from cdkd_edge.core.numbers import duration, percent

LEAST_READINGS = 3  # readings of watts that a bound needs: fewer hardly tell how power changes
LEAST_COVERAGE = 0.98  # least share of a window, or of a phase of a benchmark, that must be covered by readings

Span = tuple[float, float]  # begin and end, s on CLOCK_MONOTONIC


@dataclass(frozen=True)
class RailWindow:
    """Energy and power of a rail in a window. Net leaves out the idle power that was measured before it."""

    joules: float | None  # None: ``reason`` says why
    bound_joules: float | None  # largest error of ``joules``, for the loads that ``bound_holds`` names
    watts: float | None  # mean over the covered time; None if there are too few readings
    bound_watts: float | None  # the same for ``watts``
    idle_watts: float | None  # None if idle power was not measured
    net_joules: float | None  # None if there are no ``joules``, or no ``idle_watts``
    net_bound_joules: float | None  # the same for ``net_joules``, in which the sensor's offset cancels
    net_watts: float | None
    covered: float  # share of the window that lies between readings, 0..1
    readings: int  # readings in the window
    reason: str  # why there are no ``joules``; empty if there are


_FIGURES = tuple(field.name for field in fields(RailWindow) if field.name not in ("covered", "readings", "reason"))


def rail_windows(trace: Trace, window: Span, idle: Span | None = None, slack: float = 0.0) -> dict[str, RailWindow]:
    """The figures of every rail.

    Args:
        trace: should begin before the window and end after it.
        window: the window.
        idle: a time before it in which nothing ran; None: net figures are absent.
        slack: seconds by which the length of the window may be wrong.
    """
    return {rail: _rail_window(trace, rail, window, idle, slack) for rail in trace.source.rails}


def _rail_window(trace: Trace, rail: str, window: Span, idle: Span | None, slack: float) -> RailWindow:
    energy = rail_energy(trace, rail, *window)
    reason = _why_none(trace.source, window, energy)
    figures: dict[str, float | None] = dict.fromkeys(_FIGURES)
    if energy is not None and not _too_few(trace.source, energy):
        watts = energy.watts
        figures |= {"watts": watts, "bound_watts": energy.bound / energy.covered}
        rest = rail_energy(trace, rail, *idle) if idle else None
        if rest is not None and idle and not _why_none(trace.source, idle, rest):
            net = watts - rest.watts
            bound = net_bound(energy, rest) * energy.covered + abs(net) * slack
            figures |= {"idle_watts": rest.watts, "net_watts": net}
            figures |= {"net_joules": net * energy.covered, "net_bound_joules": bound}
        figures |= {"joules": energy.joules, "bound_joules": energy.bound + watts * slack}
        if reason:
            figures |= dict.fromkeys(("joules", "bound_joules", "net_joules", "net_bound_joules"))
    covered, readings = (energy.coverage, energy.readings) if energy else (0.0, 0)
    return RailWindow(**figures, covered=covered, readings=readings, reason=reason)


def _too_few(source: SourceInfo, energy: RailEnergy) -> bool:
    return source.quantity == WATTS and energy.readings < LEAST_READINGS


def _why_none(source: SourceInfo, window: Span, energy: RailEnergy | None) -> str:
    """Why a window has no joules; empty if it has."""
    length = duration(window[1] - window[0])
    if energy is None:
        return f"no reading in {length}"
    if energy.coverage < LEAST_COVERAGE:
        return f"only {percent(energy.coverage)} of {length} have readings"
    if _too_few(source, energy):
        count = f"{energy.readings} reading{'' if energy.readings == 1 else 's'}"
        return f"{length} is too short for a bound: {count}, at least {LEAST_READINGS} are needed"
    return ""


class PowerWindow:
    """The time inside a ``with power_window()`` block. Its figures can be read when the block has ended.

    ``joules``, ``watts``, ``bound`` and the net figures are those of the rail that contains all others, or of the only
    one. ``rails`` has every rail.
    """

    def __init__(self, name: str, sampler: PowerSampler, idle: Span | None = None) -> None:
        """Begin a window now; ``sampler`` is running."""
        self.name, self.idle = name, idle
        self._sampler = sampler
        self._start = time.monotonic()
        self._stop: float | None = None

    @property
    def source(self) -> SourceInfo:
        """Where the readings come from."""
        assert self._sampler.info is not None
        return self._sampler.info

    @property
    def span(self) -> Span:
        """Begin and end, s on CLOCK_MONOTONIC; until now, while the block runs."""
        return self._start, time.monotonic() if self._stop is None else self._stop

    @property
    def seconds(self) -> float:
        """Length; until now, while the block runs."""
        start, stop = self.span
        return stop - start

    @property
    def trace(self) -> Trace:
        """All readings of the sampler, also those before and after the window."""
        return self._sampler.trace()

    @cached_property
    def rails(self) -> dict[str, RailWindow]:
        """Figures per rail.

        Raises:
            PowerError: the block has not ended.
        """
        if self._stop is None:
            raise PowerError(f"{self._label} has not ended", hint="read its figures after the with block")
        self._await_reading(self._stop)
        return rail_windows(self.trace, self.span, self.idle)

    @property
    def joules(self) -> float:
        """Gross energy, J.

        Raises:
            PowerError: the window was too short, readings are missing, or no rail stands for the whole source.
        """
        return self._figure("joules")

    @property
    def bound(self) -> float:
        """Largest error of ``joules``; :func:`cdkd_edge.board.power.energy.bound_holds` says for which loads."""
        return self._figure("bound_joules")

    @property
    def watts(self) -> float:
        """Mean power, W; errors as for ``joules``."""
        return self._figure("watts")

    @property
    def idle_watts(self) -> float:
        """Power before the block, W.

        Raises:
            PowerError: it was not measured.
        """
        return self._figure("idle_watts")

    @property
    def net_joules(self) -> float:
        """``joules`` without idle power; errors as for both."""
        return self._figure("net_joules")

    @property
    def net_bound(self) -> float:
        """Largest error of ``net_joules``."""
        return self._figure("net_bound_joules")

    @property
    def net_watts(self) -> float:
        """``watts`` without idle power; errors as for both."""
        return self._figure("net_watts")

    @contextlib.contextmanager
    def part(self, name: str = "") -> Iterator[PowerWindow]:
        """A window within this one, of the same readings. Parts may overlap, and there may be any number of them."""
        inner = PowerWindow(name, self._sampler, self.idle)
        try:
            yield inner
        finally:
            inner.end()

    def end(self) -> None:
        """End the window now."""
        self._stop = time.monotonic()

    @property
    def _label(self) -> str:
        return f"the window {self.name}" if self.name else "the window"

    def _figure(self, field: str) -> float:
        main = main_rail(self.source)
        if main is None:
            rails = ", ".join(self.source.rails)
            raise PowerError(f"no rail of {self.source.name} stands for all of it: {rails}", hint="see window.rails")
        value: float | None = getattr(self.rails[main], field)
        if value is None:
            reason = self.rails[main].reason or "idle power was not measured, or with too few readings"
            hint = None if self.rails[main].reason else "power_window(idle=5) measures it for 5 s before the block"
            raise PowerError(f"{main} in {self._label}: {reason}", hint=hint)
        return value

    def _await_reading(self, moment: float) -> None:
        """Wait until a reading after a moment can be expected: it bounds the window's end."""
        left = moment + 2 * self.source.nominal_interval - time.monotonic()
        if left > 0 and not self._sampler.lost():
            time.sleep(left)


def main_rail(source: SourceInfo) -> str | None:
    """The rail that contains all others, or the only one; None if there is neither."""
    return source.total or (source.rails[0] if len(source.rails) == 1 else None)


@contextlib.contextmanager
def open_window(
    name: str = "", *, source: str | None = None, interval: float = 0.1, idle: float = 0.0, **options: Any
) -> Iterator[PowerWindow]:
    """Measure the block, after ``idle`` seconds in which idle power is measured; see :func:`cdkd_edge.power_window`.

    Raises:
        PowerError: no source answers, with the reason of each.
        UsageError: there is no source of that name, or a time is not one.
    """
    if not 0 <= idle < math.inf:
        raise UsageError(f"--idle must be 0 or more seconds, not {idle:g}")
    with find_source(source, interval, **options) as sampler:
        begin = time.monotonic()
        time.sleep(idle)
        window = PowerWindow(name, sampler, (begin, time.monotonic()) if idle else None)
        try:
            yield window
        finally:
            window.end()
            window._await_reading(window.span[1])
