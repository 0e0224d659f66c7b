"""Jobs and their reports as plain data, which travel as JSON; and the report of a whole run (``--report``).

A job is one scene that becomes one label map. It is the same wherever it runs: in this process, in another one, or on
another machine.
"""

from __future__ import annotations

import datetime
import errno
import json
import platform
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from cdkd_edge import __version__
from cdkd_edge.core.errors import EngineError, SystemRefusalError, UsageError, as_answer
from cdkd_edge.core.files import is_stream, write_text
from cdkd_edge.raster.areas import Areas
from cdkd_edge.segmentation.options import SegmentOptions, SegmentResult
from cdkd_edge.segmentation.products import NO_PRODUCTS, PRODUCTS, ProductOptions

REPORT_VERSION = 1


class Status:
    """What came of a scene. Kept: there was a label map of this scene, made by this engine with these options."""

    DONE, KEPT, FAILED, INTERRUPTED, NOT_BEGUN = ALL = "done", "kept", "failed", "interrupted", "not begun"


class Reach:
    """What a failure affects: this scene, everything the engine does next, everything on this worker, all scenes."""

    SCENE, ENGINE, WORKER, RUN = "scene", "engine", "worker", "run"


class Ended:
    """How a run ended: every scene has its report; it made no sense to go on; or the user stopped it."""

    NOT_YET, COMPLETE, STOPPED, INTERRUPTED = "running", "complete", "stopped", "interrupted"


FileState = tuple[int, int, int]  # size, time of change (ns) and inode: they differ after a file was replaced


def file_state(path: Path) -> FileState | None:
    """The state of a file; None: there is none."""
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return info.st_size, info.st_mtime_ns, info.st_ino


@dataclass(frozen=True)
class EngineRef:
    """The engine that labels the scenes, by its path and its content."""

    path: str
    name: str
    precision: str
    runtime: str | None
    sha256: str | None  # of the engine file; None: each worker has an engine of its own, built from ``graph_sha256``
    graph_sha256: str
    threads: int | None = None  # CPU threads for one tile (CPU engines only)
    folder: str | None = None  # where each worker looks for its own engine; relative to where the worker was started


@dataclass(frozen=True)
class Job:
    """One scene that becomes one label map."""

    scene: str
    output: str
    engine: EngineRef
    options: SegmentOptions = field(default_factory=SegmentOptions)
    products: ProductOptions = NO_PRODUCTS
    overwrite: bool = False
    before: FileState | None = None  # of ``output`` when the run began; another one now: it was finished in the run
    scene_is_file: bool = False  # where the job comes from, so that the worker must see it as well
    token: str | None = None  # a file beside the output; a worker that does not see it would write into another folder
    attempt: int = 1
    tool: str = __version__


@dataclass(frozen=True)
class Failure:
    """Why a job failed."""

    kind: str
    message: str
    hint: str | None
    exit_code: int
    reach: str  # one of :class:`Reach`
    traceback: str | None = None  # of faults in this program

    @classmethod
    def of(cls, error: Exception, reach: str | None = None) -> Failure:
        """From an exception; ``reach`` follows from its type if it is not given."""
        kind, known = type(error).__name__, as_answer(error)
        if known is None:
            text = "".join(traceback.format_exception(error))
            return cls(kind, f"{kind}: {error}", None, 1, reach or Reach.SCENE, text)
        return cls(kind, known.message, known.hint, known.exit_code, reach or _reach(error))


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _reach(error: Exception) -> str:
    if isinstance(error, EngineError):
        return Reach.ENGINE
    # Options are the same for all scenes; the writer says SystemRefusalError when the disk is full.
    if isinstance(error, UsageError | SystemRefusalError) or (isinstance(error, OSError) and error.errno in _NO_SPACE):
        return Reach.RUN
    return Reach.SCENE


@dataclass(frozen=True)
class KeptMap:
    """A label map that was there before; it was read once, so it is whole, and counted."""

    output: Path
    height: int
    width: int
    tiles: int
    class_pixels: dict[str, int]
    no_data_pixels: int
    areas: Areas
    confidence: Path | None = None  # the confidence raster, if one was asked for


@dataclass(frozen=True)
class JobReport:
    """What came of a job."""

    scene: str
    output: str
    status: str  # one of :class:`Status`
    attempts: int = 0  # how often it was begun
    seconds: float | None = None  # of the last attempt, products included
    host: str | None = None
    engine_sha256: str | None = None
    result: SegmentResult | None = None  # of a label map made in this attempt
    kept: KeptMap | None = None  # of a label map that was there
    products: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: Failure | None = None

    @classmethod
    def failed(
        cls, job: Job, error: Exception, reach: str | None = None, host: str | None = platform.node(), **known: Any
    ) -> JobReport:
        """The report of a job that did not succeed; ``known``: further fields."""
        failure = Failure.of(error, reach)
        return cls(job.scene, job.output, Status.FAILED, job.attempt, host=host, error=failure, **known)

    @property
    def pixels(self) -> dict[str, int]:
        """Pixels per class; empty without a label map."""
        figures = self.result or self.kept
        return figures.class_pixels if figures else {}

    def document(self) -> dict[str, Any]:
        """The report as one flat JSON object."""
        row = to_plain(self)
        result, kept, products, notes = (row.pop(name) for name in ("result", "kept", "products", "notes"))
        not_shown = ("output", "row_class_pixels")
        figures = {name: value for name, value in (result or kept or {}).items() if name not in not_shown}
        figures["notes"] = [*figures.get("notes", ()), *notes]
        row["job_seconds"] = row.pop("seconds")  # "seconds" are the label map's own
        return {**row, **figures, **{name: products.get(name) for name in PRODUCTS}, "error": row["error"]}


Document = TypeVar("Document", Job, JobReport)


def encode(document: Job | JobReport) -> str:
    """A job or a report as JSON. (By ``json``, which keeps file names that are not UTF-8.)"""
    return json.dumps(to_plain(document))


def decode(text: str, kind: type[Document]) -> Document:
    """Read what :func:`encode` wrote; raises ValueError if it is something else."""

    def path_from(kind: type[Any], value: Any) -> Any:
        if kind is Path:
            return Path(value)
        raise NotImplementedError(kind)

    return msgspec.convert(json.loads(text), kind, dec_hook=path_from)


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers. Arrays are left out: they are used up on the worker that made them."""
    return msgspec.to_builtins(value, enc_hook=lambda other: None if isinstance(other, np.ndarray) else str(other))


_SAVE_EVERY_S = 10.0
_BEGINNING = b'{\n  "report_version": '


@dataclass
class RunReport:
    """What came of every scene of a run; kept in a file, complete at every moment and at most ten seconds old."""

    jobs: Sequence[Job]
    engine: EngineRef
    begun: dict[int, int]  # attempts of each job that was begun, by index in :attr:`jobs`
    path: Path | None = None
    workers: dict[str, Any] = field(default_factory=dict)
    ended: str = Ended.NOT_YET
    error: Failure | None = None  # why the run was stopped
    started: str = field(default_factory=lambda: _now())
    reports: dict[int, JobReport] = field(default_factory=dict)  # by index in :attr:`jobs`
    _clock: float = field(default_factory=time.perf_counter)
    _saved: float = -_SAVE_EVERY_S

    def rows(self) -> list[JobReport]:
        """One report per scene, in order; jobs without an answer are interrupted or not begun."""
        rows = []
        for index, job in enumerate(self.jobs):
            status = Status.INTERRUPTED if index in self.begun else Status.NOT_BEGUN
            unanswered = JobReport(job.scene, job.output, status, attempts=self.begun.get(index, 0))
            rows.append(self.reports.get(index, unanswered))
        return rows

    def document(self) -> dict[str, Any]:
        """The report as JSON data; the documentation of many scenes describes it."""
        seconds = time.perf_counter() - self._clock
        rows = self.rows()
        done = [row.result for row in rows if row.result is not None]
        tiles = sum(result.tiles for result in done)
        pixels: Counter[str] = Counter()
        for row in rows:
            pixels.update(row.pixels)
        first = self.jobs[0] if self.jobs else None
        counts = Counter(row.status for row in rows)
        return {
            "report_version": REPORT_VERSION,
            "tool": f"cdkd-edge {__version__}",
            "started": self.started,
            "written": _now(),
            "seconds": seconds,
            "ended": self.ended,
            "error": to_plain(self.error),
            "engine": to_plain(self.engine),
            "crew": self.workers,
            "options": to_plain(first.options) if first else None,
            "products": to_plain(first.products) if first else None,
            "overwrite": first.overwrite if first else False,
            "totals": {
                "scenes": len(rows),
                **{name.replace(" ", "_"): counts[name] for name in Status.ALL},
                "tiles": tiles,
                "tiles_per_second": tiles / seconds if done else None,
                "engine_seconds": sum(result.engine_seconds for result in done) if done else None,
                "class_pixels": dict(pixels),
            },
            "scenes": [row.document() for row in rows],
        }

    def save(self, *, now: bool = False) -> None:
        """Write the file if ten seconds have passed, or ``now``.

        Raises OSError if it cannot be written, or if the file that is there is not a report: a scene, say.
        """
        if self.path is None or not (now or time.monotonic() - self._saved >= _SAVE_EVERY_S):
            return
        if self.path.is_file() and not is_stream(self.path):
            with open(self.path, "rb") as file:
                if file.read(len(_BEGINNING)) not in (b"", _BEGINNING):
                    reason = "is no report, and would be replaced by one; name another file with --report"
                    raise FileExistsError(errno.EEXIST, reason, str(self.path))
        write_text(self.path, json.dumps(self.document(), indent=2) + "\n")
        self._saved = time.monotonic()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
