"""The sampling process seen from outside: start it, mark phases, hear of trouble, stop it and have the trace."""

from __future__ import annotations

import contextlib
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cdkd_edge.board.power.protocol import Sample, SourceInfo
from cdkd_edge.board.power.trace import Phase, Problem, Trace
from cdkd_edge.core.errors import PowerError, UsageError
from cdkd_edge.core.process import end_children, events, last_words, module_command, start_child, tail_of

COMMAND = module_command("cdkd_edge.board.power.sampler_child")
START_TIMEOUT = 15.0
"""Seconds for a source to show a first reading. A stalled jtop service never does."""
STOP_TIMEOUT = 2.0
"""Seconds for the process to end by itself; a stopped (SIGSTOP) one does not."""


class PowerSampler:
    """Samples of one source from a process of their own, on the clock of ``time.monotonic`` and ``time.perf_counter``.

    ::

        with PowerSampler("jtop") as sampler:
            with sampler.phase("idle"):
                ...
        energy = rail_energy(sampler.trace(), "VDD_IN", ...)

    Sampling goes on until ``stop``; what has been heard stays valid whatever happens to the process.
    """

    def __init__(
        self,
        source: str,
        interval: float = 0.1,
        *,
        sys_root: Path = Path("/sys"),
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            source: one of ``cdkd_edge.board.power.protocol.SOURCES``.
            interval: seconds between samples.
            sys_root: where ``/sys`` is, for sources that read files.
            command: the process, for tests.

        Raises:
            UsageError: the interval is not a time.
        """
        if not 0 < interval < math.inf:
            raise UsageError(f"an interval of {interval:g} s")
        self.source = source
        self.info: SourceInfo | None = None
        """Once started."""
        self._command = (*command, "--source", source, "--interval", str(interval), "--sys", str(sys_root))
        self._samples: list[Sample] = []
        self._phases: list[Phase] = []
        self._open_phase: tuple[str, float] | None = None
        self._problems: list[Problem] = []
        self._refusal: dict[str, Any] = {}
        self._answered = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._errors: IO[bytes] | None = None
        self._stopping = False
        self._began = self._ended = 0.0
        self._heard = 0.0

    def __enter__(self) -> PowerSampler:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout: float = START_TIMEOUT) -> SourceInfo:
        """Start sampling and wait for a first reading.

        Raises:
            PowerError: the source cannot be used, or did not answer in time.
        """
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
            PowerError: as ``start``; the process is ended.
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
        hint = "sudo systemctl restart jtop" if self.source == "jtop" else None
        raise PowerError(f"{self.source}: no answer within {timeout:g} s", hint=hint)

    def mark(self, phase: str | None) -> None:
        """A phase begins now, and the one before ends; None only ends it."""
        now = time.monotonic()
        if self._open_phase is not None:
            self._phases.append(Phase(self._open_phase[0], self._open_phase[1], now))
        self._open_phase = None if phase is None else (phase, now)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase around a block; it is marked also if the block fails."""
        self.mark(name)
        try:
            yield
        finally:
            self.mark(None)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Heard so far."""
        return tuple(self._samples)

    def health(self) -> tuple[str, ...]:
        """What is wrong with the sampling so far, in sentences; empty if all is well."""
        troubles = [problem.message for problem in self._problems]
        if self.info is not None and not self._stopping:
            silence = self.silence()
            limit = 3 * self.info.nominal_interval + 0.2
            if silence > limit:
                troubles.append(f"no sample for {silence:.1f} s")
        return tuple(troubles)

    def lost(self) -> str:
        """Why no sample will come any more; empty while some may."""
        return next((problem.message for problem in self._problems if problem.kind in ("lost", "died")), "")

    def silence(self, rail: str | None = None) -> float:
        """Seconds since the latest sample, or the latest one of a rail."""
        if rail is not None:
            taken = (sample.time for sample in reversed(self._samples) if rail in sample.values)
            return time.monotonic() - next(taken, self._began)
        return time.monotonic() - max(self._heard, self._began)

    def watts(self) -> dict[str, float]:
        """Per rail, of the latest sample; of a counter, since the one before."""
        if self.info is None or not self._samples:
            return {}
        last = self._samples[-1]
        if self.info.quantity == "watts":
            return dict(last.values)
        if len(self._samples) < 2:
            return {}
        before = self._samples[-2]
        seconds = last.time - before.time
        return {
            rail: (value - before.values[rail]) / seconds
            for rail, value in last.values.items()
            if rail in before.values and value >= before.values[rail]
        }

    def stop(self, patience: float = STOP_TIMEOUT) -> None:
        """End sampling. Safe to call again, and whatever state the process is in."""
        process, self._stopping = self._process, True
        if process is None or self._ended:
            return
        self.mark(None)
        self._ended = time.monotonic()
        try:
            end_children([process], patience)
        finally:
            if self._listener is not None:
                self._listener.join(STOP_TIMEOUT)

    def trace(self) -> Trace:
        """What was heard, until now or until it was stopped.

        Raises:
            PowerError: sampling has never begun.
        """
        if self.info is None:
            raise PowerError(f"{self.source}: nothing was sampled")
        return Trace(
            source=self.info,
            samples=tuple(self._samples),
            phases=tuple(self._phases),
            problems=tuple(self._problems),
            start=self._began,
            stop=self._ended or time.monotonic(),
        )

    def _listen(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with process.stdout as lines:
            for event in events(lines):
                self._hear(event)
        if self.info is not None and not self._stopping:
            process.wait()
            if not any(problem.kind == "lost" for problem in self._problems):
                self._problems.append(
                    Problem(time.monotonic(), "died", f"the sampling process died ({self._last_words()})")
                )
        self._answered.set()

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "sample":
            self._samples.append(Sample(event["time"], event["uncertainty"], event["values"]))
            self._heard = time.monotonic()
        elif kind == "started":
            self._began = time.monotonic()
            info = SourceInfo.from_event(event)
            self._problems += [Problem(self._began, "interval", note) for note in info.notes]
            self.info = info
            self._answered.set()
        elif kind == "refused":
            self._refusal = event
            self._answered.set()
        elif kind == "problem":
            self._problems.append(Problem(event["time"], event["kind"], event["message"]))
        elif kind == "lost":
            self._problems.append(Problem(event["time"], "lost", event["message"]))

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._errors is not None
        return last_words(self._process.poll(), tail_of(self._errors))
