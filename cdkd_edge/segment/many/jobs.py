"""A job is one scene that shall become one label map; a job report is what became of it.

Both are plain data that travel as JSON, so that it makes no difference where a job runs.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from cdkd_edge import __version__
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, SceneError, SystemRefusalError, UsageError, as_answer
from cdkd_edge.core.files import require_free
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.segment import pipeline
from cdkd_edge.segment.many.kept import KeptMap, complete, refuse_foreign_map
from cdkd_edge.segment.options import SegmentOptions, SegmentResult
from cdkd_edge.segment.partial import continues_replacing, drop_finished, was_finishing
from cdkd_edge.segment.products import NO_PRODUCTS, PRODUCTS, ProductOptions, product_paths, write_products

JOB_VERSION = 1

DONE, KEPT, FAILED = "done", "kept", "failed"
INTERRUPTED, NOT_BEGUN = "interrupted", "not begun"

SCENE, ENGINE, WORKER, RUN = "scene", "engine", "worker", "run"
"""How far a failure reaches: this scene, whatever the engine does next, everything on this worker, all scenes."""

Stamp = tuple[int, int, int]
"""Size, time of change in ns, inode: another file in a name's place has another stamp."""


@dataclass(frozen=True)
class EngineRef:
    """Which engine labels the scenes, wherever it lies."""

    path: str
    name: str
    precision: str
    runtime: str | None
    sha256: str | None
    """Of the engine file; None: each worker has its own engine, built from ``graph_sha256``."""
    graph_sha256: str
    threads: int | None = None
    """CPU threads for one tile (CPU engines only)."""
    folder: str | None = None
    """Where each worker looks for its own engine; relative paths start where the worker was started."""


@dataclass(frozen=True)
class Job:
    """One scene, one label map."""

    scene: str
    output: str
    engine: EngineRef
    options: SegmentOptions = field(default_factory=SegmentOptions)
    products: ProductOptions = NO_PRODUCTS
    """What is wanted beside the label map."""
    overwrite: bool = False
    before: Stamp | None = None
    """What ``output`` was when the run began. A label map with another stamp was finished during the run."""
    scene_is_file: bool = False
    """Whether whoever gave the job sees the scene as a file; then a worker must see it too."""
    token: str | None = None
    """A file that whoever gave the job put beside the output; a worker that does not see it writes elsewhere."""
    attempt: int = 1
    tool: str = __version__
    job_version: int = JOB_VERSION


@dataclass(frozen=True)
class Failure:
    """Why a job failed."""

    kind: str
    message: str
    hint: str | None
    exit_code: int
    reach: str
    """:data:`SCENE`, :data:`ENGINE`, :data:`WORKER` or :data:`RUN`."""
    traceback: str | None = None
    """Of bugs."""

    @classmethod
    def of(cls, error: Exception, reach: str | None = None) -> Failure:
        """From an exception; how far it reaches is known by its kind."""
        known = as_answer(error)
        if known is None:
            text = "".join(traceback.format_exception(error))
            return cls(type(error).__name__, f"{type(error).__name__}: {error}", None, 1, reach or SCENE, text)
        reach = reach or _reach(error)
        return cls(type(error).__name__, known.message, known.hint, known.exit_code, reach)


@dataclass(frozen=True)
class JobReport:
    """What became of a job."""

    scene: str
    output: str
    status: str
    """:data:`DONE`, :data:`KEPT` (there was a label map of this scene by this engine with these options),
    :data:`FAILED`, :data:`INTERRUPTED` or :data:`NOT_BEGUN`."""
    attempts: int = 0
    """How often it was begun."""
    seconds: float | None = None
    """From taking the last attempt up to its end, products included."""
    host: str | None = None
    engine_sha256: str | None = None
    result: SegmentResult | None = None
    """Of a label map that this attempt made."""
    kept: KeptMap | None = None
    """Of a label map that was there."""
    products: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: Failure | None = None

    @property
    def pixels(self) -> dict[str, int]:
        """Pixels per class; empty where there is no label map."""
        figures = self.result or self.kept
        return figures.class_pixels if figures else {}

    def document(self) -> dict[str, Any]:
        """The report as one flat JSON object: what is asked for most is at the top."""
        figures = _shown(self.result or self.kept)
        figures.pop("output", None)
        figures["notes"] = [*figures.get("notes", ()), *self.notes]
        row = to_plain(dataclasses.replace(self, result=None, kept=None, products={}, notes=()))
        for name in ("result", "kept", "products", "notes"):
            del row[name]
        # Seconds of the engine's pass are the result's own; those of the whole job have a name of their own.
        row["job_seconds"] = row.pop("seconds")
        made = {name: self.products.get(name) for name in PRODUCTS}
        return {**row, **figures, **made, "error": row["error"]}


def run_job(engine: Labeller, job: Job, progress: Callable[[int, int], None] = lambda done, total: None) -> JobReport:
    """Do a job, whatever happens; only interruptions (Ctrl-C, a signal) are passed on."""
    started = time.perf_counter()
    try:
        return do_job(engine, job, progress)
    except Exception as error:
        return failed(job, error, time.perf_counter() - started, engine.artefact.sha256)


def do_job(
    engine: Labeller,
    job: Job,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> JobReport:
    """Make a label map and its products, unless they are there.

    Raises:
        SceneError: the scene cannot be read, or what is in the label map's place is something else.
        EngineError: the engine failed.
        OSError: the system refused.
    """
    started = time.perf_counter()
    output = Path(job.output)
    now = stamp(output)
    result: SegmentResult | None = None
    kept: KeptMap | None = None
    status = DONE
    notes: tuple[str, ...] = ()
    # An interrupted run that was replacing the map may be gone on with unasked.
    overwrite = job.overwrite or continues_replacing(output)
    if now is None:
        _refuse_existing(output, job, overwrite=overwrite)
    elif now != job.before or not overwrite:
        try:
            kept = refuse_foreign_map(output, engine, job.scene, job.options, same_graph=job.engine.sha256 is None)
        except CdkdEdgeError:
            if not overwrite:
                raise
        if kept is not None and now == job.before:
            status = KEPT
            drop_finished(output)
            complete(kept, engine.schema)
        elif kept is not None:
            notes = ("finished by an earlier attempt, whose answer was lost",)
    if kept is None:
        # What a lost worker left is gone on with, unless it was made by the engine of another board.
        resume = job.engine.sha256 is not None if job.attempt > 1 else not job.overwrite
        result = pipeline.segment_scene(engine, job.scene, output, job.options, progress, resume=resume, warn=warn)
    figures = result or kept
    assert figures is not None
    assert figures.areas is not None
    products, said = write_products(
        job.scene,
        output,
        figures.areas,
        engine,
        job.products,
        job.options,
        kept=kept is not None,
        overwrite=overwrite,
    )
    return JobReport(
        scene=job.scene,
        output=job.output,
        status=status,
        attempts=job.attempt,
        seconds=time.perf_counter() - started,
        host=platform.node(),
        engine_sha256=engine.artefact.sha256,
        result=result,
        kept=kept,
        products=products,
        notes=(*notes, *said),
    )


def failed(
    job: Job, error: Exception, seconds: float | None = None, engine_sha256: str | None = None, reach: str | None = None
) -> JobReport:
    """The report of a job that did not succeed."""
    return JobReport(
        scene=job.scene,
        output=job.output,
        status=FAILED,
        attempts=job.attempt,
        seconds=seconds,
        host=platform.node(),
        engine_sha256=engine_sha256,
        error=Failure.of(error, reach),
    )


def stamp(path: Path) -> Stamp | None:
    """What tells the file in a place from any other that will be in it; None: there is none."""
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return info.st_size, info.st_mtime_ns, info.st_ino


def _refuse_existing(output: Path, job: Job, *, overwrite: bool) -> None:
    """Make sure that a new label map's products replace nothing unasked."""
    for name, path in product_paths(output, job.products, confidence=job.options.confidence).items():
        if name == "confidence" and was_finishing(output):  # it gets its name before the label map
            continue
        require_free(path, overwrite=overwrite, error=SceneError)


_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _reach(error: Exception) -> str:
    if isinstance(error, EngineError):
        return ENGINE
    if isinstance(error, UsageError):  # options are the same for all
        return RUN
    # The writer says SystemRefusalError when the disk is full, and knows no number then.
    if isinstance(error, SystemRefusalError) or (isinstance(error, OSError) and error.errno in _HOPELESS):
        return RUN
    return SCENE


# --- JSON -----------------------------------------------------------------------------------------

Document = TypeVar("Document", Job, JobReport)


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value, enc_hook=_encoded)


def _shown(figures: SegmentResult | KeptMap | None) -> dict[str, Any]:
    """Figures of a label map as JSON data, without fields that are not meant for showing (``repr=False``)."""
    if figures is None:
        return {}
    hidden = {field.name for field in dataclasses.fields(figures) if not field.repr}
    return {name: value for name, value in to_plain(figures).items() if name not in hidden}


def encode(document: Job | JobReport) -> str:
    """A job or a report as JSON. (By ``json``, which keeps file names that are not UTF-8.)"""
    return json.dumps(to_plain(document))


def decode(text: str, kind: type[Document]) -> Document:
    """What :func:`encode` wrote.

    Raises:
        ValueError: it did not.
    """
    return msgspec.convert(json.loads(text), kind, dec_hook=_decoded)


def _encoded(value: Any) -> str | None:
    """Paths as text. Arrays stay where they are: what is made from them is made there."""
    return None if isinstance(value, np.ndarray) else str(value)


def _decoded(kind: type[Any], value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)
