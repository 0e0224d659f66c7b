"""The verdict on a run: whether its figures may be quoted, why not, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from cdkd_edge.benchmark.phases import Timeline
from cdkd_edge.benchmark.record import INVALID, LOAD, NOT_STEADY, VALID, Phase, Protocol, Repeat, Verdict
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.protocol import LEFT_OUT, SourceInfo
from cdkd_edge.board.power.window import LEAST_COVERAGE
from cdkd_edge.board.throttling import ConditionFinding
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.runtimes import runtime_of

IDLE_DIFFERENCE = 0.1  # between the idle phases before and after a load, as a share of their mean, gives a warning
MLPERF_POWER_SECONDS = 60.0  # least load that MLPerf Power requires
PARTS, BATCHES_IN_PART = 5, 2  # of a load, and least batches in each part; a short load has fewer parts
# Difference between the speeds of the parts, as a share of the mean: a warning, and a load that was not steady.
DRIFT_WARNS, DRIFT_DISTURBS = 0.05, 0.1
# A stall (suspended process, swapping) is a step between batches longer than this time and this many times the median.
# The run is invalid if stalls take more of a load than may be without readings.
STALL_SECONDS, STALL_FACTOR = 1.0, 10.0
LEAST_WATTS = -0.1  # lowest mean of a rail that is accepted: sensors have an offset
# Rise from idle to load, as a share of idle. A valid run needs the first: a stuck sensor, or one of a rail that feeds
# something else, can seem to rise a little through noise. Below the second it is called no rise at all.
LEAST_RISE, NO_RISE = 0.01, 1e-6
LATE_SHARE = 0.05  # share of late readings that gives a warning


def judge(
    timeline: Timeline,
    protocol: Protocol,
    repeats: tuple[Repeat, ...],
    engine: EngineManifest,
    trace: Trace | None,
    power_reason: str,
    conditions: Sequence[ConditionFinding],
    *,
    power_wanted: bool,
) -> Verdict:
    """Judge a run, from the repeats that were completed.

    Args:
        power_reason: why there is no power figure although there was a source; empty if there is one.
        conditions: what the board's monitor found during the loads.
        power_wanted: whether power was asked for.
    """
    reasons = [finding.message for finding in conditions if finding.invalidates]
    warnings = [finding.message for finding in conditions if not finding.invalidates]
    if timeline.broken_off:
        reasons.append(timeline.broken_off)
    if trace is not None:
        reasons += _power_reasons(repeats, engine, trace, power_reason, timeline)
        warnings += _power_warnings(repeats, trace)
    elif power_wanted:
        warnings.append(f"power was asked for and not measured: {power_reason}")
    drifts: list[str] = []  # why the run is not steady
    loads = [phase for phase in timeline.completed if phase.name == LOAD]
    for load in loads:
        if starts := [one.start for one in timeline.batches_of(load)]:
            _find_stall(load, starts, reasons, warnings)
            _find_drift(load, starts, drifts, warnings)
    disturbed = [finding.message for finding in conditions if finding.disturbs and runtime_of(engine).on_cpu]
    shortest = min((load.seconds for load in loads), default=MLPERF_POWER_SECONDS)
    if power_wanted and shortest < MLPERF_POWER_SECONDS:
        warnings.append(f"the load lasted {shortest:.0f} s; MLPerf Power requires {MLPERF_POWER_SECONDS:.0f} s")
    if reasons:
        return Verdict(INVALID, tuple(dict.fromkeys(reasons)), (*warnings, *drifts))
    restless = [str(number) for number, repeat in enumerate(repeats, 1) if not repeat.steady]
    if restless:
        which = "" if protocol.repeats == 1 else f" of repeat {', '.join(restless)}"
        drifts.insert(0, f"the warm-up{which} was not steady after {protocol.warm_up_cap_seconds:g} s")
    if drifts or disturbed:
        others = [warning for warning in warnings if warning not in disturbed]
        return Verdict(NOT_STEADY, (*drifts, *disturbed), tuple(others))
    return Verdict(VALID, (), tuple(warnings))


def _find_stall(load: Phase, starts: list[float], reasons: list[str], warnings: list[str]) -> None:
    """Add a reason or a warning if no batch of the load ended for a while."""
    steps = [b - a for a, b in pairwise([*starts, load.stop])]
    usual = median(steps)
    lost = sum(step - usual for step in steps if step > max(STALL_SECONDS, STALL_FACTOR * usual))
    if lost:
        text = f"load {load.repeat + 1}: no batch ended for {lost:.1f} s of {load.seconds:.1f} s"
        (reasons if lost > (1 - LEAST_COVERAGE) * load.seconds else warnings).append(text)


def _find_drift(load: Phase, starts: list[float], reasons: list[str], warnings: list[str]) -> None:
    """Add a reason or a warning if the speed changed during the load."""
    count = len(starts)
    parts = min(PARTS, count // BATCHES_IN_PART)
    if parts < 2:
        batches = "1 batch is" if count == 1 else f"{count} batches are"
        reasons.append(f"load {load.repeat + 1}: {batches} too few to tell whether the speed was steady")
        return
    edges = [count * part // parts for part in range(parts + 1)]
    moments = [*starts, load.stop]
    speeds = [(b - a) / (moments[b] - moments[a]) for a, b in pairwise(edges)]
    change = (max(speeds) - min(speeds)) * load.seconds / count
    if change > DRIFT_WARNS:  # the text gives no speeds: an invalid run must not show any
        text = f"load {load.repeat + 1}: the speed changed by {change:.0%} of its mean between {parts} parts"
        (reasons if change > DRIFT_DISTURBS else warnings).append(text)


def _power_reasons(
    repeats: tuple[Repeat, ...], engine: EngineManifest, trace: Trace, power_reason: str, timeline: Timeline
) -> list[str]:
    source, reasons = trace.source, []
    processor = "CPU" if runtime_of(engine).on_cpu else "GPU"
    if LEFT_OUT.get(source.scope) == processor:
        reasons.append(f"{source.name} measures the {source.scope}, but this engine runs on the {processor}")
    ended = [problem.message for problem in trace.problems if problem.kind in ("lost", "died")]
    if ended and not timeline.broken_off:
        reasons.append(f"{source.name} stopped answering: {ended[0]}")
    if power_reason:
        reasons.append(power_reason)
    for repeat in repeats:
        for rail, one in (repeat.rails or {}).items():
            if one.covered < LEAST_COVERAGE:
                why = "".join(f"; {problem.message}" for problem in trace.problems)
                share = f"{1 - one.covered:.0%}"
                reasons.append(f"{source.name}: readings of {rail} are missing for {share} of a phase{why}")
            least = min(one.idle_before_watts, one.idle_after_watts, one.load_watts)
            if least < LEAST_WATTS:
                reasons.append(f"{source.name}: the mean of {rail} over a phase is negative: {least:.2f} W")
        reasons += _no_rise(repeat, source)
    return reasons


def _no_rise(repeat: Repeat, source: SourceInfo) -> list[str]:
    """Compare load with idle: on the total rail, or on the sum of all rails if there is no total."""
    rails = repeat.rails or {}
    watched = [rails[source.total]] if source.total in rails else list(rails.values())
    idle, load = sum(one.idle_watts for one in watched), sum(one.load_watts for one in watched)
    if not watched or load - idle > LEAST_RISE * abs(idle):
        return []
    what = f"{source.total} is" if source.total in rails else f"the sum of {source.name}'s rails is"
    much = "hardly" if load - idle > NO_RISE * abs(idle) else "not"
    return [
        f"{what} {much} higher under load ({load:.2f} W) than idle ({idle:.2f} W): "
        "it does not supply what the engine runs on, or something else was running"
    ]


def _power_warnings(repeats: tuple[Repeat, ...], trace: Trace) -> list[str]:
    warnings = [problem.message for problem in trace.problems if problem.kind not in ("lost", "died")]
    source = trace.source
    if source.total is None:
        warnings.append(f"{source.name} has no total rail, and its rails do not add up to one")
    if (late := trace.late) > LATE_SHARE * (count := len(trace.readings)):
        warnings.append(f"{late} of {count} power readings were late")
    for number, repeat in enumerate(repeats, 1):
        one = (repeat.rails or {}).get(source.total or "")
        if one and abs(one.idle_after_watts - one.idle_before_watts) > IDLE_DIFFERENCE * one.idle_watts:
            warnings.append(
                f"repeat {number}: idle power is {one.idle_before_watts:.2f} W before and {one.idle_after_watts:.2f} W "
                "after the load; net figures use the mean of both"
            )
    return warnings
