"""The sampling process: one source, JSON lines on stdout, gone when its parent is.

``python -m cdkd_edge.board.power.sampler_child --source NAME --interval SECONDS``. Lines: ``started`` (the fields of
:class:`~cdkd_edge.board.power.protocol.SourceInfo`) or ``refused`` (``reason``, ``hint``); then ``sample`` (``time``,
``uncertainty``, ``values``) and ``problem`` (``time``, ``kind``, ``message``); at last ``lost`` (``message``), if the
source has gone. It ends when its stdin does. What could not be read is absent; nothing is filled in.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from cdkd_edge.board.power.protocol import (
    WATTS,
    LostSourceError,
    Reader,
    Sample,
    SourceInfo,
    Stream,
    UnusableSourceError,
)

PATIENCE = 5.0
"""Seconds of nothing but errors after which a polled source is lost."""
OVERSAMPLING = 4
"""Readings per interval of a source of watts, each a sample of its own. (A counter counts between readings as well.)"""


class PolledStream:
    """A reader, read once in every step of time. Steps that have passed are not made up for.

    A counter is read at regular moments. Watts are read more often than asked for, each time at a moment drawn at
    random within the step: no load is in step with that, so that what the readings miss can be told from their scatter
    (:mod:`cdkd_edge.board.power.energy`).
    """

    def __init__(self, reader: Reader, interval: float) -> None:
        """Take a first reading.

        Raises:
            UnusableSourceError: it failed.
        """
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
    """Open a source by name.

    Args:
        source: one of ``SOURCES``.
        interval: seconds between samples.
        sys_root: where ``/sys`` is, for those that read files.

    Raises:
        UnusableSourceError: it cannot be used.
    """
    reader: Reader | None
    if source == "jtop":
        from cdkd_edge.board.power.jtop import JtopStream

        return JtopStream(interval)
    if source == "ina3221":
        from cdkd_edge.board.power.ina3221 import Ina3221Reader

        reader, reason = Ina3221Reader.probe(sys_root)
    elif source == "nvml":
        from cdkd_edge.board.power.nvml import NvmlReader

        reader, reason = NvmlReader.probe()
    elif source == "rapl":
        from cdkd_edge.board.power.rapl import RaplSource

        reader, reason = RaplSource.probe(sys_root / "class/powercap")
    else:
        raise UnusableSourceError(f"there is no source named {source}")
    if reader is None:
        raise UnusableSourceError(reason)
    return PolledStream(reader, interval)


class _Voice:
    """Writes lines; says every trouble once, until it has passed."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._troubles: set[tuple[str, str]] = set()

    def say(self, event: str, **fields: Any) -> None:
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()

    def troubles(self, now: set[tuple[str, str]]) -> None:
        for kind, message in sorted(now - self._troubles):
            self.say("problem", time=time.monotonic(), kind=kind, message=message)
        self._troubles = now


def sample_forever(stream: Stream, out: IO[str]) -> None:
    """Write ``started`` and then whatever comes, until the source is lost."""
    voice = _Voice(out)
    info = stream.info
    voice.say("started", **dataclasses.asdict(info))
    silence = max(3 * info.nominal_interval, 1.0)
    last = -float("inf")
    try:
        while True:
            answer = stream.next(silence)
            if answer is None:
                voice.troubles({("stalled", f"no reading for {silence:g} s")})
            elif isinstance(answer, str):
                voice.troubles({("unreadable", answer)})
            else:
                missing = [rail for rail in info.rails if rail not in answer.values]
                voice.troubles({("rail", f"{rail} cannot be read") for rail in missing})
                if answer.time <= last:  # a better estimate of a clock may step back by its error
                    continue
                last = answer.time
                voice.say("sample", **dataclasses.asdict(answer))
    except LostSourceError as error:
        voice.say("lost", time=time.monotonic(), message=str(error))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="sampler_child")
    parser.add_argument("--source", required=True)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--sys", type=Path, default=Path("/sys"))
    options = parser.parse_args(arguments)

    # Lines go to a copy of stdout; what a library prints goes to stderr.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _take_precedence()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        stream = open_stream(options.source, options.interval, options.sys)
    except UnusableSourceError as error:
        _Voice(out).say("refused", reason=error.reason, hint=error.hint)
        _leave(3)
    with contextlib.suppress(BrokenPipeError):
        sample_forever(stream, out)
    _leave(4)
    return 4


def _take_precedence() -> None:
    """Before all ordinary work, where that is granted (to root): a reading that waits for a CPU is a late one.

    Before the engine too, where that was started with a real-time priority (``chrt -f 50``), which this process has
    inherited. Niceness would not do: this process has a session of its own, and Linux weighs it within that alone
    (sched(7), "The autogroup feature"). Threads begun later are scheduled the same way.
    """
    with contextlib.suppress(AttributeError, OSError):
        priority = os.sched_getparam(0).sched_priority + 1  # of ordinary processes it is 0
        priority = min(priority, os.sched_get_priority_max(os.SCHED_RR))
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin; when it lets go, or is gone, so is this process."""
    while os.read(0, 4096):
        pass
    _leave(0)


def _leave(code: int) -> None:
    """At once, whatever a library's threads still wait for. Every line was flushed when it was said."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
