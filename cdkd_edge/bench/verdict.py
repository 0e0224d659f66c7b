"""Whether a run's figures may be quoted."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import median

from cdkd_edge.bench.course import Course
from cdkd_edge.bench.record import INVALID, LOAD, NOT_STEADY, VALID, Protocol, Repeat, Verdict
from cdkd_edge.board.power.protocol import CPU_PACKAGE, GPU_BOARD, SourceInfo
from cdkd_edge.board.power.trace import Trace
from cdkd_edge.board.throttling import ConditionFinding
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.runtimes import runtime_of

LEAST_COVERAGE = 0.98
"""Share of a phase that must lie between readings."""
IDLE_DIFFERENCE = 0.1
"""Difference of the idle phases before and after a load, as a share of their mean, above which a reader is warned."""
MLPERF_POWER_SECONDS = 60.0
"""Of load, that MLPerf Power asks for at least."""
PARTS, BATCHES_IN_PART = 5, 2
"""Into which a load is cut, and batches that each has at least; a load of fewer has fewer parts."""
DRIFT_SEEN, DRIFT_DISTURBS = 0.05, 0.1
"""Difference of the parts' speeds, as a share of the load's, above which a reader is warned; above which the load was
not steady."""
STALL_SECONDS, STALL_FACTOR = 1.0, 10.0
"""From one batch to the next, and times the median of the load, above both of which the run stood still: a process that
was suspended, a machine that swapped. If that is more of a load than may lie between readings, the run is invalid."""
LEAST_WATTS = -0.1
"""That a rail may read in the mean: sensors have an offset."""
LEAST_RISE, NO_RISE = 0.01, 1e-6
"""From idle to load, as a share of idle, that a run needs to be valid: the reading of a sensor that is stuck, or of a
rail that feeds something else, may seem to rise a little, by rounding or by noise. Up to the second it is no rise."""
LATE_SHARE = 0.05
"""Of readings that come late, above which a reader is warned."""


def judge(
    course: Course,
    protocol: Protocol,
    repeats: tuple[Repeat, ...],
    engine: EngineManifest,
    trace: Trace | None,
    power_reason: str,
    conditions: Iterable[ConditionFinding],
    *,
    power_wanted: bool,
) -> Verdict:
    """Judge a run.

    Args:
        course: what happened.
        protocol: what was to happen.
        repeats: of the course, as far as it went.
        engine: what was measured.
        trace: of power; None: without.
        power_reason: why there is no power figure although there was a source; empty if there is one.
        conditions: what the board's monitor found during the loads.
        power_wanted: whether power was asked for.
    """
    findings = tuple(conditions)
    reasons = [finding.message for finding in findings if finding.invalidates]
    warnings = [finding.message for finding in findings if not finding.invalidates]
    if course.broken_off:
        reasons.append(course.broken_off)
    if trace is not None:
        reasons += _power_reasons(repeats, engine, trace, power_reason, course)
        warnings += _power_warnings(repeats, trace)
    elif power_wanted:
        warnings.append(f"power was asked for and not measured: {power_reason}")
    stood_still, paused = _stalls(course)
    reasons += stood_still
    warnings += paused
    drifts, drifted = _drifts(course)
    warnings += drifted
    disturbed = [finding.message for finding in findings if finding.disturbs and runtime_of(engine).on_cpu]
    loads = [span.seconds for span in course.spans if span.name == LOAD]
    if power_wanted and loads and min(loads) < MLPERF_POWER_SECONDS:
        warnings.append(f"load of {min(loads):.0f} s; MLPerf Power asks for {MLPERF_POWER_SECONDS:.0f} s")
    if reasons:
        return Verdict(INVALID, tuple(dict.fromkeys(reasons)), (*warnings, *drifts))
    restless = [str(number + 1) for number, repeat in enumerate(repeats) if not repeat.steady]
    if restless:
        which = "" if protocol.repeats == 1 else f" of repeat {', '.join(restless)}"
        drifts.insert(0, f"the warm-up{which} did not become steady within {protocol.warm_up_cap_seconds:g} s")
    if drifts or disturbed:
        others = [warning for warning in warnings if warning not in disturbed]
        return Verdict(NOT_STEADY, (*drifts, *disturbed), tuple(others))
    return Verdict(VALID, (), tuple(warnings))


def _stalls(course: Course) -> tuple[list[str], list[str]]:
    """Loads in which nothing went on for a while: reasons, and warnings."""
    reasons: list[str] = []
    warnings: list[str] = []
    for span in course.spans:
        starts = [one.start for one in course.batches if (one.phase, one.repeat) == (span.name, span.repeat)]
        if span.name != LOAD or not starts:
            continue
        steps = [b - a for a, b in pairwise([*starts, span.stop])]
        usual = median(steps)
        lost = sum(step - usual for step in steps if step > max(STALL_SECONDS, STALL_FACTOR * usual))
        if lost:
            text = f"load {span.repeat + 1}: the run stood still for {lost:.1f} s of {span.seconds:.1f} s"
            (reasons if lost > (1 - LEAST_COVERAGE) * span.seconds else warnings).append(text)
    return reasons, warnings


def _drifts(course: Course) -> tuple[list[str], list[str]]:
    """Loads that were not as steady as the warm-up before them promised: why they were not, and warnings."""
    reasons: list[str] = []
    warnings: list[str] = []
    for span in course.spans:
        starts = [one.start for one in course.batches if (one.phase, one.repeat) == (span.name, span.repeat)]
        parts = min(PARTS, len(starts) // BATCHES_IN_PART)
        if span.name != LOAD or not starts:
            continue
        if parts < 2:
            count = f"{len(starts)} batch is" if len(starts) == 1 else f"{len(starts)} batches are"
            reasons.append(f"load {span.repeat + 1}: {count} too few to see whether the speed held")
            continue
        edges = [len(starts) * part // parts for part in range(parts + 1)]
        moments = [*starts, span.stop]
        speeds = [(b - a) / (moments[b] - moments[a]) for a, b in pairwise(edges)]
        change = (max(speeds) - min(speeds)) * span.seconds / len(starts)
        # No speeds: the run may be invalid, and then it has none.
        text = f"load {span.repeat + 1}: between its {parts} parts the speed changed by {change:.0%} of its mean"
        if change > DRIFT_SEEN:
            (reasons if change > DRIFT_DISTURBS else warnings).append(text)
    return reasons, warnings


def _power_reasons(
    repeats: tuple[Repeat, ...], engine: EngineManifest, trace: Trace, power_reason: str, course: Course
) -> list[str]:
    source, reasons = trace.source, []
    if (wrong := _wrong_source(source, engine)) is not None:
        reasons.append(wrong)
    ended = [problem.message for problem in trace.problems if problem.kind in ("lost", "died")]
    if ended and not course.broken_off:
        reasons.append(f"{source.name} stopped answering: {ended[0]}")
    if power_reason:
        reasons.append(power_reason)
    for repeat in repeats:
        for rail, one in (repeat.rails or {}).items():
            if one.covered < LEAST_COVERAGE:
                why = "".join(f"; {problem.message}" for problem in trace.problems)
                reasons.append(
                    f"{source.name}: readings of {rail} are missing in {1 - one.covered:.0%} of a phase{why}"
                )
            least = min(one.idle_before_watts, one.idle_after_watts, one.load_watts)
            if least < LEAST_WATTS:
                reasons.append(f"{source.name}: {rail} reads {least:.2f} W in the mean of a phase: less than nothing")
        reasons += _no_rise(repeat, source)
    return reasons


def _no_rise(repeat: Repeat, source: SourceInfo) -> list[str]:
    """The total rail under load against idle; without one, all rails together."""
    rails = repeat.rails or {}
    watched = [rails[source.total]] if source.total in rails else list(rails.values())
    idle, load = sum(one.idle_watts for one in watched), sum(one.load_watts for one in watched)
    if not watched or load - idle > LEAST_RISE * abs(idle):
        return []
    what = f"{source.total} is" if source.total in rails else f"{source.name}'s rails are together"
    much = "hardly" if load - idle > NO_RISE * abs(idle) else "not"
    return [
        f"{what} {much} higher under load ({load:.2f} W) than idle ({idle:.2f} W): "
        "it does not feed what the engine runs on, or something else was running"
    ]


def _wrong_source(source: SourceInfo, engine: EngineManifest) -> str | None:
    """A source that does not cover what the engine runs on."""
    on_cpu = runtime_of(engine).on_cpu
    if on_cpu and source.scope == GPU_BOARD:
        return f"{source.name} measures the {source.scope}, and this engine runs on the CPU"
    if not on_cpu and source.scope == CPU_PACKAGE:
        return f"{source.name} measures the {source.scope}, and this engine runs on the GPU"
    return None


def _power_warnings(repeats: tuple[Repeat, ...], trace: Trace) -> list[str]:
    warnings = [problem.message for problem in trace.problems if problem.kind not in ("lost", "died")]
    source = trace.source
    if source.total is None:
        warnings.append(f"{source.name} has no rail that contains the others; its rails do not add up to a total")
    if trace.late > LATE_SHARE * len(trace.samples):
        warnings.append(f"{trace.late} of {len(trace.samples)} readings came late")
    for number, repeat in enumerate(repeats, 1):
        one = (repeat.rails or {}).get(source.total or "")
        if one and abs(one.idle_after_watts - one.idle_before_watts) > IDLE_DIFFERENCE * one.idle_watts:
            warnings.append(
                f"repeat {number}: idle is {one.idle_before_watts:.2f} W before and {one.idle_after_watts:.2f} W after "
                "the load; net figures use the mean"
            )
    return warnings
