"""Samples over time, and joules from them with an error bound.

Power is taken to change linearly between two readings: the trapezoid rule over the actual moments. A window is a phase
of a run, and power jumps where a phase begins or ends. So between an edge and the nearest reading inside, that reading
stands for itself; the line to the reading outside belongs to another phase and is not drawn. (Drawn, it puts up to half
an interval of load into idle: 3.8 % too much in 3 s of idling at 5.74 W before a load of 18.95 W, sampled at 10 Hz.) A
reading so close to an edge that it may belong to either side is not used. A gap is left out: its time is not covered,
and joules are those of the covered time. Joules of a counter are differences of its readings; at the edges its step
continues at the pace of the step inside. A gap within a counter loses nothing.

``bound`` says by how much the joules of the covered time may be wrong, through sampling and through the sensor's offset
and steps, where its data sheet is known. :func:`bound_holds` says for which loads. Between two readings of watts a load
may do anything, so a bound needs an assumption:

- Watts at regular moments: the sum over steps of 1/2 dt |P2 - P1|. It holds if power between two readings stays between
  them. A load that changes in step with the readings looks constant, and is wrong by any amount.
- Watts at moments drawn at random: the sum is a random sample of the load, whatever the load does (but for loads in
  step with the sensor's own measurements), and its error is known from the scatter of the readings. Three times the
  root of the sum of 1/2 (dt |P2 - P1|)^2, to which one more change as large as the largest is added for what was
  missed: 99 % confidence. (Neighbours differ at least as much as readings within one step would.)
- A counter adds up between its readings by itself: only the steps that the edges cut count, for any load.

At the edges of watts dt |P2 - P1| is added; there and between regular readings u |P2 - P1|, ``u`` being the larger
uncertainty of the two moments.

A sensor's offset is the same in idle and in load: gross joules carry it, net ones (load minus idle) do not. Its steps
count in both, half a step for every mean, as if no load ever moved a reading from one step to the next. Errors in
proportion to the power, such as that of a gain, are in no bound: they change all figures of a board alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

from cdkd_edge.board.power.protocol import WATTS, Sample, SourceInfo

Series = list[tuple[float, float, float]]  # moment, value, uncertainty of each reading


@dataclass(frozen=True)
class Gap:
    """A time without readings. It is reported and never filled."""

    start: float
    stop: float
    missed: int  # readings that should have come in it, one in an interval

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.stop - self.start


@dataclass(frozen=True)
class Problem:
    """A fault while sampling."""

    time: float  # when it was noticed, s on CLOCK_MONOTONIC
    kind: str  # ``rail``, ``unreadable``, ``stalled``, ``interval``, ``lost`` (the source), ``died`` (the process)
    message: str


@dataclass(frozen=True)
class Trace:
    """Everything that was sampled."""

    source: SourceInfo
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    start: float  # when sampling had begun, s on CLOCK_MONOTONIC
    stop: float

    @property
    def main(self) -> str:
        """The rail that stands for the source: the total, or the first one."""
        return self.source.total or next(iter(self.source.rails), "")

    @property
    def readings(self) -> list[float]:
        """When the main rail was read. Others may be read less often."""
        return [one.time for one in self.samples if self.main in one.values]

    @property
    def rate(self) -> float | None:
        """Readings of the main rail per second that were reached; None below two readings."""
        times = self.readings
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None

    @property
    def late(self) -> int:
        """Readings of the main rail that came more than half an interval late."""
        limit = 1.5 * self.source.nominal_interval
        return sum(b - a > limit for a, b in pairwise(self.readings))

    def around(self, rail: str, start: float, stop: float) -> Trace:
        """The part between two moments, with two readings of a rail before and two after, each clear of the moment."""
        first = bisect_left(self.samples, start, key=lambda one: one.time)
        last = bisect_right(self.samples, stop, key=lambda one: one.time)
        before = after = 0
        while first > 0 and before < 2:
            first -= 1
            one = self.samples[first]
            before += rail in one.values and start - one.time >= one.uncertainty
        while last < len(self.samples) and after < 2:
            one = self.samples[last]
            after += rail in one.values and one.time - stop >= one.uncertainty
            last += 1
        return replace(self, samples=self.samples[first:last])

    def series(self, rail: str) -> Series:
        """Readings of a rail, where it could be read."""
        return [(one.time, one.values[rail], one.uncertainty) for one in self.samples if rail in one.values]

    def gaps(self, rail: str | None = None, start: float | None = None, stop: float | None = None) -> tuple[Gap, ...]:
        """Where readings of a rail (default: of any) are missing between two moments (default: of the whole trace)."""
        begin, end = self.start if start is None else start, self.stop if stop is None else stop
        times = [one.time for one in self.samples if rail is None or rail in one.values]
        # What comes before the first and after the last reading is missing too.
        ends = [-float("inf"), *times, float("inf")]
        found = []
        for before, after in pairwise(ends):
            a, b = max(before, begin), min(after, end)
            if after - before > self.source.longest_step and b > a:
                known = (before > -float("inf")) + (after < float("inf"))
                # The edges of a trace lie up to one interval from a reading.
                if known < 2 and b - a <= self.source.longest_step:
                    continue
                found.append(Gap(a, b, max(1, round((b - a) / self.source.nominal_interval) - 1)))
        return tuple(found)


@dataclass(frozen=True)
class RailEnergy:
    """Energy of one rail in a window."""

    rail: str
    joules: float  # in the covered time
    seconds: float  # length of the window
    covered: float  # seconds of it that lie between readings
    bound: float  # joules that the figure may be wrong by; see the module and :func:`bound_holds`
    readings: int  # readings in the window
    gaps: tuple[Gap, ...]
    offset: float = 0.0  # joules of the bound that are the sensor's offset

    @property
    def watts(self) -> float:
        """Mean over the covered time."""
        return self.joules / self.covered

    @property
    def coverage(self) -> float:
        """Covered share of the window, 0..1."""
        return self.covered / self.seconds

    @property
    def own_bound_watts(self) -> float:
        """By how much the mean may be wrong without the offset, which means over other windows have as well."""
        return (self.bound - self.offset) / self.covered


def rail_energy(trace: Trace, rail: str, start: float, stop: float) -> RailEnergy | None:
    """Energy of a rail between two moments (s on CLOCK_MONOTONIC); None where no time between them is covered.

    The trace should begin before ``start`` and end after ``stop``. ValueError: the window is empty.
    """
    if not stop > start:
        raise ValueError("an empty window has no energy")
    trace = trace.around(rail, start, stop)  # asked after every window of a warm-up, of a trace that grows
    series = trace.series(rail)
    inner = range(1, len(series) - 1)  # the first and the last say where covered time begins and ends
    clear = [
        (t, v, u)
        for index, (t, v, u) in enumerate(series)
        if index not in inner or (abs(t - start) >= u and abs(t - stop) >= u)
    ]
    if trace.source.quantity == WATTS:
        joules, covered, bound = _of_watts(clear, start, stop, trace.source)
    else:
        joules, covered, bound = _of_counter(clear, start, stop)
    if covered <= 0:
        return None
    readings = sum(start <= time <= stop for time, _, _ in series)
    offset = 0.0
    if known := trace.source.accuracy.get(rail):
        offset = known.offset * covered
        bound += offset + known.resolution(joules / covered) * covered
    return RailEnergy(rail, joules, stop - start, covered, bound, readings, trace.gaps(rail, start, stop), offset)


def net_bound(load: RailEnergy, *idles: RailEnergy) -> float:
    """By how many watts load minus the mean of idle phases may be wrong: the sensor's offset cancels, its steps not."""
    return load.own_bound_watts + sum(idle.own_bound_watts for idle in idles) / len(idles)


def bound_holds(source: SourceInfo) -> str:
    """For which loads the bound on joules of a source holds, as a sentence."""
    if source.quantity != WATTS:
        return "for any load: the counter adds up between readings by itself"
    if source.random_moments:
        missed = "(peaks that last for less than three readings in all can be missed)"
        loads = "any load"
        if source.cycle:
            loads = f"any load but one in step with the sensor, which measures every {1000 * source.cycle:.2g} ms"
        return f"with 99 % confidence for {loads}: every reading is taken at a random moment {missed}"
    loads = "a load that changes in step with the readings, or up and down between two of them, can be off by more"
    return f"only if power between two readings stays between them: {loads}"


def _of_watts(series: Series, start: float, stop: float, source: SourceInfo) -> tuple[float, float, float]:
    """Joules, covered seconds, bound."""
    joules = covered = bound = 0.0
    scatter = largest = 0.0  # J^2
    for (t1, p1, u1), (t2, p2, u2) in pairwise(series):
        begin, end, step = max(t1, start), min(t2, stop), t2 - t1
        if end <= begin or not 0 < step <= source.longest_step:
            continue
        seconds, change = end - begin, abs(p2 - p1)
        if t1 < start and t2 < stop:
            watts = p2
        elif t2 >= stop and t1 >= start:
            watts = p1
        else:  # both inside, or a window between two readings
            watts = p1 + (p2 - p1) * ((begin + end) / 2 - t1) / step
        inside = t1 >= start and t2 < stop
        joules += watts * seconds
        covered += seconds
        if not inside or not source.random_moments:
            bound += change * (seconds * (0.5 if inside else 1) + max(u1, u2))
        else:
            scatter += (change * seconds) ** 2 / 2
            largest = max(largest, (change * seconds) ** 2)
    return joules, covered, bound + 3 * math.sqrt(scatter + largest)


def _of_counter(series: Series, start: float, stop: float) -> tuple[float, float, float]:
    """Joules, covered seconds, bound."""
    steps = [  # from, to, joules, uncertainty; where a counter began anew, how much passed is not known
        (t1, t2, v2 - v1, max(u1, u2))
        for (t1, v1, u1), (t2, v2, u2) in pairwise(series)
        if v2 >= v1 and t2 > max(t1, start) and t1 < stop
    ]
    inside = [(t1, t2, change / (t2 - t1)) for t1, t2, change, _ in steps if t1 >= start and t2 <= stop]
    joules = covered = bound = 0.0
    for t1, t2, change, uncertainty in steps:
        seconds = min(t2, stop) - max(t1, start)
        covered += seconds
        if t1 >= start and t2 <= stop:
            joules += change
            continue
        beside = next((pace for a, b, pace in inside if a == t2 or b == t1), change / (t2 - t1))
        part = min(change, beside * seconds)
        joules += part
        bound += max(part, change - part) + change / (t2 - t1) * uncertainty
    return joules, covered, bound
