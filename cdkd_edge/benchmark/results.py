"""The results of a run: speed, latency, watts and joules of its repeats, and the conditions of its loads."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cdkd_edge.benchmark import record
from cdkd_edge.benchmark.phases import Timeline
from cdkd_edge.benchmark.statistics import figure_of, latency_of, variance_hidden_by_sharing
from cdkd_edge.board import throttling
from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.jetson import BoardIdentity
from cdkd_edge.board.power.energy import RailEnergy, Trace, bound_holds, net_bound, rail_energy
from cdkd_edge.board.power.ina3221 import TOTAL

LEAST_READINGS = 2  # readings that a phase needs for a mean of watts


class NoFigureError(Exception):
    """Power was sampled, but a phase has too few readings; the message says which."""


def repeats_of(
    timeline: Timeline, protocol: record.Protocol, batch: int, trace: Trace | None
) -> tuple[record.Repeat, ...]:
    """The results of every repeat that was completed; without power if there is no trace.

    Raises:
        NoFigureError: a rail has too few readings in a phase.
    """
    found = []
    for repeat in range(protocol.repeats):
        try:
            load, warm_up = timeline.phase(record.LOAD, repeat), timeline.phase(record.WARM_UP, repeat)
            idles = [timeline.phase(record.IDLE, number) for number in (repeat, repeat + 1)] if trace else []
        except KeyError:  # the run ended earlier
            break
        latencies = [one.latency for one in timeline.batches_of(load)]
        tiles, speed = len(latencies) * batch, len(latencies) * batch / load.seconds
        rails = None
        if trace:
            rails = {rail: _rail(trace, rail, timeline.origin, (*idles, load)) for rail in trace.source.rails}
        steady, seconds = timeline.steady[repeat], load.seconds
        found.append(record.Repeat(steady, warm_up.seconds, tiles, seconds, speed, latency_of(latencies), rails))
    return tuple(found)


def rejected(repeat: record.Repeat) -> record.RejectedRepeat:
    """A repeat without the figures that could be quoted."""
    covered = None if repeat.rails is None else {name: rail.covered for name, rail in repeat.rails.items()}
    return record.RejectedRepeat(repeat.steady, repeat.warm_up_seconds, repeat.tiles, repeat.seconds, covered)


def _rail(trace: Trace, rail: str, origin: float, phases: Sequence[record.Phase]) -> record.RailRepeat:
    first, last, loaded = (_energy(trace, rail, origin, phase) for phase in phases)  # idle before, idle after, load
    covered, idle = min(one.coverage for one in (first, last, loaded)), (first.watts + last.watts) / 2
    return record.RailRepeat(
        idle_watts=idle, idle_before_watts=first.watts, idle_after_watts=last.watts, load_watts=loaded.watts,
        load_joules=loaded.joules, covered=covered, bound_joules=loaded.bound, offset_joules=loaded.offset,
        net_bound_watts=net_bound(loaded, first, last),
    )  # fmt: skip


def _energy(trace: Trace, rail: str, origin: float, phase: record.Phase) -> RailEnergy:
    energy = rail_energy(trace, rail, origin + phase.start, origin + phase.stop)
    if energy is None or energy.readings < LEAST_READINGS:
        count = energy.readings if energy else 0
        seconds, source = phase.seconds, trace.source.name
        raise NoFigureError(f"{source}: too few readings of {rail}: {count} in {seconds:.1f} s of {phase.name}")
    return energy


def figures_of(
    repeats: tuple[record.Repeat, ...], timeline: Timeline, tile: int, trace: Trace | None, power_reason: str
) -> record.Figures:
    """The figures over all repeats, at least one, with tiles of ``tile`` x ``tile`` px.

    ``power_reason`` says why there is no power figure; it is empty if there is one.
    """
    megapixels = tile * tile / 1e6
    rates = [repeat.tiles_per_second for repeat in repeats]
    loads = [one.latency for one in timeline.batches if one.phase == record.LOAD and one.repeat < len(repeats)]
    return record.Figures(
        tiles_per_second=figure_of(rates),
        megapixels_per_second=figure_of([rate * megapixels for rate in rates]),
        latency_ms=latency_of(loads),
        power=None if trace is None or power_reason else _power(repeats, timeline, megapixels, trace),
        power_reason=power_reason,
    )


def _power(
    repeats: tuple[record.Repeat, ...], timeline: Timeline, megapixels: float, trace: Trace
) -> record.PowerFigures:
    times = [repeat.seconds / repeat.tiles for repeat in repeats]  # of a tile
    rails = {
        rail: _rail_figures([repeat.rails[rail] for repeat in repeats if repeat.rails], times, megapixels)
        for rail in trace.source.rails
    }
    clock = [timeline.clock(phase) for phase in timeline.completed]
    gaps = trace.gaps(start=min(start for start, _ in clock), stop=max(stop for _, stop in clock))
    source = trace.source
    return record.PowerFigures(
        source=source.name, scope=source.scope, covers=source.covers, total=source.total, rails=rails,
        readings_per_second=trace.rate or 0.0, late=trace.late, gaps=len(gaps),
        gap_seconds=sum(gap.seconds for gap in gaps), problems=tuple(problem.message for problem in trace.problems),
        bound_holds=bound_holds(source),
    )  # fmt: skip


def _rail_figures(found: Sequence[record.RailRepeat], times: Sequence[float], megapixels: float) -> record.RailFigures:
    """The figures of a rail, from its repeats and their seconds per tile."""
    net = [one.load_watts - one.idle_watts for one in found]
    # Assumes the same watts where readings are missing; a run with many missing is invalid.
    gross_joules = [one.load_watts * time for one, time in zip(found, times, strict=True)]
    net_joules = [watts * time for watts, time in zip(net, times, strict=True)]
    # Two successive loads share the idle phase between them.
    hidden = variance_hidden_by_sharing([found[0].idle_before_watts, *(one.idle_after_watts for one in found)])
    per_tile = hidden * (sum(times) / len(times)) ** 2
    return record.RailFigures(
        idle_watts=figure_of([one.idle_watts for one in found], hidden),
        load_watts=figure_of([one.load_watts for one in found]),
        net_watts=figure_of(net, hidden),
        gross_joules_per_tile=figure_of(gross_joules),
        net_joules_per_tile=figure_of(net_joules, per_tile),
        gross_joules_per_megapixel=figure_of([joules / megapixels for joules in gross_joules]),
        net_joules_per_megapixel=figure_of([joules / megapixels for joules in net_joules], per_tile / megapixels**2),
    )


def condition_findings(
    timeline: Timeline, readings: Sequence[Conditions], board: BoardIdentity, repeats: Sequence[record.Repeat]
) -> list[throttling.ConditionFinding]:
    """What the monitor found: throttling during loads, other programs, a change of the power mode, and what it could
    not see; and watts that the board is not known to draw."""
    loads = timeline.loads
    found = [finding for load in loads for finding in throttling.judge_conditions(readings, *timeline.clock(load))]
    for phase in timeline.completed:
        # Other programs may also be why a warm-up did not become steady.
        if phase.name == record.LOAD or (phase.name == record.WARM_UP and not timeline.steady[phase.repeat]):
            what = f"{phase.name} {phase.repeat + 1}"
            found += throttling.judge_other_programs(readings, *timeline.clock(phase), what)
    if loads:  # net power compares idle with load, so the mode must not change in between
        start, stop = timeline.clock(timeline.phases[0])[0], timeline.clock(timeline.phases[-1])[1]
        found += throttling.judge_power_mode(readings, start, stop)
    found += throttling.judge_sight(readings, board)
    if module := [rails[TOTAL] for repeat in repeats if TOTAL in (rails := repeat.rails or {})]:
        idle, load = (fmean(getattr(one, name) for one in module) for name in ("idle_watts", "load_watts"))
        found += throttling.judge_watts(board, idle, load)
    return found


def load_conditions(timeline: Timeline, readings: Sequence[Conditions]) -> dict[str, Any]:
    """Clocks, temperatures, fan and throttling over the load phases, without the time between them."""
    loads = [timeline.clock(load) for load in timeline.loads]
    if not loads:
        return {}
    within = [one for one in readings if any(start <= one.time <= stop for start, stop in loads)]
    found = throttling.summarise(within, loads[0][0], loads[-1][1])
    # Counters as the verdict compares them: from the last reading before a load to the first one after it.
    risen = [throttling.summarise(readings, *load)["throttle_events"] for load in loads]
    found["throttle_events"] = {name: sum(one.get(name, 0) for one in risen) for name in sorted(set().union(*risen))}
    shares = [share for load in loads if (share := throttling.others_share(readings, *load)) is not None]
    found["other_programs_percent"] = 100 * max(shares) if shares else None
    return found
