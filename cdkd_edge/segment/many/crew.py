"""What does jobs: this process or some like it (:mod:`.local`), or the workers of a scheduler (:mod:`.dask`).

Each worker gets one job, and the next when that is answered; so a worker that dies takes one job with it, and that job
alone is blamed.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol

from cdkd_edge.core.errors import EngineError, FleetError
from cdkd_edge.core.signals import check
from cdkd_edge.segment.many.jobs import ENGINE, SCENE, WORKER, Failure, Job, JobReport, failed

ATTEMPTS = 3
"""A job that was begun so often without an answer is not tried again: it may be what kills its workers."""

_STRIKES = 2
"""Failures of its engine in a row after which a worker gets no more jobs."""

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Answer:
    """The report of a job, by its place in the list of jobs."""

    index: int
    report: JobReport
    error: Exception | None = None
    """What was raised, if it was raised in this process."""


class Listener:
    """Is told what happens, always in the thread that runs the fleet; this one says nothing."""

    def start(self, scenes: int) -> None:
        """The run begins with so many scenes."""

    def begun(self, index: int, job: Job) -> None:
        """A job is being worked on."""

    def tiles(self, index: int, done: int, total: int) -> None:
        """Tiles of a job that are done. (May come from another thread, and often.)"""

    def finished(self, report: JobReport) -> None:
        """A job came to its end."""

    def note(self, text: str) -> None:
        """Something the user should know: a worker was lost, or none is there."""


class Crew(Protocol):
    """Does jobs; a context manager, which gets ready (and may fail) on entry."""

    def __enter__(self) -> Crew: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Who works, for the report."""

    def answers(self, jobs: Sequence[Job], listener: Listener) -> Generator[Answer, None, None]:
        """Do all jobs and yield each one's answer as soon as it is there, in any order, exactly once.

        The run ends early if whoever iterates stops doing so; jobs in work are then stopped.

        Raises:
            CdkdEdgeError: no job can be done any more.
        """


@dataclass
class Task:
    """A job that a worker has."""

    index: int
    job: Job
    worker: str
    future: Any
    """Of the answer; what it holds is the crew's business."""


class WorkerCrew:
    """A crew of workers, by name: who gets which job, and what follows from an answer or a worker's end.

    Args:
        patience: seconds to wait for a worker when there is none.
    """

    def __init__(self, patience: float = 60.0) -> None:
        self._patience = patience
        self._events: queue.SimpleQueue[Task | dict[str, Any]] = queue.SimpleQueue()
        """Tasks that are answered, and tiles that are done (index, attempt, done, total)."""
        self._refused: dict[str, Failure] = {}
        """Workers that get no more jobs, and why."""
        self._strikes: dict[str, int] = {}

    def _living(self) -> dict[str, str]:
        """Workers that are there, and what they do; only the ``running`` ones take jobs.

        Raises:
            FleetError: it cannot be known.
        """
        raise NotImplementedError

    def _submit(self, index: int, job: Job, worker: str) -> Task:
        """Give a job to a worker; the task is put into the events when it is answered."""
        raise NotImplementedError

    def _report(self, task: Task) -> JobReport | None:
        """The answer to a task; None if the worker was lost."""
        raise NotImplementedError

    def _serve(self, waiting: deque[tuple[int, Job]], busy: dict[str, Task], listener: Listener) -> Iterator[Answer]:
        """Give the waiting jobs to workers; yield the answers.

        Raises:
            FleetError: there has been no worker for some time.
            EngineError: there are workers, and none of them can do the jobs.
        """
        seen_worker = time.monotonic()
        while waiting or busy:
            check()
            living = self._living()
            for task in [task for task in busy.values() if task.worker not in living]:
                del busy[task.worker]
                if not task.future.done():  # an answer that came before the end counts
                    task.future.cancel()
                    listener.note(f"lost the worker {task.worker} while it labelled {task.job.scene}")
                    yield from self._again(waiting, task, _lost(task))
                else:
                    yield from self._answered(waiting, task, listener)
            usable = [worker for worker, status in living.items() if status == "running"]
            usable = [worker for worker in usable if worker not in self._refused]
            if usable or busy:
                seen_worker = time.monotonic()
            elif living.keys() <= self._refused.keys() and living:
                reasons = {failure.message: failure.hint for failure in self._refused.values()}
                raise EngineError(f"no worker can do this: {'; '.join(sorted(reasons))}", hint=min(reasons.items())[1])
            elif time.monotonic() - seen_worker > self._patience:
                raise FleetError(
                    f"there has been no worker for {self._patience:g} s",
                    hint="start some (dask worker ADDRESS --nthreads 1) and run the same command again",
                )
            for worker in usable:
                if waiting and worker not in busy:
                    index, job = waiting.popleft()
                    busy[worker] = self._submit(index, job, worker)
                    listener.begun(index, job)
            yield from self._listen(waiting, busy, listener)

    def _listen(self, waiting: deque[tuple[int, Job]], busy: dict[str, Task], listener: Listener) -> Iterator[Answer]:
        """Wait for what happens next, at most as long as may pass between two looks at the workers."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=_LOOK_EVERY_S)
            while True:
                if isinstance(event, Task):
                    if busy.get(event.worker) is event:  # else it was given up before
                        del busy[event.worker]
                        yield from self._answered(waiting, event, listener)
                elif any(
                    (event["index"], event["attempt"]) == (task.index, task.job.attempt) for task in busy.values()
                ):
                    listener.tiles(event["index"], event["done"], event["total"])
                event = self._events.get_nowait()

    def _answered(self, waiting: deque[tuple[int, Job]], task: Task, listener: Listener) -> Iterator[Answer]:
        """What follows from an answer: it is the job's, or the job is given to another worker."""
        report = self._report(task)
        if report is None:
            yield from self._again(waiting, task, _lost(task))
            return
        reach = report.error.reach if report.error else None
        if reach in (ENGINE, WORKER) and report.error:
            self._strikes[task.worker] = self._strikes.get(task.worker, 0) + 1
            if reach == WORKER or self._strikes[task.worker] >= _STRIKES:
                self._refused[task.worker] = report.error
                listener.note(f"no more scenes for the worker {task.worker}: {report.error.message}")
            if reach == WORKER:  # it was not begun, so this is no attempt
                waiting.appendleft((task.index, task.job))
            else:
                yield from self._again(waiting, task, report)
            return
        self._strikes.pop(task.worker, None)
        yield Answer(task.index, report)

    def _again(self, waiting: deque[tuple[int, Job]], task: Task, report: JobReport) -> Iterator[Answer]:
        """Another attempt, or the end of them."""
        if task.job.attempt < ATTEMPTS:
            waiting.appendleft((task.index, replace(task.job, attempt=task.job.attempt + 1)))
        elif report.error:
            yield Answer(task.index, replace(report, error=replace(report.error, reach=SCENE)))


def _lost(task: Task) -> JobReport:
    error = FleetError(
        f"{ATTEMPTS} workers were lost while they labelled it, the last one at {task.worker}",
        hint="too little memory kills without a word: try fewer workers on a machine",
    )
    return replace(failed(task.job, error), host=None)
