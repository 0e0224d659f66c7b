"""Gives jobs to the workers of a dask.distributed scheduler, on this machine or others.

The scheduler does not queue jobs itself: it would give each worker a second one, blame both when the worker dies, and
run as many at once as a worker has threads. The workers read scenes and write label maps themselves, so the folders
must be shared, under the same paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdkd_edge.core.errors import FleetError, MissingExtraError
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.segmentation.dispatch import Answer, RunObserver, Task, WorkerPool
from cdkd_edge.segmentation.jobs import Job, JobReport, Reach, decode, encode
from cdkd_edge.segmentation.outputs import confidence_path
from cdkd_edge.segmentation.worker import WorkerEngine, send_progress

_CONNECT_S = 15
_STOP_S = 5


class DaskPool(WorkerPool):
    """Workers of the dask.distributed scheduler at an address, e.g. ``tcp://10.0.0.1:8786``."""

    def __init__(self, address: str, patience: float = 60.0) -> None:
        self._run = f"cdkd-edge-{secrets.token_hex(6)}"
        super().__init__({"kind": "dask", "scheduler": address, "workers": 0, "run": self._run}, patience)
        self._address = address
        self._client: Any = None

    def __enter__(self) -> DaskPool:
        """Connect to the scheduler.

        Raises MissingExtraError if dask.distributed is not installed, FleetError if no scheduler answers.
        """
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError:
            raise MissingExtraError("dask.distributed", "dask", "spreading scenes over workers") from None
        # Lost workers are reported here; its log would repeat them with tracebacks.
        for name in list(logging.root.manager.loggerDict):  # each has a level of its own
            if name.split(".")[0] == "distributed":
                logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._client = distributed.Client(self._address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, RuntimeError, asyncio.TimeoutError) as error:  # the last is another before 3.11
            raise FleetError(
                f"no dask scheduler answers at {self._address}: {str(error) or 'timed out'}",
                hint="start one: dask scheduler",
            ) from None
        self.description |= {"scheduler": self._client.scheduler.address, "workers": len(self._living())}
        return self

    def __exit__(self, *error: object) -> None:
        """Disconnect."""
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self._client.close()

    def answers(self, jobs: Sequence[Job], observer: RunObserver) -> Generator[Answer, None, None]:
        """See :meth:`.dispatch.WorkerPool.answers`; also raises FleetError if the scheduler is gone."""
        self._client.subscribe_topic(self._run, lambda event: self._events.put(event[1]))
        with _tokens(jobs) as tokens:
            try:
                for answer in super().answers([_for_worker(job, tokens) for job in jobs], observer):
                    yield answer._replace(report=_with_given_paths(answer.report, jobs[answer.job]))
            finally:
                self._stop()

    def _submit(self, index: int, job: Job, worker: str) -> Task:
        key = f"{self._run}-{index}-{job.attempt}"
        where = {"workers": [worker], "allow_other_workers": False}
        future = self._client.submit(do_remotely, self._run, index, encode(job), key=key, pure=False, **where)
        task = Task(index, job, worker, future)
        future.add_done_callback(lambda _: self._events.put(task))
        return task

    def _report(self, task: Task) -> JobReport | None:
        if task.future.status in ("cancelled", "lost"):  # the scheduler forgot it
            return None
        try:
            return decode(task.future.result(timeout=_CONNECT_S), JobReport)
        except Exception as error:  # whatever was raised on the way
            if type(error).__name__ == "KilledWorker":  # it died and came back under its address, several times
                return None
            # Most likely the package is not installed there.
            answer = FleetError(f"{task.worker}: {type(error).__name__}: {error}")
            return JobReport.failed(task.job, answer, Reach.WORKER, host=None)

    def _living(self) -> dict[str, str]:
        try:
            workers = self._client.sync(self._client.scheduler.identity, callback_timeout=_CONNECT_S)["workers"]
        except Exception as error:  # of several libraries below
            raise FleetError(
                f"lost the dask scheduler: {str(error) or type(error).__name__}",
                hint="start it and run the same command again; what is finished is kept",
            ) from None
        return {address: worker.get("status", "running") for address, worker in workers.items()}

    def _stop(self) -> None:
        """End the jobs in progress; one that cannot be cancelled finishes and its result is dropped."""
        if not self._busy:
            return

        def stop() -> None:
            with contextlib.suppress(Exception):
                self._client.run(stop_run, self._run, workers=list(self._busy), on_error="ignore")

        # In a thread, because a worker that hangs would never answer.
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        thread.join(_STOP_S)
        for task in self._busy.values():
            with contextlib.suppress(Exception):
                task.future.cancel()


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - links stay as they are


def _for_worker(job: Job, tokens: dict[str, str]) -> Job:
    """A job with absolute paths: workers run in other folders."""
    options = job.options
    if options.aoi is not None and Path(options.aoi).exists():  # else it is a box
        options = replace(options, aoi=_absolute(options.aoi))
    scene = job.scene if is_gdal_name(job.scene) else _absolute(job.scene)
    engine, token = replace(job.engine, path=_absolute(job.engine.path)), tokens.get(str(Path(job.output).parent))
    return replace(job, scene=scene, output=_absolute(job.output), engine=engine, options=options, token=token)


def _with_given_paths(report: JobReport, job: Job) -> JobReport:
    """A worker's report with the paths that the user gave."""
    result = report.result
    if result is not None:
        confidence = confidence_path(Path(job.output)) if result.confidence else None
        result = replace(result, output=Path(job.output), confidence=confidence)
    kept = replace(report.kept, output=Path(job.output)) if report.kept else None
    folder = Path(job.output).parent
    products = {name: str(folder / Path(path).name) for name, path in report.products.items()}
    return replace(report, scene=job.scene, output=job.output, result=result, kept=kept, products=products)


@contextlib.contextmanager
def _tokens(jobs: Sequence[Job]) -> Iterator[dict[str, str]]:
    """Put a file into each output folder, by which workers know that they see the same folder."""
    name = f".{secrets.token_hex(8)}.cdkd-edge-run"
    tokens: dict[str, str] = {}
    made: list[Path] = []
    try:
        for folder in {str(Path(job.output).parent) for job in jobs}:
            place = Path(_absolute(folder))
            if not place.exists():
                place.mkdir(parents=True)
                made.append(place)
            (place / name).touch()
            tokens[folder] = str(place / name)
        yield tokens
    finally:
        for token in tokens.values():
            with contextlib.suppress(OSError):
                Path(token).unlink()
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()  # if nothing came into it


_engine_lock = threading.Lock()
_stopped_runs: set[str] = set()


def do_remotely(run: str, index: int, payload: str) -> str:
    """Do a job (JSON): the task that the scheduler gives to a worker. Returns the report as JSON, failures included.

    The tiles that are done are logged under the topic ``run``, with the job's ``index`` in the run.
    """
    from distributed import get_worker

    job = decode(payload, Job)
    worker = get_worker()
    with _engine_lock:
        # It stays while the worker lives, so that the next run finds its engine loaded.
        if not hasattr(worker, "cdkd_edge_engine"):
            worker.cdkd_edge_engine = WorkerEngine()
    engine: WorkerEngine = worker.cdkd_edge_engine

    def send(done: int, total: int) -> None:
        worker.log_event(run, {"index": index, "attempt": job.attempt, "done": done, "total": total})

    with engine.lock:
        return engine.answer(job, send_progress(send, lambda: require_running(run)))


def stop_run(run: str) -> None:
    """End the jobs of a run on this worker with their next tile."""
    _stopped_runs.add(run)


def require_running(run: str) -> None:
    """Raise :class:`FleetError` if the run was stopped; nobody waits for the result of the job."""
    if run in _stopped_runs:
        raise FleetError("the run was stopped")
