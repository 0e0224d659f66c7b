"""The report of a run over many scenes, for programs: one row per scene, whatever became of it."""

from __future__ import annotations

import datetime
import errno
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdkd_edge import __version__
from cdkd_edge.core.files import is_stream, write_text
from cdkd_edge.segment.many.jobs import (
    DONE,
    FAILED,
    INTERRUPTED,
    KEPT,
    NOT_BEGUN,
    EngineRef,
    Failure,
    Job,
    JobReport,
    to_plain,
)

REPORT_VERSION = 1

RUNNING, COMPLETE, STOPPED = "running", "complete", "stopped"
"""How a run ended: every scene has its answer; something made it useless to go on; or :data:`.jobs.INTERRUPTED`."""

_BEGINNING = b'{\n  "report_version": '
"""Of every report on disk."""

_SAVE_EVERY_S = 10.0
"""A report on disk is at most this old while scenes come to their end."""


@dataclass
class FleetReport:
    """What became of every scene."""

    jobs: Sequence[Job]
    engine: EngineRef
    crew: dict[str, Any]
    ended: str = RUNNING
    error: Failure | None = None
    """Why the run was stopped."""
    started: str = field(default_factory=lambda: _now())
    reports: dict[int, JobReport] = field(default_factory=dict)
    """By the job's place in :attr:`jobs`."""
    begun: dict[int, int] = field(default_factory=dict)
    """Attempts of each job that was begun, by its place."""
    _clock: float = field(default_factory=time.perf_counter)

    def rows(self) -> list[JobReport]:
        """A report per scene, in the order of the scenes; those without an answer are interrupted or not begun."""
        return [
            self.reports.get(index)
            or JobReport(
                job.scene,
                job.output,
                INTERRUPTED if index in self.begun else NOT_BEGUN,
                attempts=self.begun.get(index, 0),
            )
            for index, job in enumerate(self.jobs)
        ]

    def count(self, status: str) -> int:
        """Scenes with a status."""
        return sum(row.status == status for row in self.rows())

    def document(self) -> dict[str, Any]:
        """The report as JSON data; the contract is in the README's section on many scenes."""
        seconds = time.perf_counter() - self._clock
        rows = self.rows()
        done = [row.result for row in rows if row.result is not None]
        pixels: Counter[str] = Counter()
        for row in rows:
            pixels.update(row.pixels)
        first = self.jobs[0] if self.jobs else None
        return {
            "report_version": REPORT_VERSION,
            "tool": f"cdkd-edge {__version__}",
            "started": self.started,
            "written": _now(),
            "seconds": seconds,
            "ended": self.ended,
            "error": to_plain(self.error),
            "engine": to_plain(self.engine),
            "crew": self.crew,
            "options": to_plain(first.options) if first else None,
            "products": to_plain(first.products) if first else None,
            "overwrite": first.overwrite if first else False,
            "totals": {
                "scenes": len(rows),
                **{_key(status): self.count(status) for status in (DONE, KEPT, FAILED, INTERRUPTED, NOT_BEGUN)},
                "tiles": sum(result.tiles for result in done),
                "tiles_per_second": sum(result.tiles for result in done) / seconds if done else None,
                "engine_seconds": sum(result.engine_seconds for result in done) if done else None,
                "class_pixels": dict(pixels),
            },
            "scenes": [row.document() for row in rows],
        }


class ReportFile:
    """Keeps a report on disk, whole at every moment."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._saved = -_SAVE_EVERY_S

    def save(self, report: FleetReport, *, now: bool = False) -> None:
        """Write the report, if it is time or must be ``now``.

        Raises:
            OSError: it cannot be written, or what is there is something else: a scene, say.
        """
        clock = time.monotonic()
        if self._path is None or not (now or clock - self._saved >= _SAVE_EVERY_S):
            return
        if self._path.is_file() and not is_stream(self._path):
            with open(self._path, "rb") as file:
                start = file.read(len(_BEGINNING))
            if start not in (b"", _BEGINNING):
                reason = "is no report, and would be replaced by one; name another file with --report"
                raise FileExistsError(errno.EEXIST, reason, str(self._path))
        write_text(self._path, json.dumps(report.document(), indent=2) + "\n")
        self._saved = clock


def _key(status: str) -> str:
    return status.replace(" ", "_")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
