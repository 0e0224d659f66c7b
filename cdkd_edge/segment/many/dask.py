"""Scenes to the workers of a scheduler of dask.distributed, on this machine or others.

The scheduler is not left to queue jobs: it would give a second one to each worker, count its death against both, and
give a worker as many jobs as it has threads. Scenes and label maps are read and written by the workers: the folders
must be shared, under the same paths.

Paths as the command has them and as workers see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cdkd_edge.core.errors import FleetError, MissingExtraError
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.segment.many.crew import Answer, Listener, Task, WorkerCrew
from cdkd_edge.segment.many.jobs import WORKER, EngineRef, Job, JobReport, decode, encode, failed
from cdkd_edge.segment.many.worker import stop_run, work
from cdkd_edge.segment.outputs import confidence_path


def _absolute_engine(engine: EngineRef) -> EngineRef:
    """The engine under a path that a worker finds, wherever it was started."""
    return replace(engine, path=os.path.abspath(engine.path))  # noqa: PTH100 - links stay as they are


def on_the_wire(job: Job, token: str | None) -> Job:
    """A job as a worker gets it, wherever that was started."""
    scene = job.scene if is_gdal_name(job.scene) else os.path.abspath(job.scene)  # noqa: PTH100
    output = os.path.abspath(job.output)  # noqa: PTH100
    options = job.options
    if options.aoi is not None and Path(options.aoi).exists():  # else it is a box
        options = replace(options, aoi=os.path.abspath(options.aoi))  # noqa: PTH100
    engine = _absolute_engine(job.engine)
    return replace(job, scene=scene, output=output, engine=engine, options=options, token=token)


def as_named(report: JobReport, job: Job) -> JobReport:
    """The report with the paths that the user gave."""
    result = report.result
    if result is not None:
        confidence = confidence_path(Path(job.output)) if result.confidence else None
        result = replace(result, output=Path(job.output), confidence=confidence)
    kept = replace(report.kept, output=Path(job.output)) if report.kept else None
    folder = Path(job.output).parent
    products = {name: str(folder / Path(path).name) for name, path in report.products.items()}
    return replace(report, scene=job.scene, output=job.output, result=result, kept=kept, products=products)


@contextlib.contextmanager
def shared_folders(jobs: Sequence[Job]) -> Iterator[dict[str, str]]:
    """Put a file into each output folder by which workers know that it is the same folder; by folder, as given."""
    name = f".{secrets.token_hex(8)}.cdkd-edge-run"
    tokens: dict[str, str] = {}
    made: list[Path] = []
    try:
        for folder in {str(Path(job.output).parent) for job in jobs}:
            place = Path(os.path.abspath(folder))  # noqa: PTH100
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


_CONNECT_S = 15
_STOP_S = 5


class DaskCrew(WorkerCrew):
    """Workers of dask.distributed. See :class:`.crew.Crew`.

    Args:
        address: of a scheduler, e.g. ``tcp://10.0.0.1:8786``.
        patience: seconds to wait for a worker when there is none.
    """

    def __init__(self, address: str, patience: float = 60.0) -> None:
        super().__init__(patience)
        self._address = address
        self._run = f"cdkd-edge-{secrets.token_hex(6)}"
        self._client: Any = None

    def __enter__(self) -> DaskCrew:
        """Connect to the scheduler.

        Raises:
            MissingExtraError: dask.distributed is not installed.
            FleetError: no scheduler answers.
        """
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError:
            raise MissingExtraError("dask.distributed", "dask", "spreading scenes over workers") from None
        # Lost workers are our own to report; its log would repeat them with tracebacks.
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # whatever a scheduler that is gone makes of it
            self._client.close()

    def describe(self) -> dict[str, Any]:
        """See :meth:`.crew.Crew.describe`."""
        return {
            "kind": "dask",
            "scheduler": self._client.scheduler.address,
            "workers": len(self._living()),
            "run": self._run,
        }

    def answers(self, jobs: Sequence[Job], listener: Listener) -> Generator[Answer, None, None]:
        """See :meth:`.crew.Crew.answers`.

        Raises:
            FleetError, EngineError: of the dispatch; also where the scheduler is gone.
        """
        self._client.subscribe_topic(self._run, lambda event: self._events.put(event[1]))
        with contextlib.ExitStack() as stack:
            tokens = stack.enter_context(shared_folders(jobs))
            waiting = deque(
                (index, on_the_wire(job, tokens.get(str(Path(job.output).parent)))) for index, job in enumerate(jobs)
            )
            busy: dict[str, Task] = {}
            """By worker."""
            stack.callback(self._stop, busy)
            for answer in self._serve(waiting, busy, listener):
                original = jobs[answer.index]
                yield replace(answer, report=as_named(answer.report, original))

    def _submit(self, index: int, job: Job, worker: str) -> Task:
        future = self._client.submit(
            work,
            self._run,
            index,
            encode(job),
            key=f"{self._run}-{index}-{job.attempt}",
            workers=[worker],
            allow_other_workers=False,
            pure=False,
        )
        task = Task(index, job, worker, future)
        future.add_done_callback(lambda _: self._events.put(task))
        return task

    def _report(self, task: Task) -> JobReport | None:
        if task.future.status in ("cancelled", "lost"):  # the scheduler forgot it
            return None
        try:
            return decode(task.future.result(timeout=_CONNECT_S), JobReport)
        except Exception as error:  # whatever was raised on the way
            if type(error).__name__ == "KilledWorker":  # a worker that came back under its address, several times
                return None
            # Most likely the package is not installed there.
            answer = FleetError(f"{task.worker}: {type(error).__name__}: {error}")
            return replace(failed(task.job, answer, reach=WORKER), host=None)

    def _living(self) -> dict[str, str]:
        try:
            workers = self._client.sync(self._client.scheduler.identity, callback_timeout=_CONNECT_S)["workers"]
        except Exception as error:  # of several libraries below
            raise FleetError(
                f"lost the dask scheduler: {str(error) or type(error).__name__}",
                hint="start it and run the same command again; what is finished is kept",
            ) from None
        return {address: worker.get("status", "running") for address, worker in workers.items()}

    def _stop(self, busy: dict[str, Task]) -> None:
        """End what is still in work; a job that cannot be told comes to its end unheard."""
        if not busy:
            return

        def tell() -> None:
            with contextlib.suppress(Exception):
                self._client.run(stop_run, self._run, workers=list(busy), on_error="ignore")

        # In a thread, because a worker that hangs would never answer.
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(_STOP_S)
        for task in busy.values():
            with contextlib.suppress(Exception):
                task.future.cancel()
