"""Gives jobs to workers: this process, processes on this machine, or (:mod:`.dask`) the workers of a scheduler.

Each worker gets one job, and the next one when it has answered. So a worker that dies takes one job with it, and only
that job is blamed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cdkd_edge.core.errors import EngineError, FleetError
from cdkd_edge.core.process import end_children, events, module_command, start_child
from cdkd_edge.core.signals import check
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segmentation.jobs import EngineRef, Failure, Job, JobReport, Reach, decode, encode
from cdkd_edge.segmentation.worker import run_job

ATTEMPTS = 3  # a job that was begun so often without an answer is not tried again: it may be what kills its workers
_ENGINE_FAILURES = 2  # a worker whose engine fails so often in a row gets no more jobs
_CHECK_EVERY_S = 1.0
_END_S = 10  # how long processes may take to leave their scenes in good order


class Answer(NamedTuple):
    """The report of a job."""

    job: int  # its index
    report: JobReport
    error: Exception | None = None  # what was raised, if it was raised in this process


class RunObserver:
    """Hears what happens in a run, in the thread that runs it. This one ignores it."""

    def begun(self, index: int, job: Job) -> None:
        """A worker begins a job."""

    def tiles(self, index: int, done: int, total: int) -> None:
        """Tiles of a job are done. (May come often, and from another thread.)"""

    def finished(self, report: JobReport) -> None:
        """A job has its final report."""

    def note(self, text: str) -> None:
        """Something the user should know: a worker was lost, or there is none."""


class Workers(contextlib.AbstractContextManager["Workers"]):
    """Whatever does jobs; a context manager that gets ready on entry, which may fail."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description  # who works, for the report
        self.begun: dict[int, int] = {}  # attempts of each job that was begun, by its index

    def __exit__(self, *error: object) -> None:
        """End what was started."""

    def answers(self, jobs: Sequence[Job], observer: RunObserver) -> Generator[Answer, None, None]:
        """Do all jobs and yield the answer of each exactly once, as soon as it is there, in any order.

        The run ends early if the caller stops iterating; jobs in progress are then stopped. Raises a CdkdEdgeError if
        no job can be done any more.
        """
        raise NotImplementedError

    def _begin(self, index: int, job: Job, observer: RunObserver) -> None:
        self.begun[index] = job.attempt
        observer.begun(index, job)


class InProcess(Workers):
    """This process, with one engine."""

    def __init__(self, engine: EngineRef) -> None:
        super().__init__({"kind": "local"})
        self._engine = engine

    def answers(self, jobs: Sequence[Job], observer: RunObserver) -> Generator[Answer, None, None]:
        """See :meth:`Workers.answers`; raises ManifestError or EngineError if the engine cannot be loaded."""
        with contextlib.closing(load_engine(Path(self._engine.path), threads=self._engine.threads)) as engine:
            for index, job in enumerate(jobs):
                self._begin(index, job, observer)
                yield Answer(index, *run_job(engine, job, partial(observer.tiles, index), observer.note))


@dataclass
class Task:
    """A job that a worker has."""

    index: int
    job: Job
    worker: str
    future: Any  # of the answer, in the form that the pool's workers give it


class WorkerPool(Workers):
    """Several workers, known by name: gives jobs to them and handles their answers, failures and deaths.

    ``patience``: seconds to wait for a worker when there is none.
    """

    def __init__(self, description: dict[str, Any], patience: float = 60.0) -> None:
        super().__init__(description)
        self._patience = patience
        self._waiting: deque[tuple[int, Job]] = deque()
        self._busy: dict[str, Task] = {}  # the task of each worker that has one
        # Tasks that are answered, and tiles that are done (index, attempt, done, total).
        self._events: queue.SimpleQueue[Task | dict[str, Any]] = queue.SimpleQueue()
        self._refused: dict[str, Failure] = {}  # workers that get no more jobs, and why
        self._engine_failures: dict[str, int] = {}

    def _living(self) -> dict[str, str]:
        """The state of each worker; only those that are ``running`` take jobs. Raises FleetError if it is unknown."""
        raise NotImplementedError

    def _submit(self, index: int, job: Job, worker: str) -> Task:
        """Give a job to a worker. The task goes into the events when it is answered."""
        raise NotImplementedError

    def _report(self, task: Task) -> JobReport | None:
        """The answer to a task; None if the worker was lost."""
        raise NotImplementedError

    def answers(self, jobs: Sequence[Job], observer: RunObserver) -> Generator[Answer, None, None]:
        """See :meth:`Workers.answers`.

        Raises FleetError if there has been no worker for some time, EngineError if none of them can do the jobs.
        """
        self._waiting.extend(enumerate(jobs))
        seen_worker = time.monotonic()
        while self._waiting or self._busy:
            check()
            living = self._living()
            for task in [task for task in self._busy.values() if task.worker not in living]:
                del self._busy[task.worker]
                if task.future.done():  # it answered before it died
                    yield from self._handle(task, observer)
                else:
                    task.future.cancel()
                    observer.note(f"lost the worker {task.worker} while it labelled {task.job.scene}")
                    yield from self._retry(task)
            usable = [name for name, state in living.items() if state == "running" and name not in self._refused]
            if usable or self._busy:
                seen_worker = time.monotonic()
            elif living and living.keys() <= self._refused.keys():
                reasons = {failure.message: failure.hint for failure in self._refused.values()}
                raise EngineError(f"no worker can do this: {'; '.join(sorted(reasons))}", hint=min(reasons.items())[1])
            elif time.monotonic() - seen_worker > self._patience:
                raise FleetError(
                    f"there has been no worker for {self._patience:g} s",
                    hint="start some (dask worker ADDRESS --nthreads 1) and run the same command again",
                )
            for worker in usable:
                if self._waiting and worker not in self._busy:
                    index, job = self._waiting.popleft()
                    self._busy[worker] = self._submit(index, job, worker)
                    self._begin(index, job, observer)
            yield from self._wait(observer)

    def _wait(self, observer: RunObserver) -> Iterator[Answer]:
        """Handle the next events; returns after a second without any, to check the workers."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=_CHECK_EVERY_S)
            while True:
                if isinstance(event, Task):
                    if self._busy.get(event.worker) is event:  # else it was given up
                        del self._busy[event.worker]
                        yield from self._handle(event, observer)
                elif (event["index"], event["attempt"]) in {(t.index, t.job.attempt) for t in self._busy.values()}:
                    observer.tiles(event["index"], event["done"], event["total"])
                event = self._events.get_nowait()

    def _handle(self, task: Task, observer: RunObserver) -> Iterator[Answer]:
        """Yield the answer to a task, or give its job to another worker."""
        report = self._report(task)
        error = report.error if report else None
        if report is None:
            yield from self._retry(task)
        elif error is None or error.reach not in (Reach.ENGINE, Reach.WORKER):
            self._engine_failures.pop(task.worker, None)
            yield Answer(task.index, report)
        else:
            self._engine_failures[task.worker] = self._engine_failures.get(task.worker, 0) + 1
            if error.reach == Reach.WORKER or self._engine_failures[task.worker] >= _ENGINE_FAILURES:
                self._refused[task.worker] = error
                observer.note(f"no more scenes for the worker {task.worker}: {error.message}")
            if error.reach == Reach.WORKER:  # the job was not begun, so this is no attempt
                self._waiting.appendleft((task.index, task.job))
            else:
                yield from self._retry(task, report)

    def _retry(self, task: Task, report: JobReport | None = None) -> Iterator[Answer]:
        """Put a job back for another attempt; after the last one yield its report (None: its worker was lost)."""
        if task.job.attempt < ATTEMPTS:
            self._waiting.appendleft((task.index, replace(task.job, attempt=task.job.attempt + 1)))
            return
        lost = FleetError(
            f"{ATTEMPTS} workers were lost while they labelled it, the last one at {task.worker}",
            hint="the system may have killed them for lack of memory: try fewer workers on a machine",
        )
        report = report or JobReport.failed(task.job, lost, host=None)
        assert report.error is not None
        yield Answer(task.index, replace(report, error=replace(report.error, reach=Reach.SCENE)))


class ProcessPool(WorkerPool):
    """So many processes on this machine, each with its own engine. One that dies is replaced."""

    def __init__(self, workers: int) -> None:
        super().__init__({"kind": "workers", "workers": workers})
        self._count = workers
        self._workers: dict[str, _Process] = {}

    def __exit__(self, *error: object) -> None:
        """End the processes."""
        end_children([worker.process for worker in self._workers.values()], _END_S)

    def _living(self) -> dict[str, str]:
        self._workers = {name: worker for name, worker in self._workers.items() if worker.process.poll() is None}
        while len(self._workers) < self._count:
            worker = _Process(self._events)
            self._workers[f"process {worker.process.pid}"] = worker
        return dict.fromkeys(self._workers, "running")

    def _submit(self, index: int, job: Job, worker: str) -> Task:
        return self._workers[worker].give(Task(index, job, worker, Future()))

    def _report(self, task: Task) -> JobReport | None:
        return decode(task.future.result(), JobReport)


class _Process:
    """One process of a pool, and a thread that reads its answers."""

    def __init__(self, queued: queue.SimpleQueue[Any]) -> None:
        self._queued = queued
        self._task: Task | None = None
        self.process = start_child(module_command("cdkd_edge.segmentation.worker"))
        threading.Thread(target=self._read, daemon=True).start()

    def give(self, task: Task) -> Task:
        """Have it do a job. If it has just died, the task stays without an answer."""
        self._task = task
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(encode(task.job).encode() + b"\n")
            self.process.stdin.flush()
        return task

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for event in events(lines):
                task = self._task
                assert task is not None
                if "report" in event:
                    task.future.set_result(event["report"])
                    self._queued.put(task)
                else:
                    self._queued.put({"index": task.index, "attempt": task.job.attempt, **event})
        self.process.wait()
        self._queued.put({"index": -1, "attempt": 0})  # wakes the dispatcher, which then sees that it has ended
