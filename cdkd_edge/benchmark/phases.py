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
from typing import Literal

from cdkd_edge.benchmark.folder import TimedBatch
from cdkd_edge.benchmark.record import IDLE, LOAD, WARM_UP, Phase, Protocol
from cdkd_edge.board.conditions import ConditionsMonitor
from cdkd_edge.board.power.energy import rail_energy
from cdkd_edge.board.power.sampler import PowerSampler
from cdkd_edge.core.errors import UsageError
from cdkd_edge.engines.protocol import Engine

DEFAULT = Protocol(
    preset="default",
    idle_seconds=10.0,
    load_seconds=60.0,
    repeats=1,
    window_seconds=5.0,
    warm_up_cap_seconds=120.0,
    min_batches=8,
)
PAPER = replace(DEFAULT, preset="paper", idle_seconds=60.0, load_seconds=120.0, repeats=3, warm_up_cap_seconds=600.0)
"""The Mask-CDKD paper: tiles of 1024 px, one at a time. It does not say how long it measured; these times are longer
than MLPerf Power requires, and three repeats give an interval."""
MLPERF = replace(DEFAULT, preset="mlperf", idle_seconds=60.0, load_seconds=600.0, warm_up_cap_seconds=600.0)
"""MLPerf Inference runs last at least 600 s; MLPerf Power requires 60 s, measured in the same run."""

WINDOWS = 3  # number of successive windows that must agree for the engine to count as steady
SPEED_TOLERANCE = 0.03  # largest difference between their speeds, as a share of the mean
POWER_TOLERANCE = 0.03  # largest difference between their watts, as a share of the mean
LEAST_WATTS = 0.2  # a smaller difference in watts is ignored: a few steps of an INA3221 on 5 V (about 0.04 W each)
TEMPERATURE_TOLERANCE = 1.0  # largest difference between their temperatures, degrees Celsius

SETTLE_SECONDS = 2.0  # pause between a load and the idle phase after it, for clocks and regulators to come down
STATUS_EVERY = 0.5  # seconds between two updates of the status line. They cost time in the process that is measured.
LONGEST_SILENCE, LONGEST_SILENCE_SHARE = 5.0, 0.05
"""Seconds without a power reading, or share of a load phase if that is longer, after which the run ends: so long a gap
makes it invalid in any case."""


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
    chosen = replace(
        base,
        idle_seconds=base.idle_seconds if idle is None else idle,
        load_seconds=base.load_seconds if load is None else load,
        warm_up_cap_seconds=base.warm_up_cap_seconds if warm_up_cap is None else warm_up_cap,
        repeats=base.repeats if repeats is None else repeats,
    )
    for option, seconds in (("--idle", chosen.idle_seconds), ("--duration", chosen.load_seconds)):
        if not 0 < seconds < math.inf:
            raise UsageError(f"{option} must be a number of seconds above 0, got {seconds:g}")
    if not 0 <= chosen.warm_up_cap_seconds < math.inf:
        raise UsageError(f"--max-warm-up must be 0 or more seconds, got {chosen.warm_up_cap_seconds:g}")
    if chosen.repeats < 1:
        raise UsageError(f"--repeat must be at least 1, got {chosen.repeats}")
    if preset != "default":
        for name, option in (("idle_seconds", "--idle"), ("load_seconds", "--duration"), ("repeats", "--repeat")):
            if getattr(chosen, name) < getattr(base, name):
                raise UsageError(
                    f"--{preset} needs {option} of at least {getattr(base, name):g}, got {getattr(chosen, name):g}"
                )
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
    cut_off: Phase | None = None
    """The phase in which it ended early. It is kept apart because nothing is computed from it."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, including the one that was cut off."""
        return (*self.completed, self.cut_off) if self.cut_off else tuple(self.completed)

    def phase(self, name: str, repeat: int) -> Phase:
        """A completed phase of a repeat.

        Raises:
            KeyError: it did not take place.
        """
        for phase in self.completed:
            if (phase.name, phase.repeat) == (name, repeat):
                return phase
        raise KeyError(name)

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


def run_phases(
    engine: Engine,
    protocol: Protocol,
    sampler: PowerSampler | None,
    monitor: ConditionsMonitor,
    show_status: Callable[[LiveStatus], None] = lambda status: None,
    *,
    go_on: bool = False,
) -> Timeline:
    """Run idle, warm-up and load as often as the protocol says.

    Args:
        engine: loaded, with its inputs filled.
        protocol: times and repeats.
        sampler: a running power sampler; None: without power.
        monitor: a running monitor of clocks and temperatures.
        show_status: called about twice a second.
        go_on: continue when the power source stops answering, although the run is then invalid.

    Raises:
        EngineError: the engine failed.
    """
    return _Run(engine, protocol, sampler, monitor, show_status, go_on).run()


class _PowerLostError(Exception):
    """The power source stopped answering."""


class _Run:
    def __init__(
        self,
        engine: Engine,
        protocol: Protocol,
        sampler: PowerSampler | None,
        monitor: ConditionsMonitor,
        show_status: Callable[[LiveStatus], None],
        go_on: bool,
    ) -> None:
        self.engine, self.protocol, self.sampler, self.monitor = engine, protocol, sampler, monitor
        self.show_status, self.go_on = show_status, go_on
        self.timeline = Timeline(time.monotonic())
        self._begun: tuple[Literal["idle", "warm-up", "load"], int, float] | None = None
        self._shown = 0.0
        self._batch = 0

    def run(self) -> Timeline:
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
            if self._begun is not None:
                self.timeline.cut_off = Phase(*self._begun, self._now())
        return self.timeline

    def _await_readings(self) -> None:
        if self.sampler is not None:
            assert self.sampler.info is not None
            time.sleep(3 * self.sampler.info.nominal_interval)

    def _now(self) -> float:
        return time.monotonic() - self.timeline.origin

    def _begin(self, name: Literal["idle", "warm-up", "load"], repeat: int) -> float:
        self._begun = (name, repeat, self._now())
        return self._begun[-1]

    def _end(self, stop: float) -> None:
        assert self._begun is not None
        self.timeline.completed.append(Phase(*self._begun, stop))
        self._begun = None

    def _idle(self, repeat: int) -> None:
        if repeat:
            self._wait(SETTLE_SECONDS, repeat)
        self._begin(IDLE, repeat)
        self._wait(self.protocol.idle_seconds, repeat)
        self._end(self._now())

    def _wait(self, seconds: float, repeat: int) -> None:
        end = self._now() + seconds
        while (left := end - self._now()) > 0:
            self._update(IDLE, repeat, None, left)
            time.sleep(min(left, 1.0))  # idle power is being measured: nothing else may run

    def _warm_up(self, repeat: int) -> None:
        windows: list[Window] = []
        cap = self._begin(WARM_UP, repeat) + self.protocol.warm_up_cap_seconds
        while not is_steady(windows) and (not windows or self._now() < cap):
            windows.append(self._window(repeat, cap))
        self._end(self._now())
        self.timeline.steady.append(is_steady(windows))

    def _window(self, repeat: int, cap: float) -> Window:
        """Run batches for the length of a window, at least two."""
        start = self._now()
        least = 2 if self.protocol.warm_up_cap_seconds else 1
        count = self._run_batches(WARM_UP, repeat, start + self.protocol.window_seconds, least, cap)
        stop = self._now()
        watts = None
        if self.sampler is not None and (rail := self._rail()):
            origin = self.timeline.origin
            energy = rail_energy(self.sampler.trace(), rail, origin + start, origin + stop)
            watts = energy.watts if energy else None
        return Window(count / (stop - start), watts, self._celsius())

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
            slot = self._batch % engine.slots
            begin = time.monotonic()
            engine.launch(slot)
            engine.wait(slot)
            done = time.monotonic()
            batches.append(TimedBatch(repeat, phase, begin - origin, done - begin))
            count += 1
            self._batch += 1
            if done - self._shown > STATUS_EVERY:
                rate = count * engine.batch / (done - origin - began)
                self._update(phase, repeat, rate, max(0.0, shown_end - (done - origin)))
        return count

    def _update(self, phase: str, repeat: int, rate: float | None, left: float | None) -> None:
        self._shown = time.monotonic()
        watts = None
        if self.sampler is not None:
            self._require_power()
            watts = self.sampler.watts().get(self._rail() or "")
        self.show_status(LiveStatus(phase, repeat, self.protocol.repeats, rate, watts, self._celsius(), left))

    def _require_power(self) -> None:
        """End a run that cannot become valid because power readings are missing."""
        assert self.sampler is not None
        lost, rail = self.sampler.lost(), self._rail()
        longest = max(LONGEST_SILENCE, LONGEST_SILENCE_SHARE * self.protocol.load_seconds)
        if self.sampler.info is not None:  # another client may have set a long interval
            longest = max(longest, 3 * self.sampler.info.nominal_interval)
        if not lost and (silence := self.sampler.silence(rail)) > longest:
            # Either no readings at all, or none of this rail: the last one tells which.
            lacking = self.sampler.samples[-1:] and rail not in self.sampler.samples[-1].values
            lost = f"no reading of {rail} for {silence:.1f} s" if lacking else f"no reading for {silence:.1f} s"
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
