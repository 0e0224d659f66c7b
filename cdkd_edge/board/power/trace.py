"""What was sampled: readings, phases, and what is missing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

from cdkd_edge.board.power.protocol import Sample, SourceInfo


@dataclass(frozen=True)
class Phase:
    """A part of a run, s on CLOCK_MONOTONIC."""

    name: str
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.stop - self.start


@dataclass(frozen=True)
class Gap:
    """A time in which readings are missing. It is accounted for and never filled."""

    start: float
    stop: float
    missed: int
    """Readings that should have come in it, one in an interval."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.stop - self.start


@dataclass(frozen=True)
class Problem:
    """Something that went wrong while sampling."""

    time: float
    """When it was noticed, s on CLOCK_MONOTONIC."""
    kind: str
    """``rail``, ``unreadable``, ``stalled``, ``interval``, ``lost`` (the source) or ``died`` (the sampling process)."""
    message: str


@dataclass(frozen=True)
class Trace:
    """Everything that a sampler heard."""

    source: SourceInfo
    samples: tuple[Sample, ...]
    phases: tuple[Phase, ...]
    problems: tuple[Problem, ...]
    start: float
    """When sampling had begun, s on CLOCK_MONOTONIC."""
    stop: float

    @property
    def longest_step(self) -> float:
        """Seconds between two readings above which there is a gap: three intervals and a fifth of a second."""
        return 3 * self.source.nominal_interval + 0.2

    @property
    def rate(self) -> float | None:
        """Readings per second that were reached; None below two readings."""
        if len(self.samples) < 2:
            return None
        return (len(self.samples) - 1) / (self.samples[-1].time - self.samples[0].time)

    @property
    def late(self) -> int:
        """Readings that came more than half an interval late."""
        limit = 1.5 * self.source.nominal_interval
        return sum(b.time - a.time > limit for a, b in pairwise(self.samples))

    def phase(self, name: str) -> Phase:
        """The phase of a name, the last one if there are several.

        Raises:
            KeyError: there is none.
        """
        for phase in reversed(self.phases):
            if phase.name == name:
                return phase
        raise KeyError(name)

    def around(self, rail: str, start: float, stop: float) -> Trace:
        """The same between two moments, with two readings of a rail before and after, each clear of them."""
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

    def series(self, rail: str) -> list[tuple[float, float, float]]:
        """(time, value, uncertainty) of a rail, where it could be read."""
        return [(one.time, one.values[rail], one.uncertainty) for one in self.samples if rail in one.values]

    def gaps(self, rail: str | None = None, start: float | None = None, stop: float | None = None) -> tuple[Gap, ...]:
        """Where readings are missing, at both ends too.

        Args:
            rail: only where this rail could be read. Default: any.
            start: of the time to look at. Default: that of the trace.
            stop: likewise.
        """
        begin, end = self.start if start is None else start, self.stop if stop is None else stop
        times = [one.time for one in self.samples if rail is None or rail in one.values]
        # What comes before the first and after the last reading is missing too.
        ends = [-float("inf"), *times, float("inf")]
        found = []
        for before, after in pairwise(ends):
            a, b = max(before, begin), min(after, end)
            if after - before > self.longest_step and b > a:
                known = (before > -float("inf")) + (after < float("inf"))
                # The edges of a trace lie up to one interval from a reading.
                if known < 2 and b - a <= self.longest_step:
                    continue
                found.append(Gap(a, b, max(1, round((b - a) / self.source.nominal_interval) - 1)))
        return tuple(found)
