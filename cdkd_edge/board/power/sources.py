"""Which sources of power answer here: by an actual reading, each in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdkd_edge.board.power.protocol import SOURCES, WATTS, SourceInfo
from cdkd_edge.board.power.sampler import COMMAND, START_TIMEOUT, PowerSampler
from cdkd_edge.board.power.trace import Trace
from cdkd_edge.core.errors import PowerError, UsageError


@dataclass(frozen=True)
class SourceReport:
    """A source, and what it showed or why it shows nothing."""

    name: str
    info: SourceInfo | None
    """None if it cannot be used."""
    watts: dict[str, float]
    """Mean per rail over the time it was watched."""
    rate: float | None
    """Readings per second that were reached."""
    problems: tuple[str, ...] = ()
    reason: str = ""
    """Why it cannot be used."""
    hint: str | None = None


def find_source(
    forced: str | None = None,
    interval: float = 0.1,
    *,
    timeout: float = START_TIMEOUT,
    sys_root: Path = Path("/sys"),
    command: tuple[str, ...] = COMMAND,
) -> PowerSampler:
    """A sampler that is running, on the first source that answers.

    Args:
        forced: only this one of ``SOURCES``.
        interval: seconds between samples.
        timeout: seconds for each source to answer.
        sys_root: where ``/sys`` is.
        command: the sampling process, for tests.

    Raises:
        PowerError: none answers, with the reason of each.
        UsageError: there is no source of that name.
    """
    reasons, hint = [], None
    for name in _names(forced):
        sampler = PowerSampler(name, interval, sys_root=sys_root, command=command)
        try:
            sampler.start(timeout)
            return sampler
        except PowerError as error:
            reasons.append(error.message)
            hint = error.hint if forced else hint
    raise PowerError("; ".join(reasons), hint=hint or (None if forced else "cdkd-edge power says what would help"))


def list_sources(
    only: str | None = None,
    seconds: float = 1.0,
    interval: float = 0.1,
    *,
    timeout: float = START_TIMEOUT,
    sys_root: Path = Path("/sys"),
    command: tuple[str, ...] = COMMAND,
) -> tuple[SourceReport, ...]:
    """Try every source at the same time and watch those that answer.

    Args:
        only: this one alone.
        seconds: how long to watch.
        interval: seconds between samples to ask for.
        timeout: seconds for sources to answer.
        sys_root: where ``/sys`` is.
        command: the sampling process, for tests.

    Raises:
        UsageError: there is no source of that name, or a time is not one.
    """
    if not 0 <= seconds < math.inf:
        raise UsageError(f"watching for {seconds:g} s")
    samplers = [PowerSampler(name, interval, sys_root=sys_root, command=command) for name in _names(only)]
    reports: dict[str, SourceReport] = {}
    try:
        deadline = time.monotonic() + timeout
        for sampler in samplers:
            sampler.launch()
        running = []
        for sampler in samplers:
            try:
                sampler.wait_until_started(max(0.0, deadline - time.monotonic()))
                running.append(sampler)
            except PowerError as error:
                reports[sampler.source] = SourceReport(
                    sampler.source, None, {}, None, reason=error.message, hint=error.hint
                )
        time.sleep(seconds if running else 0)
        for sampler in running:
            trace = sampler.trace()
            # At an interval that another client has set, there may be too few readings yet.
            while len(trace.samples) < 2 and time.monotonic() - trace.start < 3 * trace.source.nominal_interval:
                time.sleep(0.05)
                trace = sampler.trace()
            reports[sampler.source] = SourceReport(
                sampler.source, sampler.info, mean_watts(trace), trace.rate, sampler.health()
            )
    finally:
        for sampler in samplers:
            sampler.stop()
    return tuple(reports[sampler.source] for sampler in samplers)


def mean_watts(trace: Trace) -> dict[str, float]:
    """Per rail, over the whole trace; a rail with too few readings is absent."""
    means = {}
    for rail in trace.source.rails:
        series = trace.series(rail)
        if trace.source.quantity == WATTS:
            if series:
                means[rail] = sum(value for _, value, _ in series) / len(series)
        elif len(series) > 1 and series[-1][1] >= series[0][1]:
            means[rail] = (series[-1][1] - series[0][1]) / (series[-1][0] - series[0][0])
    return means


def _names(only: str | None) -> Sequence[str]:
    if only is None:
        return SOURCES
    if only not in SOURCES:
        raise UsageError(f"there is no source of power named {only}", hint=f"one of {', '.join(SOURCES)}")
    return (only,)
