"""From what happened to figures: speed, latency, watts and joules of every repeat, and over all of them."""

from __future__ import annotations

from cdkd_edge.bench.course import Course
from cdkd_edge.bench.record import (
    IDLE,
    LOAD,
    WARM_UP,
    Figures,
    PowerFigures,
    Protocol,
    RailFigures,
    RailRepeat,
    RejectedRepeat,
    Repeat,
    Span,
)
from cdkd_edge.bench.statistics import figure_of, latency_of, variance_hidden_by_sharing
from cdkd_edge.board.power.energy import RailEnergy, bound_holds, rail_energy
from cdkd_edge.board.power.trace import Trace

LEAST_READINGS = 2
"""In a phase, for it to have a figure."""


class NoFigureError(Exception):
    """Power was sampled, and a phase has no figure: why."""


def repeats_of(course: Course, protocol: Protocol, batch: int, trace: Trace | None) -> tuple[Repeat, ...]:
    """Every repeat that was run to its end.

    Args:
        course: what happened.
        protocol: how many repeats there were to be.
        batch: tiles per run of the engine.
        trace: of power; None: without.

    Raises:
        NoFigureError: a rail cannot be given a figure in some phase.
    """
    found = []
    for repeat in range(protocol.repeats):
        try:
            load, warm_up = course.span(LOAD, repeat), course.span(WARM_UP, repeat)
            idles = (course.span(IDLE, repeat), course.span(IDLE, repeat + 1)) if trace else None
        except KeyError:  # broken off before
            break
        latencies = [one.latency for one in course.batches if one.phase == LOAD and one.repeat == repeat]
        tiles = len(latencies) * batch
        rails = None
        if trace is not None and idles is not None:
            rails = {rail: _rail(trace, rail, course.origin, *idles, load) for rail in trace.source.rails}
        found.append(
            Repeat(
                steady=course.steady[repeat],
                warm_up_seconds=warm_up.seconds,
                tiles=tiles,
                seconds=load.seconds,
                tiles_per_second=tiles / load.seconds,
                latency_ms=latency_of(latencies),
                rails=rails,
            )
        )
    return tuple(found)


def rejected(repeat: Repeat) -> RejectedRepeat:
    """A repeat without what could be quoted of it."""
    covered = None if repeat.rails is None else {name: rail.covered for name, rail in repeat.rails.items()}
    return RejectedRepeat(repeat.steady, repeat.warm_up_seconds, repeat.tiles, repeat.seconds, covered)


def _rail(trace: Trace, rail: str, origin: float, before: Span, after: Span, load: Span) -> RailRepeat:
    first, last, loaded = (_energy(trace, rail, origin, span) for span in (before, after, load))
    return RailRepeat(
        idle_watts=(first.watts + last.watts) / 2,
        idle_before_watts=first.watts,
        idle_after_watts=last.watts,
        load_watts=loaded.watts,
        load_joules=loaded.joules,
        covered=min(energy.coverage for energy in (first, last, loaded)),
        bound_joules=loaded.bound,
    )


def _energy(trace: Trace, rail: str, origin: float, span: Span) -> RailEnergy:
    energy = rail_energy(trace, rail, origin + span.start, origin + span.stop)
    if energy is None or energy.readings < LEAST_READINGS:
        count = energy.readings if energy else 0
        raise NoFigureError(f"{count} readings of {rail} in {span.seconds:.1f} s of {span.name}")
    return energy


def figures_of(
    repeats: tuple[Repeat, ...], course: Course, tile: int, trace: Trace | None, power_reason: str
) -> Figures:
    """Over all repeats, of which there must be one at least.

    Args:
        repeats: as :func:`repeats_of` gives them.
        course: what happened.
        tile: its side, px.
        trace: of power.
        power_reason: why there is no power figure; empty where there is one.
    """
    megapixels = tile * tile / 1e6
    rates = [repeat.tiles_per_second for repeat in repeats]
    loads = [one.latency for one in course.batches if one.phase == LOAD and one.repeat < len(repeats)]
    return Figures(
        tiles_per_second=figure_of(rates),
        megapixels_per_second=figure_of([rate * megapixels for rate in rates]),
        latency_ms=latency_of(loads),
        power=None if trace is None or power_reason else _power(repeats, course, megapixels, trace),
        power_reason=power_reason,
    )


def _power(repeats: tuple[Repeat, ...], course: Course, megapixels: float, trace: Trace) -> PowerFigures:
    rails = {}
    for rail in trace.source.rails:
        of_rail = [(repeat.tiles_per_second, repeat.rails[rail]) for repeat in repeats if repeat.rails]
        # Time that is not covered took what the rest took; a run with much of it is invalid.
        gross = [one.load_watts / rate for rate, one in of_rail]
        net = [(one.load_watts - one.idle_watts) / rate for rate, one in of_rail]
        # Two loads in a row share the idle phase between them.
        hidden = variance_hidden_by_sharing(
            [one.idle_before_watts for _, one in of_rail[:1]] + [one.idle_after_watts for _, one in of_rail]
        )
        per_tile = hidden * (sum(1 / rate for rate, _ in of_rail) / len(of_rail)) ** 2
        rails[rail] = RailFigures(
            idle_watts=figure_of([one.idle_watts for _, one in of_rail], hidden),
            load_watts=figure_of([one.load_watts for _, one in of_rail]),
            net_watts=figure_of([one.load_watts - one.idle_watts for _, one in of_rail], hidden),
            gross_joules_per_tile=figure_of(gross),
            net_joules_per_tile=figure_of(net, per_tile),
            gross_joules_per_megapixel=figure_of([joules / megapixels for joules in gross]),
            net_joules_per_megapixel=figure_of([joules / megapixels for joules in net], per_tile / megapixels**2),
        )
    origin = course.origin
    gaps = trace.gaps(
        start=origin + min(span.start for span in course.spans), stop=origin + max(span.stop for span in course.spans)
    )
    source = trace.source
    return PowerFigures(
        source=source.name,
        scope=source.scope,
        covers=source.covers,
        total=source.total,
        rails=rails,
        readings_per_second=trace.rate or 0.0,
        late=trace.late,
        gaps=len(gaps),
        gap_seconds=sum(gap.seconds for gap in gaps),
        problems=tuple(problem.message for problem in trace.problems),
        bound_holds=bound_holds(source),
    )
