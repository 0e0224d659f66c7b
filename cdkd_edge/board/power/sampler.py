"""Sampling power in a process of its own: start it, watch it, take the trace; and which sources answer here."""

from __future__ import annotations

import itertools
import math
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cdkd_edge.board.power.energy import Problem, Trace
from cdkd_edge.board.power.protocol import WATTS, Sample, SourceInfo
from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.core.errors import PowerError, UsageError
from cdkd_edge.core.process import end_children, events, last_words, module_command, start_child, tail_of

COMMAND = module_command("cdkd_edge.board.power.sampler_child")
START_TIMEOUT = 15.0  # seconds in which a source must give a first reading; a stalled jtop service never does
STOP_TIMEOUT = 2.0  # seconds in which the process may end by itself; a stopped (SIGSTOP) one does not


class PowerSampler:
    """Samples of one source, on the clock of ``time.monotonic`` and ``time.perf_counter``.

    Sampling lasts until :meth:`stop`; samples that have arrived stay valid whatever happens to the process.
    """

    def __init__(
        self, source: str, interval: float = 0.1, *, sys_root: Path = Path("/sys"), command: tuple[str, ...] = COMMAND
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            source: a key of :data:`cdkd_edge.board.power.sources.SOURCES`.
            interval: seconds between samples; positive, else :class:`UsageError`.
            sys_root: where ``/sys`` is, for sources that read files.
            command: the sampling process.
        """
        if not 0 < interval < math.inf:
            raise UsageError(f"--interval must be a positive number of seconds, not {interval:g}")
        self.source = source
        self.info: SourceInfo | None = None  # the source, once started
        self._command = (*command, "--source", source, "--interval", str(interval), "--sys", str(sys_root))
        self._samples: list[Sample] = []
        self._problems: list[Problem] = []
        self._refusal: dict[str, Any] = {}
        self._answered = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._errors: IO[bytes] | None = None
        self._stopping = False
        self._began = self._ended = 0.0
        self._last_arrival = 0.0

    def __enter__(self) -> PowerSampler:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = START_TIMEOUT) -> SourceInfo:
        """Start sampling and wait for a first reading; errors as from :meth:`wait_until_started`."""
        self.launch()
        return self.wait_until_started(timeout)

    def launch(self) -> None:
        """Start the process and do not wait for it."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has died
        self._process = start_child(self._command, self._errors)
        self._listener = threading.Thread(target=self._listen, name="power", daemon=True)
        self._listener.start()

    def wait_until_started(self, timeout: float = START_TIMEOUT) -> SourceInfo:
        """Wait for the first reading of a launched process.

        Raises:
            PowerError: the source cannot be used, or did not answer in time; the process is ended.
        """
        try:
            answered = self._answered.wait(timeout)
        except BaseException:
            self.stop()
            raise
        if self.info is not None:
            return self.info
        refusal, crashed = self._refusal, self._process is not None and self._process.poll() is not None
        self.stop(patience=0)
        if refusal:
            raise PowerError(str(refusal.get("reason")), hint=refusal.get("hint"))
        if answered or crashed:
            raise PowerError(f"{self.source}: the sampling process died ({self._last_words()})")
        known = SOURCES.get(self.source)
        raise PowerError(f"{self.source}: no answer within {timeout:g} s", hint=known.if_silent if known else None)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples so far."""
        return tuple(self._samples)

    def health(self) -> tuple[str, ...]:
        """Faults so far, one sentence each."""
        troubles = [problem.message for problem in self._problems]
        if self.info and not self._stopping and (silence := self.silence()) > self.info.longest_step:
            troubles.append(f"no sample for {silence:.1f} s")
        return tuple(troubles)

    def lost(self) -> str:
        """Why there will be no more samples; empty while there may be."""
        return next((problem.message for problem in self._problems if problem.kind in ("lost", "died")), "")

    def silence(self, rail: str | None = None) -> float:
        """Seconds since the latest sample, or the latest one of a rail."""
        if rail is not None:
            taken = (sample.time for sample in reversed(self._samples) if rail in sample.values)
            return time.monotonic() - next(taken, self._began)
        return time.monotonic() - max(self._last_arrival, self._began)

    def watts(self) -> dict[str, float]:
        """Watts per rail as they were read last; of a counter, between the last two samples."""
        if self.info is None or not self._samples:
            return {}
        last, before = self._samples[-1], self._samples[-2:][0]
        if self.info.quantity == WATTS:
            earliest = last.time - self.info.longest_step  # what is older is gone
            recent = itertools.takewhile(lambda one: one.time >= earliest, reversed(self._samples))
            latest: dict[str, float] = {}
            for sample in recent:
                latest = sample.values | latest
                if len(latest) == len(self.info.rails):
                    break
            return latest
        steps = {rail: value - before.values[rail] for rail, value in last.values.items() if rail in before.values}
        seconds = last.time - before.time
        return {rail: step / seconds for rail, step in steps.items() if step >= 0 and seconds > 0}

    def stop(self, patience: float = STOP_TIMEOUT) -> None:
        """End sampling. May be called again, whatever state the process is in."""
        process, self._stopping = self._process, True
        if process is None or self._ended:
            return
        self._ended = time.monotonic()
        try:
            end_children([process], patience)
        finally:
            if self._listener is not None:
                self._listener.join(STOP_TIMEOUT)

    def trace(self) -> Trace:
        """The samples until now, or until sampling was stopped.

        Raises:
            PowerError: sampling has never begun.
        """
        if self.info is None:
            raise PowerError(f"{self.source}: nothing was sampled")
        stop = self._ended or time.monotonic()
        return Trace(self.info, tuple(self._samples), tuple(self._problems), self._began, stop)

    def _listen(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with process.stdout as lines:
            for event in events(lines):
                self._handle(event)
        if self.info is not None and not self._stopping:
            process.wait()
            if not self.lost():
                message = f"the sampling process died ({self._last_words()})"
                self._problems.append(Problem(time.monotonic(), "died", message))
        self._answered.set()

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "sample":
            self._samples.append(Sample(event["time"], event["uncertainty"], event["values"]))
            self._last_arrival = time.monotonic()
        elif kind == "started":
            self._began = time.monotonic()
            info = SourceInfo.from_event(event)
            self._problems += [Problem(self._began, "interval", note) for note in info.notes]
            self.info = info
            self._answered.set()
        elif kind == "refused":
            self._refusal = event
            self._answered.set()
        elif kind in ("problem", "lost"):
            self._problems.append(Problem(event["time"], event.get("kind", "lost"), event["message"]))

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._errors is not None
        return last_words(self._process.poll(), tail_of(self._errors))


@dataclass(frozen=True)
class SourceReport:
    """What a source measured for a moment, or why it cannot be used."""

    name: str
    info: SourceInfo | None  # None if it cannot be used
    watts: dict[str, float]  # mean per rail over that time
    rate: float | None  # readings per second that were reached
    problems: tuple[str, ...] = ()
    reason: str = ""  # why it cannot be used
    hint: str | None = None


def find_source(
    forced: str | None = None, interval: float = 0.1, *, timeout: float = START_TIMEOUT, **options: Any
) -> PowerSampler:
    """A running sampler of the first source that answers, or of the ``forced`` one; ``timeout``: seconds for each.

    Raises:
        PowerError: none answers, with the reason of each.
        UsageError: there is no source of that name.
    """
    reasons, hint = [], None
    for name in _names(forced):
        sampler = PowerSampler(name, interval, **options)
        try:
            sampler.start(timeout)
            return sampler
        except PowerError as error:
            reasons.append(error.message)
            hint = error.hint if forced else hint
    raise PowerError("; ".join(reasons), hint=hint or (None if forced else "cdkd-edge power says what would help"))


def list_sources(
    only: str | None = None, seconds: float = 1.0, interval: float = 0.1, **options: Any
) -> tuple[SourceReport, ...]:
    """Try all sources (or one) at the same time, and measure for some ``seconds`` with those that answer.

    Raises:
        UsageError: there is no source of that name, or a time is not one.
    """
    if not 0 <= seconds < math.inf:
        raise UsageError(f"--seconds must be a number of at least 0, not {seconds:g}")
    samplers = [PowerSampler(name, interval, **options) for name in _names(only)]
    reports: dict[str, SourceReport] = {}
    try:
        deadline = time.monotonic() + START_TIMEOUT
        for sampler in samplers:
            sampler.launch()
        running = []
        for sampler in samplers:
            name = sampler.source
            try:
                sampler.wait_until_started(max(0.0, deadline - time.monotonic()))
                running.append(sampler)
            except PowerError as error:
                reports[name] = SourceReport(name, None, {}, None, reason=error.message, hint=error.hint)
        time.sleep(seconds if running else 0)
        for sampler in running:
            trace, name = sampler.trace(), sampler.source
            # At an interval that another client has set, there may be too few readings yet.
            while trace.rate is None and time.monotonic() - trace.start < 3 * trace.source.nominal_interval:
                time.sleep(0.05)
                trace = sampler.trace()
            reports[name] = SourceReport(name, sampler.info, mean_watts(trace), trace.rate, sampler.health())
    finally:
        for sampler in samplers:
            sampler.stop()
    return tuple(reports[sampler.source] for sampler in samplers)


def mean_watts(trace: Trace) -> dict[str, float]:
    """Per rail, over the whole trace; a rail with too few readings is absent."""
    means = {}
    for rail in trace.source.rails:
        series = trace.series(rail)
        if trace.source.quantity == WATTS and series:
            means[rail] = sum(value for _, value, _ in series) / len(series)
        elif len(series) > 1 and series[-1][1] >= series[0][1]:
            means[rail] = (series[-1][1] - series[0][1]) / (series[-1][0] - series[0][0])
    return means


def _names(only: str | None) -> tuple[str, ...]:
    if only is None:
        return tuple(SOURCES)
    if only not in SOURCES:
        raise UsageError(f"there is no source of power named {only}", hint=f"one of {', '.join(SOURCES)}")
    return (only,)
