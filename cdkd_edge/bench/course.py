"""The course of a benchmark: idle, warm-up until steady, load, and idle again.

With power, the engine idles while loaded, before the first load and after every one, so that each load has an idle
phase on both sides; without power there is no idle phase. Warm-up ends when windows agree
(:mod:`cdkd_edge.bench.course`). Engine runs follow one another: a batch is launched when the one before is done.

Whether warm-up is over: the last windows agree in speed, power and temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cdkd_edge.bench.folder import TimedBatch
from cdkd_edge.bench.record import IDLE, LOAD, WARM_UP, Protocol, Span
from cdkd_edge.board.conditions import ConditionsMonitor
from cdkd_edge.board.power.energy import rail_energy
from cdkd_edge.board.power.sampler import PowerSampler
from cdkd_edge.engines.protocol import Engine

WINDOWS = 3
"""Windows in a row that must agree."""
SPEED_TOLERANCE = 0.03
"""Largest difference of their speeds, as a share of the mean."""
POWER_TOLERANCE = 0.03
"""The same for watts."""
LEAST_WATTS = 0.2
"""A difference below it counts as none: a few steps of an INA3221 on 5 V (about 0.04 W each)."""
TEMPERATURE_TOLERANCE = 1.0
"""Largest difference of their temperatures, degrees Celsius."""


@dataclass(frozen=True)
class Window:
    """Means over a part of the warm-up."""

    speed: float
    """Batches per second."""
    watts: float | None
    celsius: float | None
    """At its end."""


def is_steady(windows: Sequence[Window]) -> bool:
    """Whether the last windows agree; what is not measured in all of them is not asked for."""
    last = windows[-WINDOWS:]
    if len(last) < WINDOWS:
        return False
    speeds = [window.speed for window in last]
    watts = [window.watts for window in last if window.watts is not None]
    celsius = [window.celsius for window in last if window.celsius is not None]
    if _range(speeds) > SPEED_TOLERANCE * sum(speeds) / WINDOWS:
        return False
    if len(watts) == WINDOWS and _range(watts) > max(LEAST_WATTS, POWER_TOLERANCE * sum(watts) / WINDOWS):
        return False
    return len(celsius) < WINDOWS or _range(celsius) <= TEMPERATURE_TOLERANCE


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


SETTLE_SECONDS = 2.0
"""Between a load and the idle phase after it: clocks and regulators come down in this time."""
TELL_EVERY = 0.5
"""Seconds between two live lines. They are drawn by the process that is measured."""
LONGEST_SILENCE = 5.0
"""Seconds without a reading after which the run is broken off, or"""
LONGEST_SILENCE_SHARE = 0.05
"""this share of a load phase, if that is longer. What is missing in it makes the run invalid in any case."""


@dataclass(frozen=True)
class Live:
    """What is going on, for somebody who watches."""

    phase: str
    repeat: int
    repeats: int
    tiles_per_second: float | None
    watts: float | None
    """Of the total rail, or of the first."""
    celsius: float | None
    """The hottest zone that is read: tj on a Jetson."""
    seconds_left: float | None
    """Of the phase; in a warm-up, at most."""


@dataclass
class Course:
    """What happened, moments in s from the start."""

    origin: float
    """Start of the run, s on CLOCK_MONOTONIC."""
    spans: list[Span] = field(default_factory=list)
    batches: list[TimedBatch] = field(default_factory=list)
    steady: list[bool] = field(default_factory=list)
    """Per repeat."""
    broken_off: str = ""
    """Why the course ended early; empty if it did not."""
    cut_off: Span | None = None
    """The phase in which it did; it is not among the others, because nothing is computed from it."""

    @property
    def phases(self) -> tuple[Span, ...]:
        """All of them, the one that was cut off included."""
        return (*self.spans, self.cut_off) if self.cut_off else tuple(self.spans)

    def span(self, name: str, repeat: int) -> Span:
        """The phase of a repeat.

        Raises:
            KeyError: it did not take place.
        """
        for span in self.spans:
            if (span.name, span.repeat) == (name, repeat):
                return span
        raise KeyError(name)


def run_course(
    engine: Engine,
    protocol: Protocol,
    sampler: PowerSampler | None,
    monitor: ConditionsMonitor,
    tell: Callable[[Live], None] = lambda live: None,
    *,
    go_on: bool = False,
) -> Course:
    """Idle, warm up, load, as often as the protocol says.

    Args:
        engine: loaded, with its inputs filled.
        protocol: times and repeats.
        sampler: of power, running; None: without power.
        monitor: of clocks and temperatures, running.
        tell: called about twice a second.
        go_on: whether to go on when the source of power is lost, or the run is invalid for that anyhow.

    Raises:
        EngineError: the engine failed.
    """
    return _Run(engine, protocol, sampler, monitor, tell, go_on).run()


class _LostError(Exception):
    """The source of power is gone."""


class _Run:
    def __init__(
        self,
        engine: Engine,
        protocol: Protocol,
        sampler: PowerSampler | None,
        monitor: ConditionsMonitor,
        tell: Callable[[Live], None],
        go_on: bool,
    ) -> None:
        self.engine, self.protocol, self.sampler, self.monitor = engine, protocol, sampler, monitor
        self.tell, self.go_on = tell, go_on
        self.course = Course(time.monotonic())
        self._begun: tuple[Literal["idle", "warm-up", "load"], int, float] | None = None
        self._told = 0.0
        self._batch = 0

    def run(self) -> Course:
        if self.sampler is not None:  # readings before the first phase
            assert self.sampler.info is not None
            time.sleep(3 * self.sampler.info.nominal_interval)
        try:
            for repeat in range(self.protocol.repeats):
                if self.sampler is not None:
                    self._idle(repeat)
                self._warm_up(repeat)
                self._load(repeat)
            if self.sampler is not None:
                self._idle(self.protocol.repeats)
                assert self.sampler.info is not None
                time.sleep(3 * self.sampler.info.nominal_interval)  # readings after the last one
        except _LostError as lost:
            self.course.broken_off = str(lost)
            if self._begun is not None:
                self.course.cut_off = Span(*self._begun, self._now())
        return self.course

    def _now(self) -> float:
        return time.monotonic() - self.course.origin

    def _begin(self, name: Literal["idle", "warm-up", "load"], repeat: int) -> float:
        self._begun = (name, repeat, self._now())
        return self._begun[-1]

    def _end(self, stop: float) -> None:
        assert self._begun is not None
        self.course.spans.append(Span(*self._begun, stop))
        self._begun = None

    def _idle(self, repeat: int) -> None:
        if repeat:
            self._rest(SETTLE_SECONDS, repeat)
        self._begin(IDLE, repeat)
        self._rest(self.protocol.idle_seconds, repeat)
        self._end(self._now())

    def _rest(self, seconds: float, repeat: int) -> None:
        end = self._now() + seconds
        while (left := end - self._now()) > 0:
            self._say(IDLE, repeat, None, left)
            time.sleep(min(left, 1.0))  # the measurement itself: nothing may run now

    def _warm_up(self, repeat: int) -> None:
        protocol, start = self.protocol, self._begin(WARM_UP, repeat)
        windows: list[Window] = []
        cap = start + protocol.warm_up_cap_seconds
        while not is_steady(windows) and (not windows or self._now() < cap):
            windows.append(self._window(repeat, cap))
        self._end(self._now())
        self.course.steady.append(is_steady(windows))

    def _window(self, repeat: int, cap: float) -> Window:
        """Batches for a window's time, and at least two."""
        start = self._now()
        least = 2 if self.protocol.warm_up_cap_seconds else 1
        count = self._batches(WARM_UP, repeat, start + self.protocol.window_seconds, least, cap)
        stop = self._now()
        watts = None
        if self.sampler is not None and (rail := self._rail()):
            origin = self.course.origin
            energy = rail_energy(self.sampler.trace(), rail, origin + start, origin + stop)
            watts = energy.watts if energy else None
        return Window(count / (stop - start), watts, self._celsius())

    def _load(self, repeat: int) -> None:
        end = self._begin(LOAD, repeat) + self.protocol.load_seconds
        self._batches(LOAD, repeat, end, self.protocol.min_batches, end)
        last = self.course.batches[-1]
        self._end(last.start + last.latency)

    def _batches(self, phase: str, repeat: int, until: float, at_least: int, tell_until: float) -> int:
        """Run batches until the last one ends at that moment or after it; how many they were."""
        engine, origin, batches = self.engine, self.course.origin, self.course.batches
        count, began = 0, self._now()
        done = origin + began
        # Told by the last batch's own end: with a later look at the clock, what is told in between shortens the phase.
        while count < at_least or done - origin < until:
            slot = self._batch % engine.slots
            begin = time.monotonic()
            engine.launch(slot)
            engine.wait(slot)
            done = time.monotonic()
            batches.append(TimedBatch(repeat, phase, begin - origin, done - begin))
            count += 1
            self._batch += 1
            if done - self._told > TELL_EVERY:
                rate = count * engine.batch / (done - origin - began)
                self._say(phase, repeat, rate, max(0.0, tell_until - (done - origin)))
        return count

    def _say(self, phase: str, repeat: int, rate: float | None, left: float | None) -> None:
        self._told = time.monotonic()
        watts = None
        if self.sampler is not None:
            self._require_power()
            watts = self.sampler.watts().get(self._rail() or "")
        self.tell(Live(phase, repeat, self.protocol.repeats, rate, watts, self._celsius(), left))

    def _require_power(self) -> None:
        """End a course that cannot become valid any more."""
        assert self.sampler is not None
        lost, rail = self.sampler.lost(), self._rail()
        longest = max(LONGEST_SILENCE, LONGEST_SILENCE_SHARE * self.protocol.load_seconds)
        if self.sampler.info is not None:  # another client may have set a long one
            longest = max(longest, 3 * self.sampler.info.nominal_interval)
        if not lost and (silence := self.sampler.silence(rail)) > longest:
            # A reading is heard of a little after it was taken: which of the two clocks runs out first says nothing.
            lacking = self.sampler.samples[-1:] and rail not in self.sampler.samples[-1].values
            lost = f"no reading of {rail} for {silence:.1f} s" if lacking else f"no reading for {silence:.1f} s"
        if lost and not self.go_on:
            raise _LostError(f"{self.sampler.source} stopped answering: {lost}")

    def _rail(self) -> str | None:
        """The rail to watch."""
        info = self.sampler.info if self.sampler else None
        return None if info is None else info.total or next(iter(info.rails), None)

    def _celsius(self) -> float | None:
        latest = self.monitor.latest()
        return hottest(latest.temperatures) if latest else None


def hottest(temperatures: Mapping[str, float]) -> float | None:
    """Degrees Celsius of tj, a Jetson's hottest spot; elsewhere of the hottest zone; None where none is read."""
    junction = [value for name, value in temperatures.items() if name.casefold().startswith("tj")]
    return max(junction or temperatures.values(), default=None)
