"""The sampling process: reads one source and writes JSON lines, until its parent ends.

``python -m cdkd_edge.board.power.sampler_child --source NAME --interval SECONDS``. Lines: ``started`` (the fields of
:class:`~cdkd_edge.board.power.protocol.SourceInfo`) or ``refused`` (``reason``, ``hint``); then ``sample`` (``time``,
``uncertainty``, ``values``) and ``problem`` (``time``, ``kind``, ``message``); and ``lost`` (``message``) if the source
has gone. The process ends when its stdin does. A rail that could not be read is absent; nothing is filled in.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import time
from pathlib import Path

from cdkd_edge.board.power.protocol import (
    WATTS,
    LostSourceError,
    Reader,
    Sample,
    SourceInfo,
    Stream,
    UnusableSourceError,
)
from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.core.process import EventWriter, end_with_stdin, leave

PATIENCE = 5.0  # seconds without a reading after which a polled source is lost
OVERSAMPLING = 4
"""Readings per interval of a source of watts, each a sample of its own. (A counter counts between readings as well.)"""


class PolledStream:
    """A reader that is read once in every step of time. A step that has passed is not made up for.

    A counter is read at regular moments. Watts are read more often than asked for, each time at a random moment within
    the step: no load is in step with that, so the scatter of the readings tells what they miss
    (:mod:`cdkd_edge.board.power.energy`).
    """

    def __init__(self, reader: Reader, interval: float) -> None:
        """Take a first reading; if it fails, raise UnusableSourceError."""
        self._reader = reader
        self._random = reader.quantity == WATTS
        self._step = interval / OVERSAMPLING if self._random else interval
        self._due = time.monotonic()
        self._failing_since: float | None = None
        first = self._read()
        if isinstance(first, str):
            raise UnusableSourceError(first)
        self._first: Sample | None = first
        self.info = SourceInfo(
            name=reader.name.lower(),
            scope=reader.scope,
            covers=reader.covers,
            quantity=reader.quantity,
            rails=tuple(first.values),
            total=reader.total,
            interval=interval,
            random_moments=self._random,
        )

    def next(self, timeout: float) -> Sample | str | None:
        """Wait for the next moment and read; the reading that it was tried with comes first.

        Raises:
            LostSourceError: nothing could be read for ``PATIENCE`` seconds.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        now = time.monotonic()
        self._due += self._step
        if self._due < now:  # late: the times that have passed stay without a reading
            self._due += self._step * ((now - self._due) // self._step + 1)
        moment = self._due + (random.random() * self._step if self._random else 0.0)
        time.sleep(max(0.0, moment - now))
        answer = self._read()
        if isinstance(answer, Sample):
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = time.monotonic()
        elif time.monotonic() - self._failing_since > PATIENCE:
            raise LostSourceError(answer)
        return answer

    def _read(self) -> Sample | str:
        before = time.monotonic()
        try:
            values = self._reader.read()
        except (OSError, ValueError, KeyError) as error:
            return str(error) or type(error).__name__
        after = time.monotonic()
        return Sample((before + after) / 2, (after - before) / 2, values)

    def close(self) -> None:
        """Close the reader."""
        self._reader.close()


def open_stream(source: str, interval: float, sys_root: Path) -> Stream:
    """Open a source by name, or raise UnusableSourceError; ``sys_root`` is where ``/sys`` is."""
    if source not in SOURCES:
        raise UnusableSourceError(f"there is no source named {source}")
    opened = SOURCES[source].open(interval, sys_root)
    return opened if isinstance(opened, Stream) else PolledStream(opened, interval)


def sample_forever(stream: Stream, out: EventWriter) -> None:
    """Write ``started``, then readings and problems, until the source is lost. Each problem is written once."""
    info = stream.info
    out.write(event="started", **dataclasses.asdict(info))
    silence = max(3 * info.nominal_interval, 1.0)
    known: set[tuple[str, str]] = set()
    last = -float("inf")
    try:
        while True:
            answer = stream.next(silence)
            if answer is None:
                troubles = {("stalled", f"no reading for {silence:g} s")}
            elif isinstance(answer, str):
                troubles = {("unreadable", answer)}
            else:
                troubles = {("rail", f"{rail} cannot be read") for rail in info.rails if rail not in answer.values}
            for kind, message in sorted(troubles - known):
                out.write(event="problem", time=time.monotonic(), kind=kind, message=message)
            known = troubles
            # A better estimate of a clock may step back by its error.
            if isinstance(answer, Sample) and answer.time > last:
                last = answer.time
                out.write(event="sample", **dataclasses.asdict(answer))
    except LostSourceError as error:
        out.write(event="lost", time=time.monotonic(), message=str(error))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="sampler_child")
    parser.add_argument("--source", required=True)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--sys", type=Path, default=Path("/sys"))
    options = parser.parse_args(arguments)

    out = EventWriter.to_parent()
    _take_precedence()
    end_with_stdin()
    try:
        stream = open_stream(options.source, options.interval, options.sys)
    except UnusableSourceError as error:
        out.write(event="refused", reason=error.reason, hint=error.hint)
        leave(3)
    with contextlib.suppress(BrokenPipeError):
        sample_forever(stream, out)
    leave(4)


def _take_precedence() -> None:
    """Run before all ordinary processes, where the system allows it (to root): a reading that waits for a CPU is late.

    Also before an engine that was started with a real-time priority (``chrt -f 50``), which this process has inherited.
    Niceness would not help: this process has its own session, and Linux weighs niceness within a session only
    (sched(7), "The autogroup feature"). Later threads inherit the priority.
    """
    with contextlib.suppress(AttributeError, OSError):
        priority = os.sched_getparam(0).sched_priority + 1  # of ordinary processes it is 0
        priority = min(priority, os.sched_get_priority_max(os.SCHED_RR))
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


if __name__ == "__main__":
    main()
