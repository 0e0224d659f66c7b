"""What happens on a worker: one engine, loaded once; one job at a time; JSON in, JSON out.

A worker is one of dask.distributed, or a process that ``segment --workers`` starts (:func:`main`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdkd_edge import __version__
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, FleetError, ManifestError
from cdkd_edge.core.manifest import EngineManifest, read_manifest
from cdkd_edge.core.process import EventWriter
from cdkd_edge.core.signals import check, end_on_signals
from cdkd_edge.core.workspace import ENGINE_SUFFIXES
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segment.many.jobs import ENGINE, WORKER, EngineRef, Job, decode, encode, failed, run_job

_TELL_EVERY_S = 1.0
_STATIONS = "cdkd_edge_station"
_making = threading.Lock()
_stopped: set[str] = set()
"""Runs whose jobs shall end now."""


class RunStoppedError(FleetError):
    """Whoever gave the job does not want its result any more."""


class Station:
    """A worker's engine. Only one is kept: on a board two would not fit into memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held during a job, so that a worker with several threads still does one at a time."""
        self._key: tuple[EngineRef, str] | None = None
        self._engine: Engine | None = None

    def engine(self, wanted: EngineRef) -> Engine:
        """The engine of a job, loaded unless it is the one of the job before.

        Raises:
            ManifestError: it is not what its manifest says.
            EngineError: there is none, it is another one, or it does not run here.
        """
        path = engine_path(wanted)
        key = (wanted, read_manifest(path, EngineManifest, verify=False).artefact.sha256)
        if self._engine is None or key != self._key:
            self.release()
            engine = load_engine(path, threads=wanted.threads)
            try:
                _require_same(engine.manifest, wanted, path)
            except BaseException:
                engine.close()
                raise
            self._engine, self._key = engine, key
        return self._engine

    def release(self) -> None:
        """Close the engine; it failed, or another one is wanted."""
        engine, self._engine, self._key = self._engine, None, None
        if engine is not None:
            with contextlib.suppress(Exception):  # a broken one may fail at this, too
                engine.close()


def engine_path(wanted: EngineRef) -> Path:
    """Where the engine of a job lies on this machine.

    Raises:
        EngineError: there is none, or more than one.
    """
    if wanted.folder is None:
        return Path(wanted.path)
    folder = Path(wanted.folder).absolute()
    found: list[tuple[Path, EngineManifest]] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in ENGINE_SUFFIXES and not path.name.startswith("."):
            with contextlib.suppress(ManifestError):
                manifest = read_manifest(path, EngineManifest, verify=False)
                if manifest.graph.sha256 == wanted.graph_sha256:
                    found.append((path, manifest))
    if len(found) > 1 and wanted.runtime is not None:
        found = [(path, manifest) for path, manifest in found if manifest.runtime == wanted.runtime] or found
    what = f"the {wanted.precision} graph of {wanted.name} (sha256 {wanted.graph_sha256[:12]}...)"
    if not found:
        raise EngineError(f"{platform.node()}: no engine in {folder} was built from {what}", hint="build it there")
    if len(found) > 1:
        names = ", ".join(path.name for path, _ in found)
        raise EngineError(f"{platform.node()}: {names} in {folder} were all built from {what}", hint="leave one there")
    return found[0][0]


def _require_same(manifest: EngineManifest, wanted: EngineRef, path: Path) -> None:
    if wanted.sha256 is not None and manifest.artefact.sha256 != wanted.sha256:
        raise EngineError(
            f"{platform.node()}: {path} is another engine (sha256 {manifest.artefact.sha256[:12]}..., "
            f"not {wanted.sha256[:12]}...)",
            hint="share one file, or let each worker take its own engine of the same graph: --worker-engines DIR",
        )


def require_same_place(job: Job) -> None:
    """Make sure that this machine may do a job at all.

    Raises:
        FleetError: it has another release, or does not see the files.
    """
    here = platform.node()
    if job.tool != __version__:
        raise FleetError(f"{here} has cdkd-edge {__version__}; the run needs {job.tool}", hint="install the same there")
    if job.token is not None and not os.path.exists(job.token):  # noqa: PTH110 - of names that are not UTF-8, too
        raise FleetError(
            f"{here} does not see {os.path.dirname(job.token)}",  # noqa: PTH120
            hint="mount it there under the same path",
        )
    if job.scene_is_file and not Path(job.scene).is_file():
        raise FleetError(f"{here} does not see the scene {job.scene}", hint="mount it there under the same path")


def work(run: str, index: int, payload: str) -> str:
    """Do a job: the task that a scheduler gives to a worker.

    Args:
        run: name of the run; tiles that are done are told under this topic.
        index: the job's place in the run.
        payload: the job as JSON.

    Returns:
        Its report as JSON. Nothing is raised for a failure of any kind.
    """
    from distributed import get_worker

    job = decode(payload, Job)
    worker = get_worker()
    station = station_of(worker)

    def tell(done: int, total: int) -> None:
        worker.log_event(run, {"index": index, "attempt": job.attempt, "done": done, "total": total})

    with station.lock:
        return encode_report(station, job, _throttled(run, tell))


def encode_report(station: Station, job: Job, progress: Callable[[int, int], None]) -> str:
    """Do a job with a station's engine, and return its report as JSON."""
    try:
        require_same_place(job)
        engine = station.engine(job.engine)
    except (CdkdEdgeError, OSError, MemoryError) as error:
        return encode(failed(job, error, reach=WORKER))
    report = run_job(engine, job, progress)
    if report.error is not None and report.error.reach == ENGINE:
        station.release()
    return encode(replace(report, host=platform.node()))


def station_of(worker: Any) -> Station:
    """The station of a worker; it stays while the worker lives, so the next run finds its engine loaded."""
    with _making:
        station = getattr(worker, _STATIONS, None)
        if station is None:
            station = Station()
            setattr(worker, _STATIONS, station)
        return station


def stop_run(run: str) -> None:
    """End the jobs of a run on this worker with their next tile; they leave nothing."""
    _stopped.add(run)


def _throttled(run: str, tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        check()
        if run in _stopped:
            raise RunStoppedError("the run was stopped")
        now = time.monotonic()
        if now - last >= _TELL_EVERY_S:
            last = now
            tell(done, total)

    return progress


def main() -> None:
    """Do the jobs that stdin names, a line of JSON each; the end of stdin ends this process, whatever it does.

    Lines on stdout are JSON: ``done`` and ``total`` tiles of the job, or its ``report``.
    """
    end_on_signals()
    out = EventWriter.to_parent()
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(jobs,), daemon=True).start()
    station = Station()

    while True:
        job = decode(jobs.get(), Job)
        progress = _throttled("", lambda done, total: out.write(done=done, total=total))
        out.write(report=encode_report(station, job, progress))


def _hear(jobs: queue.SimpleQueue[str]) -> None:
    with os.fdopen(os.dup(0), encoding="utf-8") as lines:
        for line in lines:
            jobs.put(line)
    os.kill(os.getpid(), signal.SIGTERM)  # so that a job in work ends as if it had been asked to


if __name__ == "__main__":
    main()
