"""The phases of a benchmark: idle, warm-up until the engine is steady, load, and idle again.

With power, there is an idle phase before the first load and after every load, with the engine loaded, so that each load
has one on both sides; without power there are no idle phases. The warm-up is over when its last windows agree in speed,
power and temperature. A batch is launched when the one before is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cdkd_edge.benchmark.folder import TimedBatch
from cdkd_edge.benchmark.record import IDLE, LOAD, WARM_UP, Phase, Protocol
from cdkd_edge.board.conditions import ConditionsMonitor
from cdkd_edge.board.power.energy import rail_energy
from cdkd_edge.board.power.sampler import PowerSampler
from cdkd_edge.core.errors import UsageError
from cdkd_edge.engines.protocol import Engine

DEFAULT = Protocol(
    "default", idle_seconds=10.0, load_seconds=60.0, repeats=1, window_seconds=5.0, warm_up_cap_seconds=120.0,
    min_batches=8,
)  # fmt: skip
# The Mask-CDKD paper: tiles of 1024 px, one at a time. It does not say how long it measured; these times are longer
# than MLPerf Power requires, and three repeats give an interval.
PAPER = replace(DEFAULT, preset="paper", idle_seconds=60.0, load_seconds=120.0, repeats=3, warm_up_cap_seconds=600.0)
# MLPerf Inference runs last at least 600 s; MLPerf Power requires 60 s, measured in the same run.
MLPERF = replace(DEFAULT, preset="mlperf", idle_seconds=60.0, load_seconds=600.0, warm_up_cap_seconds=600.0)

WINDOWS = 3  # number of successive windows that must agree for the engine to count as steady
SPEED_TOLERANCE = 0.03  # largest difference between their speeds, as a share of the mean
POWER_TOLERANCE = 0.03  # largest difference between their watts, as a share of the mean
LEAST_WATTS = 0.2  # a smaller difference in watts is ignored: a few steps of an INA3221 on 5 V (about 0.04 W each)
TEMPERATURE_TOLERANCE = 1.0  # largest difference between their temperatures, degrees Celsius

SETTLE_SECONDS = 2.0  # pause between a load and the idle phase after it, for clocks and regulators to come down
STATUS_EVERY = 0.5  # seconds between two updates of the status line. They cost time in the process that is measured.
# Seconds without a power reading, or share of a load phase if that is longer, after which the run ends: so long a gap
# makes it invalid in any case.
LONGEST_SILENCE, LONGEST_SILENCE_SHARE = 5.0, 0.05


def protocol_of(
    preset: Literal["default", "paper", "mlperf"] = "default",
    *,
    idle: float | None = None,
    load: float | None = None,
    warm_up_cap: float | None = None,
    repeats: int | None = None,
) -> Protocol:
    """A preset with changes. The times and repeats of ``paper`` and ``mlperf`` can be raised but not lowered.

    Raises:
        UsageError: a value is out of range, or lower than the preset allows.
    """
    base = {"default": DEFAULT, "paper": PAPER, "mlperf": MLPERF}[preset]
    given = {"idle_seconds": idle, "load_seconds": load, "warm_up_cap_seconds": warm_up_cap, "repeats": repeats}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = replace(base, **changes)
    for option, seconds in (("--idle", chosen.idle_seconds), ("--duration", chosen.load_seconds)):
        if not 0 < seconds < math.inf:
            raise UsageError(f"{option} must be a number of seconds above 0, got {seconds:g}")
    if not 0 <= chosen.warm_up_cap_seconds < math.inf:
        raise UsageError(f"--max-warm-up must be 0 or more seconds, got {chosen.warm_up_cap_seconds:g}")
    if chosen.repeats < 1:
        raise UsageError(f"--repeat must be at least 1, got {chosen.repeats}")
    if preset != "default":
        for name, option in (("idle_seconds", "--idle"), ("load_seconds", "--duration"), ("repeats", "--repeat")):
            value, least = getattr(chosen, name), getattr(base, name)
            if value < least:
                raise UsageError(f"--{preset} needs {option} of at least {least:g}, got {value:g}")
    # The three windows must fit into the warm-up.
    return replace(chosen, window_seconds=min(base.window_seconds, max(chosen.warm_up_cap_seconds / 6, 0.01)))


@dataclass(frozen=True)
class Window:
    """Means over a part of the warm-up."""

    speed: float  # batches per second
    watts: float | None
    celsius: float | None  # temperature at the end of the window


def is_steady(windows: Sequence[Window]) -> bool:
    """Whether the last windows agree. A quantity that is not measured in all of them is not compared."""
    last = windows[-WINDOWS:]
    if len(last) < WINDOWS:
        return False
    # Quantity, its absolute tolerance, and its tolerance as a share of the mean: the larger of the two counts.
    watts, celsius = ("watts", LEAST_WATTS, POWER_TOLERANCE), ("celsius", TEMPERATURE_TOLERANCE, 0.0)
    for name, absolute, share in (("speed", 0.0, SPEED_TOLERANCE), watts, celsius):
        values = [getattr(window, name) for window in last]
        if None not in values and max(values) - min(values) > max(absolute, share * sum(values) / WINDOWS):
            return False
    return True


@dataclass(frozen=True)
class LiveStatus:
    """What the run is doing now, for the status line."""

    phase: str
    repeat: int
    repeats: int
    tiles_per_second: float | None
    watts: float | None  # power of the total rail, or of the first one
    celsius: float | None  # temperature of the hottest zone; tj on a Jetson
    seconds_left: float | None  # time left in the phase; in a warm-up, the most it can take


@dataclass
class Timeline:
    """What happened in a run. Times are seconds from its start."""

    origin: float  # start of the run, s on CLOCK_MONOTONIC
    completed: list[Phase] = field(default_factory=list)  # phases that were completed
    batches: list[TimedBatch] = field(default_factory=list)
    steady: list[bool] = field(default_factory=list)  # for each repeat, whether its warm-up became steady
    broken_off: str = ""  # why the run ended early; empty if it did not
    cut_off: Phase | None = None  # the phase in which it ended early, kept apart: nothing is computed from it

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, including the one that was cut off."""
        return (*self.completed, self.cut_off) if self.cut_off else tuple(self.completed)

    def phase(self, name: str, repeat: int) -> Phase:
        """A completed phase of a repeat; KeyError if it did not take place."""
        found: dict[tuple[str, int], Phase] = {(phase.name, phase.repeat): phase for phase in self.completed}
        return found[name, repeat]

    @property
    def loads(self) -> list[Phase]:
        """The load phases, including one that was cut off."""
        return [phase for phase in self.phases if phase.name == LOAD]

    def clock(self, phase: Phase) -> tuple[float, float]:
        """Start and stop of a phase on CLOCK_MONOTONIC."""
        return self.origin + phase.start, self.origin + phase.stop

    def batches_of(self, phase: Phase) -> list[TimedBatch]:
        """The batches of a phase."""
        return [one for one in self.batches if (one.phase, one.repeat) == (phase.name, phase.repeat)]


class _PowerLostError(Exception):
    """The power source stopped answering."""


@dataclass
class PhaseRunner:
    """Runs idle, warm-up and load as often as the protocol says."""

    engine: Engine  # loaded, with its inputs filled
    protocol: Protocol
    sampler: PowerSampler | None  # running; None: without power
    monitor: ConditionsMonitor  # running
    show_status: Callable[[LiveStatus], None]  # called about twice a second
    go_on: bool  # continue when the power source stops answering, although the run is then invalid
    timeline: Timeline = field(default_factory=lambda: Timeline(time.monotonic()))
    begun: tuple[Literal["idle", "warm-up", "load"], int, float] | None = None  # the phase that is going on
    shown: float = 0.0  # when the status line was updated, s on CLOCK_MONOTONIC

    def run(self) -> Timeline:
        """Run all phases; EngineError if the engine fails."""
        self._await_readings()  # some before the first phase
        try:
            for repeat in range(self.protocol.repeats):
                if self.sampler is not None:
                    self._idle(repeat)
                self._warm_up(repeat)
                self._load(repeat)
            if self.sampler is not None:
                self._idle(self.protocol.repeats)
            self._await_readings()  # some after the last phase
        except _PowerLostError as lost:
            self.timeline.broken_off = str(lost)
            if self.begun is not None:
                self.timeline.cut_off = Phase(*self.begun, self._now())
        return self.timeline

    def _await_readings(self) -> None:
        if self.sampler is not None:
            assert self.sampler.info is not None
            time.sleep(3 * self.sampler.info.nominal_interval)

    def _now(self) -> float:
        return time.monotonic() - self.timeline.origin

    def _begin(self, name: Literal["idle", "warm-up", "load"], repeat: int) -> float:
        self.begun = (name, repeat, self._now())
        return self.begun[-1]

    def _end(self, stop: float | None = None) -> None:
        assert self.begun is not None
        self.timeline.completed.append(Phase(*self.begun, self._now() if stop is None else stop))
        self.begun = None

    def _idle(self, repeat: int) -> None:
        if repeat:
            self._wait(SETTLE_SECONDS, repeat)
        self._begin(IDLE, repeat)
        self._wait(self.protocol.idle_seconds, repeat)
        self._end()

    def _wait(self, seconds: float, repeat: int) -> None:
        end = self._now() + seconds
        while (left := end - self._now()) > 0:
            self._update(IDLE, repeat, None, left)
            time.sleep(min(left, 1.0))  # idle power is being measured: nothing else may run

    def _warm_up(self, repeat: int) -> None:
        windows: list[Window] = []
        start = self._begin(WARM_UP, repeat)
        cap = start + self.protocol.warm_up_cap_seconds
        least = 2 if self.protocol.warm_up_cap_seconds else 1  # batches in a window
        while not is_steady(windows) and (not windows or start < cap):
            count = self._run_batches(WARM_UP, repeat, start + self.protocol.window_seconds, least, cap)
            stop = self._now()
            windows.append(Window(count / (stop - start), self._watts(start, stop), self._celsius()))
            start = self._now()
        self._end()
        self.timeline.steady.append(is_steady(windows))

    def _watts(self, start: float, stop: float) -> float | None:
        if self.sampler is None or not (rail := self._rail()):
            return None
        energy = rail_energy(self.sampler.trace(), rail, self.timeline.origin + start, self.timeline.origin + stop)
        return energy.watts if energy else None

    def _load(self, repeat: int) -> None:
        end = self._begin(LOAD, repeat) + self.protocol.load_seconds
        self._run_batches(LOAD, repeat, end, self.protocol.min_batches, end)
        last = self.timeline.batches[-1]
        self._end(last.start + last.latency)

    def _run_batches(self, phase: str, repeat: int, until: float, at_least: int, shown_end: float) -> int:
        """Run batches until one ends at ``until`` or later; return their number."""
        engine, origin, batches = self.engine, self.timeline.origin, self.timeline.batches
        count, began = 0, self._now()
        done = origin + began
        # The end of the last batch decides. Reading the clock again would count the status update as measured time.
        while count < at_least or done - origin < until:
            slot = len(batches) % engine.slots
            begin = time.monotonic()
            engine.launch(slot)
            engine.wait(slot)
            done = time.monotonic()
            batches.append(TimedBatch(repeat, phase, begin - origin, done - begin))
            count += 1
            if done - self.shown > STATUS_EVERY:
                rate = count * engine.batch / (done - origin - began)
                self._update(phase, repeat, rate, max(0.0, shown_end - (done - origin)))
        return count

    def _update(self, phase: str, repeat: int, rate: float | None, left: float | None) -> None:
        self.shown = time.monotonic()
        watts = None
        if self.sampler is not None:
            self._require_power()
            watts = self.sampler.watts().get(self._rail() or "")
        self.show_status(LiveStatus(phase, repeat, self.protocol.repeats, rate, watts, self._celsius(), left))

    def _require_power(self) -> None:
        """End a run that cannot become valid because power readings are missing."""
        assert self.sampler is not None
        assert self.sampler.info is not None
        lost, rail = self.sampler.lost(), self._rail()
        interval = self.sampler.info.nominal_interval  # another client may have set a long one
        longest = max(LONGEST_SILENCE, LONGEST_SILENCE_SHARE * self.protocol.load_seconds, 3 * interval)
        if not lost and (silence := self.sampler.silence(rail)) > longest:
            # Either no readings at all, or none of this rail: whether others came after its last one tells which.
            since = time.monotonic() - silence + self.sampler.info.longest_step
            lacking = any(last.time > since for last in self.sampler.samples[-1:])
            lost = f"no reading{f' of {rail}' if lacking else ''} for {silence:.1f} s"
        if lost and not self.go_on:
            raise _PowerLostError(f"{self.sampler.source} stopped answering: {lost}")

    def _rail(self) -> str | None:
        """The total rail, or else the first one."""
        info = self.sampler.info if self.sampler else None
        return None if info is None else info.total or next(iter(info.rails), None)

    def _celsius(self) -> float | None:
        latest = self.monitor.latest()
        return hottest(latest.temperatures) if latest else None


def hottest(temperatures: Mapping[str, float]) -> float | None:
    """Degrees Celsius of tj, a Jetson's hottest spot; elsewhere of the hottest zone; None if none is read."""
    junction = [value for name, value in temperatures.items() if name.casefold().startswith("tj")]
    return max(junction or temperatures.values(), default=None)
