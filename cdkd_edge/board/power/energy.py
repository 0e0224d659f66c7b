"""Watts over time to joules, with what is not known.

Between two readings power is taken to change linearly (trapezoid rule over the actual moments). Windows are phases,
and power jumps where a phase begins or ends: from the edge to the nearest reading inside, that reading stands for
itself, and a line to the reading outside, which belongs to another phase, is not drawn. (Drawn, it puts up to half an
interval of load into idle: 3.8 % too much in 3 s of idling at 5.74 W before a load of 18.95 W, sampled at 10 Hz.) A
reading so close to an edge that it may belong to either side counts for none. Across a gap nothing is taken: its time
is not covered, and joules are those of the covered time. A counter's joules are differences of its readings; at the
edges its step goes on at the pace of the step inside. A gap within a counter loses nothing.

``bound`` says by how much the joules of the covered time may be wrong through sampling, and :func:`bound_holds` for
which loads. Between two readings of watts a load may do anything, so without an assumption there is no bound:

- Watts at regular moments: the sum over steps of 1/2 dt |P2 - P1|. It holds if power between two readings stays between
  them. A load that changes in step with the readings looks constant, and is wrong by any amount.
- Watts at moments drawn at random, one in every step: the sum is a random sample of the load, whatever the load does,
  and its error is known from the scatter of the readings. Three times the root of the sum of 1/2 (dt |P2 - P1|)^2, to
  which one more change as large as the largest is added for what was missed: 99 % confidence. (Neighbours differ at
  least as much as readings within one step would.)
- A counter adds up between its readings by itself: only the steps that the edges cut count, for any load.

At the edges of watts dt |P2 - P1| is added; there and between regular readings u |P2 - P1|, ``u`` being the larger
uncertainty of the two moments. The sensor's own accuracy is in none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from cdkd_edge.board.power.protocol import WATTS, SourceInfo
from cdkd_edge.board.power.trace import Gap, Phase, Trace

Series = list[tuple[float, float, float]]
"""Moment, value, uncertainty."""


@dataclass(frozen=True)
class RailEnergy:
    """Energy of one rail in a window."""

    rail: str
    joules: float
    """Of the covered time."""
    seconds: float
    """Of the window."""
    covered: float
    """Seconds of it that lie between readings."""
    bound: float
    """Joules; see the module, and :func:`bound_holds`."""
    readings: int
    """That lie in the window."""
    gaps: tuple[Gap, ...]

    @property
    def watts(self) -> float:
        """Mean over the covered time."""
        return self.joules / self.covered

    @property
    def coverage(self) -> float:
        """Covered share of the window, 0..1."""
        return self.covered / self.seconds


@dataclass(frozen=True)
class LoadEnergy:
    """A rail under load, against idle."""

    rail: str
    idle: RailEnergy
    load: RailEnergy

    @property
    def net_watts(self) -> float:
        """Load without idle."""
        return self.load.watts - self.idle.watts

    @property
    def gross_joules(self) -> float:
        """Of the load's covered time."""
        return self.load.joules

    @property
    def net_joules(self) -> float:
        """Of the load's covered time, without what idling would have taken in it."""
        return self.load.joules - self.idle.watts * self.load.covered

    @property
    def net_bound(self) -> float:
        """Joules by which ``net_joules`` may be wrong, as ``bound``."""
        return self.load.bound + self.idle.bound / self.idle.covered * self.load.covered


def rail_energy(trace: Trace, rail: str, start: float, stop: float) -> RailEnergy | None:
    """Energy of a rail between two moments; None where no time between them is covered.

    Args:
        trace: what was sampled, best from before ``start`` to after ``stop``.
        rail: its name.
        start: s on CLOCK_MONOTONIC.
        stop: likewise, later.

    Raises:
        ValueError: the window is empty.
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
        longest, random = trace.longest_step, trace.source.random_moments
        joules, covered, bound = _of_watts(clear, start, stop, longest, random)
    else:
        joules, covered, bound = _of_counter(clear, start, stop)
    if covered <= 0:
        return None
    readings = sum(start <= time <= stop for time, _, _ in series)
    return RailEnergy(rail, joules, stop - start, covered, bound, readings, trace.gaps(rail, start, stop))


def bound_holds(source: SourceInfo) -> str:
    """For which loads the bound on joules of a source holds, as a sentence."""
    if source.quantity != WATTS:
        return "for any load: the counter adds up between readings by itself"
    if source.random_moments:
        return (
            "with 99 % confidence for any load: every reading is taken at a random moment (peaks that last for less "
            "than three readings in all can be missed)"
        )
    return (
        "only if power between two readings stays between them: a load that changes in step with the readings, or up "
        "and down between two of them, can be off by more"
    )


def _of_watts(series: Series, start: float, stop: float, longest: float, random: bool) -> tuple[float, float, float]:
    """Joules, covered seconds, bound."""
    joules = covered = bound = 0.0
    scatter = largest = 0.0  # J^2
    for (t1, p1, u1), (t2, p2, u2) in pairwise(series):
        begin, end, step = max(t1, start), min(t2, stop), t2 - t1
        if end <= begin or not 0 < step <= longest:
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
        if not inside or not random:
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


def load_energy(trace: Trace, rail: str, idle: Phase, load: Phase) -> LoadEnergy | None:
    """A rail in two phases; None where one of them is not covered at all."""
    of_idle = rail_energy(trace, rail, idle.start, idle.stop)
    of_load = rail_energy(trace, rail, load.start, load.stop)
    if of_idle is None or of_load is None:
        return None
    return LoadEnergy(rail, of_idle, of_load)
