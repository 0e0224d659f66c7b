"""Watts over time to joules, with what is not known.

Between two readings power is taken to change linearly (trapezoid rule over the actual moments). Across a gap nothing
is taken: its time is not covered, and joules are those of the covered time. A counter's joules are differences of its
readings, exact except at the two edges of a window, where they are shared out by time; a gap within a counter loses
nothing.

``bound`` says by how much the joules of the covered time may be wrong,

    sum over steps of  1/2 dt |P2 - P1|  +  u |P2 - P1|

``u`` being the larger uncertainty of the two moments. It holds if power between two readings stays between them. It
says nothing about changes faster than the sampling, nor about the sensor's own accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from cdkd_edge.power.protocol import WATTS
from cdkd_edge.power.trace import Gap, Phase, Trace


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
    """Joules; see the module."""
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
    counter = trace.source.quantity != WATTS
    series = trace.series(rail)
    joules = covered = bound = 0.0
    for (t1, v1, u1), (t2, v2, u2) in pairwise(series):
        begin, end = max(t1, start), min(t2, stop)
        step = t2 - t1
        if end <= begin or step <= 0:
            continue
        share, uncertainty = (end - begin) / step, max(u1, u2)
        if counter:
            if v2 < v1:  # it began anew: how much is not known
                continue
            joules += (v2 - v1) * share
            if share < 1:
                bound += (v2 - v1) * (max(share, 1 - share) + uncertainty / step)
        elif step > trace.longest_step:
            continue
        else:
            slope = (v2 - v1) / step
            middle = v1 + slope * ((begin + end) / 2 - t1)
            joules += middle * (end - begin)
            bound += abs(v2 - v1) * ((end - begin) / 2 + uncertainty)
        covered += end - begin
    if covered <= 0:
        return None
    readings = sum(start <= time <= stop for time, _, _ in series)
    return RailEnergy(rail, joules, stop - start, covered, bound, readings, trace.gaps(rail, start, stop))


def load_energy(trace: Trace, rail: str, idle: Phase, load: Phase) -> LoadEnergy | None:
    """A rail in two phases; None where one of them is not covered at all."""
    of_idle = rail_energy(trace, rail, idle.start, idle.stop)
    of_load = rail_energy(trace, rail, load.start, load.stop)
    if of_idle is None or of_load is None:
        return None
    return LoadEnergy(rail, of_idle, of_load)
