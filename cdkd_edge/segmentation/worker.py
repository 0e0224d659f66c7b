"""Does one job: makes a label map with its products, or keeps the one that is there; and the process that does jobs.

``python -m cdkd_edge.segmentation.worker`` is a process of ``segment --workers``. It loads one engine and does one
job at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cdkd_edge import __version__
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, FleetError, ManifestError, SceneError
from cdkd_edge.core.files import occupied, write_text
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import EngineManifest, is_artefact_name, read_manifest
from cdkd_edge.core.process import EventWriter
from cdkd_edge.core.signals import check, end_on_signals
from cdkd_edge.engines.protocol import Engine, Labeller
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.raster.areas import class_areas
from cdkd_edge.raster.open import gdal, is_gdal_name, open_scene
from cdkd_edge.raster.styles import describes, is_users_style, label_map_style, label_map_xml, sidecar_path, style_path
from cdkd_edge.segmentation import partial, pipeline
from cdkd_edge.segmentation.jobs import (
    EngineRef,
    Job,
    JobReport,
    KeptMap,
    Reach,
    Status,
    decode,
    encode,
    file_state,
)
from cdkd_edge.segmentation.outputs import confidence_path
from cdkd_edge.segmentation.products import mismatch, product_paths, source_of, write_products

Progress = Callable[[int, int], None]


def run_job(
    engine: Labeller,
    job: Job,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[JobReport, Exception | None]:
    """Do a job and report failures of any kind, with the error; only interruptions (Ctrl-C, a signal) are raised."""
    started = time.perf_counter()
    try:
        return do_job(engine, job, progress, note), None
    except Exception as error:
        seconds, sha256 = time.perf_counter() - started, engine.artefact.sha256
        return JobReport.failed(job, error, seconds=seconds, engine_sha256=sha256), error


def do_job(
    engine: Labeller,
    job: Job,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> JobReport:
    """Make a label map and its products, unless they are there.

    Raises SceneError if the scene cannot be read, or another file is in the label map's place; EngineError, OSError if
    the engine failed, or the system refused.
    """
    started = time.perf_counter()
    output = Path(job.output)
    # A run that was interrupted while it replaced the map may go on without --overwrite.
    overwrite = job.overwrite or partial.continues_replacing(output)
    kept = _existing_map(engine, job, overwrite=overwrite)
    status, notes, result = Status.DONE, list[str](), None
    if kept is None:
        # Go on with what a lost worker left, unless the engine of another board made it.
        resume = job.engine.sha256 is not None if job.attempt > 1 else not job.overwrite
        result = pipeline.segment_scene(engine, job.scene, output, job.options, progress, resume=resume, warn=note)
    elif file_state(output) == job.before:
        status = Status.KEPT
        partial.drop_finished(output)
        _complete_sidecars(kept, engine.schema.in_palette(job.options.palette))
    else:
        notes.append("finished by an earlier attempt, whose answer was lost")
    areas = kept.areas if kept is not None else result.areas if result is not None else None
    assert areas is not None
    products, said = write_products(
        job.scene, output, areas, engine, job.products, job.options, kept=kept is not None, overwrite=overwrite
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


# Tags that may differ, or are compared in another way. (Other releases make the same labels, or say so in notes.)
_NOT_COMPARED = ("CDKD_EDGE", "ENGINE", "GRAPH", "SCENE_SAMPLE")


def _existing_map(engine: Labeller, job: Job, *, overwrite: bool) -> KeptMap | None:
    """The label map that is there, if it stays; None: one is to be made.

    Raises SceneError if the file that is there is not the label map of this job, and may not be overwritten.
    """
    output = Path(job.output)
    now = file_state(output)
    if now is None:
        for name, path in product_paths(output, job.products, confidence=job.options.confidence).items():
            # A run that was killed while it finished may have put the confidence raster in place already.
            if (name != "confidence" or not partial.was_finishing(output)) and path.exists() and not overwrite:
                raise occupied(path, SceneError)
    elif now != job.before or not overwrite:
        try:
            return _same_map(engine, job)
        except CdkdEdgeError:
            if not overwrite:
                raise
    return None


def _same_map(engine: Labeller, job: Job) -> KeptMap:
    """Read a label map that is of this scene, by this engine (or one of the same graph), with these options.

    Raises SceneError if it is not, and says why; or if the scene cannot be read.
    """
    output, options, scene = Path(job.output), job.options, job.scene
    other = functools.partial(occupied, output, SceneError)
    with contextlib.closing(dataclasses.replace(options, strict=False).open(scene)) as reader:
        tiles = len(options.grid_over(reader, engine.tile))
        wanted = pipeline.label_map_tags(engine, reader, options, partial.scene_identity(reader))
        height, width = reader.height, reader.width
    try:
        dataset = open_scene(output)
    except SceneError as error:
        raise other(f"is no label map: {error.message}") from None
    with dataset:
        with gdal(f"reading {output}"):
            tags = dataset.tags()
        sample = wanted["SCENE_SAMPLE"]
        if (reason := _difference(wanted, tags, "GRAPH" if job.engine.sha256 is None else "ENGINE")) is not None:
            raise other(reason)
        if (dataset.height, dataset.width) != (height, width):
            raise other(f"has {dataset.width} x {dataset.height} px; the scene has {width} x {height}")
        if tags.get("SCENE_SAMPLE", sample) != sample:  # earlier releases have no sample
            raise other(f"was made of another scene named {Path(scene).name}")
        if not is_gdal_name(scene) and output.stat().st_mtime_ns < Path(scene).stat().st_mtime_ns:
            raise other(f"is older than {scene}")
    try:
        areas = class_areas(output, engine.schema)  # reads all of it
    except SceneError as error:
        raise other(f"is damaged: {error.message}") from None
    confidence = confidence_path(output) if options.confidence else None
    if confidence is not None and (reason := mismatch("confidence", confidence, source_of(output))) is not None:
        raise other(f"{confidence.name} {reason}")
    pixels = {area.name: area.pixels for area in areas.classes}
    return KeptMap(output, height, width, tiles, pixels, areas.no_data.pixels, areas, confidence)


def is_label_map(path: str) -> bool:
    """Whether a raster is a label map that this package wrote."""
    try:
        with open_scene(path) as dataset:
            return "CDKD_EDGE" in dataset.tags()
    except SceneError:
        return False


def _difference(wanted: Mapping[str, str], tags: Mapping[str, str], identity: str) -> str | None:
    """How a label map differs from the one that would be made, by its tags; None: not at all."""
    if "CDKD_EDGE" not in tags:
        return "is no label map of cdkd-edge"
    if tags.get(identity, "").rpartition("sha256:")[2] != wanted.get(identity, "").rpartition("sha256:")[2]:
        return f"was made by another {identity.lower()} ({tags.get(identity, 'unknown').partition(' ')[0]})"
    ignored = {*_NOT_COMPARED, *(name for name in tags if name == "AREA_OR_POINT" or name.startswith("TIFFTAG_"))}
    # GDAL drops the blanks at the beginning of a value, such as a scene's name.
    was, now = ({name: value.lstrip() for name, value in one.items() if name not in ignored} for one in (tags, wanted))
    changes = partial.differences(was, now)
    return f"was made with other options: {'; '.join(changes)}" if changes else None


def _complete_sidecars(kept: KeptMap, schema: LabelSchema) -> None:
    """Write class names, areas and QGIS style beside a label map again if they are missing or of another map.

    (Somebody copied the ``.tif`` alone, or an older release wrote it.) A folder that cannot be written stays as it is.
    """
    sidecar, style = sidecar_path(kept.output), style_path(kept.output)
    with contextlib.suppress(OSError):
        if not describes(sidecar, schema, kept.areas.classes):
            write_text(sidecar, label_map_xml(schema, kept.areas.classes))
    with contextlib.suppress(OSError):
        if not is_users_style(style, schema):
            wanted = label_map_style(schema)
            if not style.exists() or style.read_bytes() != wanted.encode():
                write_text(style, wanted)


class WorkerEngine:
    """The engine of a worker, loaded once. There is never a second one: on a board two would not fit into memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held during a job, so that a worker with several threads does one at a time
        self._key: tuple[EngineRef, str] | None = None
        self._engine: Engine | None = None

    def load(self, ref: EngineRef) -> Engine:
        """The engine of a job; the one of the job before if it is the same.

        Raises ManifestError if it is not what its manifest says; EngineError if there is none, it is another one, or
        it does not run here.
        """
        path = engine_path(ref)
        key = (ref, read_manifest(path, EngineManifest, verify=False).artefact.sha256)
        if self._engine is None or key != self._key:
            self.release()
            engine = load_engine(path, threads=ref.threads)
            found = engine.manifest.artefact.sha256
            if ref.sha256 is not None and ref.sha256 != found:
                engine.close()
                raise EngineError(
                    f"{platform.node()}: {path} is another engine (sha256 {found[:12]}..., not {ref.sha256[:12]}...)",
                    hint="share one file, or let each worker take its own engine of the same graph: "
                    "--worker-engines DIR",
                )
            self._engine, self._key = engine, key
        return self._engine

    def release(self) -> None:
        """Close the engine: it failed, or another one is needed."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with contextlib.suppress(Exception):  # closing a broken engine may fail, too
                engine.close()

    def answer(self, job: Job, progress: Progress) -> str:
        """Do a job with this engine and return its report as JSON, whatever happens."""
        try:
            _require_same_place(job)
            engine = self.load(job.engine)
        except (CdkdEdgeError, OSError, MemoryError) as error:
            return encode(JobReport.failed(job, error, Reach.WORKER))
        report, _ = run_job(engine, job, progress)
        if report.error is not None and report.error.reach == Reach.ENGINE:
            self.release()
        return encode(report)


def engine_path(ref: EngineRef) -> Path:
    """Where the engine of a job lies on this machine; raises EngineError if there is none, or more than one."""
    if ref.folder is None:
        return Path(ref.path)
    folder = Path(ref.folder).absolute()
    found: list[tuple[Path, EngineManifest]] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_artefact_name(path) and not path.name.startswith("."):
            with contextlib.suppress(ManifestError):
                manifest = read_manifest(path, EngineManifest, verify=False)
                if manifest.graph.sha256 == ref.graph_sha256:
                    found.append((path, manifest))
    if len(found) > 1 and ref.runtime is not None:
        found = [(path, manifest) for path, manifest in found if manifest.runtime == ref.runtime] or found
    what = f"the {ref.precision} graph of {ref.name} (sha256 {ref.graph_sha256[:12]}...)"
    if not found:
        raise EngineError(f"{platform.node()}: no engine in {folder} was built from {what}", hint="build it there")
    if len(found) > 1:
        names = ", ".join(path.name for path, _ in found)
        raise EngineError(f"{platform.node()}: {names} in {folder} were all built from {what}", hint="leave one there")
    return found[0][0]


def _require_same_place(job: Job) -> None:
    """Make sure that this machine has the same release and sees the same files."""
    here = platform.node()
    if job.tool != __version__:
        raise FleetError(f"{here} has cdkd-edge {__version__}; the run needs {job.tool}", hint="install the same there")
    unseen = None
    if job.token is not None and not os.path.exists(job.token):  # noqa: PTH110 - of names that are not UTF-8, too
        unseen = os.path.dirname(job.token)  # noqa: PTH120
    elif job.scene_is_file and not Path(job.scene).is_file():
        unseen = f"the scene {job.scene}"
    if unseen is not None:
        raise FleetError(f"{here} does not see {unseen}", hint="mount it there under the same path")


def send_progress(send: Progress, require_wanted: Callable[[], None] = lambda: None) -> Progress:
    """A progress callback that sends at most once a second. ``require_wanted`` raises when the run was stopped."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        check()
        require_wanted()
        now = time.monotonic()
        if now - last >= 1.0:
            last = now
            send(done, total)

    return progress


def main() -> None:
    """Do the jobs that come on stdin, one line of JSON each, until stdin ends.

    Lines on stdout are JSON: ``done`` and ``total`` tiles of a job, or its ``report``.
    """
    end_on_signals()
    out = EventWriter.to_parent()
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    engine = WorkerEngine()
    while True:
        job = decode(jobs.get(), Job)
        out.write(report=engine.answer(job, send_progress(lambda done, total: out.write(done=done, total=total))))


def _read_jobs(jobs: queue.SimpleQueue[str]) -> None:
    with os.fdopen(os.dup(0), encoding="utf-8") as lines:
        for line in lines:
            jobs.put(line)
    os.kill(os.getpid(), signal.SIGTERM)  # ends a job in progress in good order


if __name__ == "__main__":
    main()
