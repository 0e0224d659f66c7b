"""Logs of ``tegrastats --interval MILLISECONDS --logfile FILE``, as a trace.

A line, of JetPack 6; of JetPack 7 with a third value per rail; of JetPack 4 without ``mW`` and without a date::

    11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) ... VDD_IN 5704mW/5612mW VDD_CPU_GPU_CV 831mW/820mW ...

The first value of a rail is the power when the line was written. Those behind it, the average since tegrastats was
started among them, are never used. Sources: "tegrastats Utility" in the Jetson Linux Developer Guide; lines of JetPack
7.2 in https://github.com/rbonghi/jetson_stats/blob/master/jtop/tests/test_06_tegra_parse.py

Date stamps are whole seconds. Lines of one second are spread evenly over it, so each is known to within half its share.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

from cdkd_edge.board.power.energy import Problem, Trace
from cdkd_edge.board.power.ina3221 import COVERS, MOST_WATTS, TOTAL
from cdkd_edge.board.power.protocol import MODULE, WATTS, Sample, SourceInfo
from cdkd_edge.board.power.window import LEAST_READINGS
from cdkd_edge.core.errors import PowerError, UsageError, printable

_LINE = re.compile(r"(?:^|\s)RAM \d+/\d+[kMG]?B\b")
_STAMP = re.compile(r"\d\d-\d\d-\d{4} \d\d:\d\d:\d\d(?=\s)")
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW(?:/\d+mW){0,2}|(?:/\d+){1,2})(?!\S)")
_EPOCH = datetime.datetime(1970, 1, 1)  # of the board's own time zone, which the log does not name
_PACE_TOLERANCE = 0.05  # difference between --interval and the date stamps that is not worth a word


@dataclass(frozen=True)
class TegrastatsLog:
    """A log and the readings in it. Times are seconds from its first reading."""

    path: Path
    lines: int  # lines that tegrastats wrote
    other_lines: int  # other lines, which were passed over
    stamped: bool  # whether moments come from date stamps; else from the interval
    trace: Trace
    slack: float  # seconds by which the length of the log may be wrong


@dataclass(frozen=True)
class _Line:
    number: int  # from 1
    second: int | None  # of its date stamp
    watts: dict[str, float]


def read_log(path: Path, interval: float | None = None) -> TegrastatsLog:
    """Read a log.

    Args:
        path: the log.
        interval: seconds between lines, for a log without date stamps.

    Raises:
        PowerError: it is no log of tegrastats, or it does not hold the power of the module.
        UsageError: the interval is needed, or is no time.
        OSError: it cannot be read.
    """
    if interval is not None and not 0 < interval < math.inf:
        raise UsageError(f"--interval must be a positive number of seconds, not {interval:g}")
    lines, others = _lines_of(path)
    if not lines:
        says = f"; line {others[0][0]} is {printable(others[0][1], 60)!r}" if others else ", it is empty"
        hint = "make one with `tegrastats --interval 100 --logfile FILE`"
        raise PowerError(f"{path} is no log of tegrastats{says}", hint=hint)
    rails = tuple(dict.fromkeys(rail for line in lines for rail in line.watts))
    if TOTAL not in rails:
        raise _no_total(path, rails)
    problems = (
        [f"lines that tegrastats did not write: {len(others)}, the first is line {others[0][0]}"] if others else []
    )
    stamped = sum(line.second is not None for line in lines)
    if stamped:  # by far most of a log has them, or none
        lines, without = [one for one in lines if one.second is not None], len(lines) - stamped
        problems += [f"lines without a date stamp, which were passed over: {without}"] if without else []
    silent = [line.number for line in lines if TOTAL not in line.watts]
    if silent:
        problems.append(f"lines without {TOTAL}: {len(silent)}, the first is line {silent[0]}")
    if (count := len(lines) - len(silent)) < LEAST_READINGS:
        raise PowerError(f"{path} is too short: readings of {TOTAL}: {count}, needed: {LEAST_READINGS}")
    moments, from_stamps = _moments_of(path, lines, interval)
    pace = median(b - a for (a, _), (b, _) in pairwise(moments))
    if interval is None:
        interval = pace
    elif from_stamps and abs(pace - interval) > _PACE_TOLERANCE * interval:
        problems.append(f"the date stamps tell of lines every {pace:.3g} s, not {interval:g} s; they were taken")
        interval = pace
    elif not from_stamps:
        problems.append(f"every line is taken to be {interval:g} s after the one before, as --interval says")
    start = moments[0][0]
    samples = tuple(
        Sample(moment - start, uncertainty, line.watts)
        for (moment, uncertainty), line in zip(moments, lines, strict=True)
    )
    source = SourceInfo("tegrastats", MODULE, COVERS, WATTS, rails, TOTAL, interval)
    found = tuple(Problem(0.0, "log", text) for text in problems)
    trace = Trace(source, samples, found, 0.0, samples[-1].time)
    slack = samples[0].uncertainty + samples[-1].uncertainty
    return TegrastatsLog(path, len(lines), len(others), from_stamps, trace, slack)


def _lines_of(path: Path) -> tuple[list[_Line], list[tuple[int, str]]]:
    """The lines of tegrastats, and all others with their numbers."""
    lines: list[_Line] = []
    others: list[tuple[int, str]] = []
    with open(path, encoding="utf-8", errors="replace") as log:
        for number, text in enumerate(log, 1):
            if _LINE.search(text):
                found = ((rail, int(milliwatts) / 1e3) for rail, milliwatts in _RAIL.findall(text))
                lines.append(_Line(number, _second(text), {rail: one for rail, one in found if one <= MOST_WATTS}))
            elif text.strip():
                others.append((number, text.strip()))
    return lines, others


def _second(text: str) -> int | None:
    """The date stamp of a line, in seconds; None if it has none."""
    stamp = _STAMP.match(text)
    if stamp is None:
        return None
    try:
        moment = datetime.datetime.strptime(stamp[0], "%m-%d-%Y %H:%M:%S")
    except ValueError:  # month 13
        return None
    return round((moment - _EPOCH).total_seconds())


def _no_total(path: Path, rails: tuple[str, ...]) -> PowerError:
    if not rails:
        return PowerError(f"{path} names no rail with its power", hint="run tegrastats with sudo, on the board itself")
    only = f"only {', '.join(rails)}, which do not add up to it"
    hint = f"boards with {TOTAL}: Orin NX, Orin Nano, Xavier NX"
    return PowerError(f"{path} has no {TOTAL}, the power of the whole module: {only}", hint=hint)


def _moments_of(path: Path, lines: list[_Line], interval: float | None) -> tuple[list[tuple[float, float]], bool]:
    """Moment and uncertainty of every line, and whether they come from date stamps."""
    stamps = [line.second for line in lines if line.second is not None]
    for line, (before, after) in zip(lines[1:], pairwise(stamps), strict=False):
        if after < before:
            reason = f"line {line.number} of {path} is stamped {before - after} s before the line above it"
            raise PowerError(reason, hint="the clock was set, or these are two logs; cut the file there")
    seconds = [(second - stamps[0], len(list(group))) for second, group in groupby(stamps)]
    # The first and the last second are cut off, so their lines do not tell the pace.
    if len(seconds) >= 3:
        return _spread(seconds), True
    if interval is None:
        why = "lasts for less than three seconds of its date stamps" if stamps else "has no date stamps"
        raise UsageError(
            f"{path} {why}, so it does not tell how far apart its lines are",
            hint="give --interval SECONDS; without its own --interval, tegrastats writes one line a second",
        )
    return [(number * interval, 0.0) for number in range(len(lines))], False


def _spread(seconds: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Moments within seconds that have so many lines each. Beside a time without lines, a second is not full."""
    usual = Counter(count for _, count in seconds).most_common(1)[0][0]
    known = {second for second, _ in seconds}
    moments = []
    for second, count in seconds:
        cut = count < usual and not {second - 1, second + 1} <= known
        step = 1 / (usual if cut else count)
        first = 1 - count * step if second - 1 not in known else 0.0
        uncertainty = min(0.5, step if cut else step / 2)
        moments += [(second + first + (number + 0.5) * step, uncertainty) for number in range(count)]
    return moments
