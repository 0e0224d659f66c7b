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
import time
from pathlib import Path

from cdkd_edge.board.power.polled import PolledStream
from cdkd_edge.board.power.protocol import LostSourceError, Sample, Stream, UnusableSourceError
from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.core.process import EventWriter, end_with_stdin, leave


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
    trouble = None  # why there is no reading
    failing: set[str] = set()  # rails
    last = -float("inf")
    try:
        while True:
            answer = stream.next(silence)
            if not isinstance(answer, Sample):
                kind = ("unreadable", answer) if answer else ("stalled", f"no reading for {silence:g} s")
                if kind != trouble:
                    out.write(event="problem", time=time.monotonic(), kind=kind[0], message=kind[1])
                trouble = kind
                continue
            trouble = None
            tried = set(answer.tried or info.rails)
            for rail in sorted(tried - failing - answer.values.keys()):
                out.write(event="problem", time=time.monotonic(), kind="rail", message=f"{rail} cannot be read")
            failing = (failing | tried) - answer.values.keys()
            # A better estimate of a clock may step back by its error.
            if answer.time > last:
                last = answer.time
                out.write(event="sample", time=last, uncertainty=answer.uncertainty, values=answer.values)
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
