"""The results of a run: speed, latency, watts and joules of its repeats, and the conditions of its loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdkd_edge.benchmark.phases import Timeline
from cdkd_edge.benchmark.record import (
    IDLE,
    LOAD,
    WARM_UP,
    Figures,
    Phase,
    PowerFigures,
    Protocol,
    RailFigures,
    RailRepeat,
    RejectedRepeat,
    Repeat,
)
from cdkd_edge.benchmark.statistics import figure_of, latency_of, variance_hidden_by_sharing
from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.power.energy import RailEnergy, Trace, bound_holds, rail_energy
from cdkd_edge.board.throttling import (
    ConditionFinding,
    judge_conditions,
    judge_other_programs,
    judge_power_mode,
    others_share,
    summarise,
)

LEAST_READINGS = 2  # readings that a phase needs for a mean of watts


class NoFigureError(Exception):
    """Power was sampled, but a phase has too few readings; the message says which."""


def repeats_of(timeline: Timeline, protocol: Protocol, batch: int, trace: Trace | None) -> tuple[Repeat, ...]:
    """The results of every repeat that was completed.

    Args:
        timeline: what happened.
        protocol: of the run.
        batch: tiles per batch.
        trace: power readings; None: without power.

    Raises:
        NoFigureError: a rail has too few readings in a phase.
    """
    found = []
    for repeat in range(protocol.repeats):
        try:
            load, warm_up = timeline.phase(LOAD, repeat), timeline.phase(WARM_UP, repeat)
            idles = (timeline.phase(IDLE, repeat), timeline.phase(IDLE, repeat + 1)) if trace else None
        except KeyError:  # the run ended earlier
            break
        latencies = [one.latency for one in timeline.batches_of(load)]
        tiles = len(latencies) * batch
        rails = None
        if trace is not None and idles is not None:
            rails = {rail: _rail(trace, rail, timeline.origin, *idles, load) for rail in trace.source.rails}
        found.append(
            Repeat(
                steady=timeline.steady[repeat],
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
    """A repeat without the figures that could be quoted."""
    covered = None if repeat.rails is None else {name: rail.covered for name, rail in repeat.rails.items()}
    return RejectedRepeat(repeat.steady, repeat.warm_up_seconds, repeat.tiles, repeat.seconds, covered)


def _rail(trace: Trace, rail: str, origin: float, before: Phase, after: Phase, load: Phase) -> RailRepeat:
    first, last, loaded = (_energy(trace, rail, origin, phase) for phase in (before, after, load))
    return RailRepeat(
        idle_watts=(first.watts + last.watts) / 2,
        idle_before_watts=first.watts,
        idle_after_watts=last.watts,
        load_watts=loaded.watts,
        load_joules=loaded.joules,
        covered=min(energy.coverage for energy in (first, last, loaded)),
        bound_joules=loaded.bound,
    )


def _energy(trace: Trace, rail: str, origin: float, phase: Phase) -> RailEnergy:
    energy = rail_energy(trace, rail, origin + phase.start, origin + phase.stop)
    if energy is None or energy.readings < LEAST_READINGS:
        count = energy.readings if energy else 0
        raise NoFigureError(f"too few readings of {rail}: {count} in {phase.seconds:.1f} s of {phase.name}")
    return energy


def figures_of(
    repeats: tuple[Repeat, ...], timeline: Timeline, tile: int, trace: Trace | None, power_reason: str
) -> Figures:
    """The figures over all repeats.

    Args:
        repeats: from :func:`repeats_of`, at least one.
        timeline: what happened.
        tile: side of a tile, px.
        trace: power readings; None: without power.
        power_reason: why there is no power figure; empty if there is one.
    """
    megapixels = tile * tile / 1e6
    rates = [repeat.tiles_per_second for repeat in repeats]
    loads = [one.latency for one in timeline.batches if one.phase == LOAD and one.repeat < len(repeats)]
    return Figures(
        tiles_per_second=figure_of(rates),
        megapixels_per_second=figure_of([rate * megapixels for rate in rates]),
        latency_ms=latency_of(loads),
        power=None if trace is None or power_reason else _power(repeats, timeline, megapixels, trace),
        power_reason=power_reason,
    )


def _power(repeats: tuple[Repeat, ...], timeline: Timeline, megapixels: float, trace: Trace) -> PowerFigures:
    rails = {}
    for rail in trace.source.rails:
        of_rail = [(repeat.tiles_per_second, repeat.rails[rail]) for repeat in repeats if repeat.rails]
        # Assumes the same watts where readings are missing; a run with many missing is invalid.
        gross = [one.load_watts / rate for rate, one in of_rail]
        net = [(one.load_watts - one.idle_watts) / rate for rate, one in of_rail]
        # Two successive loads share the idle phase between them.
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
    origin = timeline.origin
    gaps = trace.gaps(
        start=origin + min(phase.start for phase in timeline.completed),
        stop=origin + max(phase.stop for phase in timeline.completed),
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


def condition_findings(timeline: Timeline, readings: Sequence[Conditions]) -> list[ConditionFinding]:
    """What the monitor found: throttling during loads, other programs, and a change of the power mode."""
    loads = timeline.loads
    found = [finding for load in loads for finding in judge_conditions(readings, *timeline.clock(load))]
    for phase in timeline.completed:
        # Other programs may also be why a warm-up did not become steady.
        if phase.name == LOAD or (phase.name == WARM_UP and not timeline.steady[phase.repeat]):
            found += judge_other_programs(readings, *timeline.clock(phase), f"{phase.name} {phase.repeat + 1}")
    if loads:  # net power compares idle with load, so the mode must not change in between
        first, last = timeline.phases[0], timeline.phases[-1]
        found += judge_power_mode(readings, timeline.clock(first)[0], timeline.clock(last)[1])
    return found


def load_conditions(timeline: Timeline, readings: Sequence[Conditions]) -> dict[str, Any]:
    """Clocks, temperatures, fan and throttling over the load phases, without the time between them."""
    loads = [timeline.clock(load) for load in timeline.loads]
    if not loads:
        return {}
    within = [one for one in readings if any(start <= one.time <= stop for start, stop in loads)]
    found = summarise(within, loads[0][0], loads[-1][1])
    # Counters as the verdict compares them: from the last reading before a load to the first one after it.
    risen = [summarise(readings, *load)["throttle_events"] for load in loads]
    found["throttle_events"] = {name: sum(one.get(name, 0) for one in risen) for name in sorted(set().union(*risen))}
    shares = [share for load in loads if (share := others_share(readings, *load)) is not None]
    found["other_programs_percent"] = 100 * max(shares) if shares else None
    return found
