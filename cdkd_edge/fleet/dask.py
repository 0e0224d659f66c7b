"""Scenes to the workers of dask.distributed: those of a scheduler that runs somewhere, or some on this machine.

Each worker gets one job, and the next when that is answered; so a worker that dies takes one job with it, and that job
alone is blamed. (The scheduler itself would queue a second one on each worker, count its death against both, and give
a worker as many jobs as it has threads.) Scenes and label maps are read and written by the workers: the folders must
be shared, under the same paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import queue
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cdkd_edge.errors import EngineError, FleetError, MissingExtraError
from cdkd_edge.fleet.crew import Answer, Listener
from cdkd_edge.fleet.jobs import ENGINE, SCENE, WORKER, Job, JobReport, decode, encode, failed
from cdkd_edge.fleet.paths import as_named, on_the_wire, shared_folders
from cdkd_edge.fleet.worker import stop_run, work
from cdkd_edge.machine import available_cores

ATTEMPTS = 3
"""A job that was begun so often without an answer is not tried again: it may be what kills its workers."""

_STRIKES = 2
"""Failures of its engine in a row after which a worker gets no more jobs."""

_CONNECT_S = 15
_STOP_S = 5
_LOOK_EVERY_S = 1.0
_TO_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Task:
    """A job that a worker has."""

    index: int
    job: Job
    address: str
    future: Any


class DaskCrew:
    """Workers of dask.distributed. See :class:`.crew.Crew`.

    Args:
        address: of a scheduler, e.g. ``tcp://10.0.0.1:8786``; None: start workers on this machine.
        workers: how many to start.
        patience: seconds to wait for a worker when there is none.
    """

    def __init__(self, address: str | None = None, workers: int = 1, patience: float = 60.0) -> None:
        self._address, self._workers, self._patience = address, workers, patience
        self._run = f"cdkd-edge-{secrets.token_hex(6)}"
        self._open = contextlib.ExitStack()
        self._client: Any = None
        self._events: queue.SimpleQueue[_Task | dict[str, Any]] = queue.SimpleQueue()
        self._refused: dict[str, str] = {}
        """Workers that get no more jobs, and why."""
        self._strikes: dict[str, int] = {}

    def __enter__(self) -> DaskCrew:
        """Connect to the scheduler, or start one with its workers.

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
        with contextlib.ExitStack() as stack:
            try:
                address: Any = self._address
                if address is None:
                    with _ignoring_interrupts():  # ending in good order is ours to arrange
                        address = stack.enter_context(
                            distributed.LocalCluster(
                                n_workers=self._workers,
                                threads_per_worker=1,
                                memory_limit=0,  # memory is bounded by the pipeline, not by killing workers
                                dashboard_address=None,
                                silence_logs=logging.CRITICAL,
                            )
                        )
                self._client = stack.enter_context(
                    distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
                )
            except (
                OSError,
                ValueError,
                RuntimeError,
                asyncio.TimeoutError,
            ) as error:  # the last is another before 3.11
                raise FleetError(
                    f"no dask scheduler answers at {self._address or 'this machine'}: {str(error) or 'timed out'}",
                    hint="start one: dask scheduler",
                ) from None
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # whatever a scheduler that is gone makes of it
            self._open.close()

    def describe(self) -> dict[str, Any]:
        """See :meth:`.crew.Crew.describe`."""
        return {
            "kind": "dask" if self._address else "workers",
            "scheduler": self._client.scheduler.address,
            "workers": len(self._living()),
            "run": self._run,
        }

    def answers(self, jobs: Sequence[Job], listener: Listener) -> Generator[Answer, None, None]:
        """See :meth:`.crew.Crew.answers`.

        Raises:
            FleetError: the scheduler is gone, or there has been no worker for some time.
            EngineError: there are workers, and none of them can do the jobs.
        """
        self._client.subscribe_topic(self._run, lambda event: self._events.put(event[1]))
        with contextlib.ExitStack() as stack:
            tokens = stack.enter_context(shared_folders(jobs)) if self._address else {}
            waiting = deque(
                (index, on_the_wire(job, tokens.get(str(Path(job.output).parent)))) for index, job in enumerate(jobs)
            )
            busy: dict[str, _Task] = {}
            """By worker."""
            stack.callback(self._stop, busy)
            for answer in self._serve(waiting, busy, listener):
                original = jobs[answer.index]
                yield replace(answer, report=as_named(answer.report, original))

    def _serve(self, waiting: deque[tuple[int, Job]], busy: dict[str, _Task], listener: Listener) -> Iterator[Answer]:
        seen_worker = time.monotonic()
        while waiting or busy:
            living = self._living()
            for task in [task for task in busy.values() if task.address not in living]:
                del busy[task.address]
                if not task.future.done():  # an answer that came before the end counts
                    task.future.cancel()
                    listener.note(f"lost the worker {task.address} while it labelled {task.job.scene}")
                    yield from self._again(waiting, task, _lost(task))
                else:
                    yield from self._answered(waiting, task, listener)
            usable = [address for address, status in living.items() if status == "running"]
            usable = [address for address in usable if address not in self._refused]
            if usable or busy:
                seen_worker = time.monotonic()
            elif living.keys() <= self._refused.keys() and living:
                raise EngineError("no worker can do this: " + "; ".join(sorted(set(self._refused.values()))))
            elif time.monotonic() - seen_worker > self._patience:
                raise FleetError(
                    f"there has been no worker for {self._patience:g} s",
                    hint="start some (dask worker ADDRESS --nthreads 1) and run the same command again",
                )
            for address in usable:
                if waiting and address not in busy:
                    index, job = waiting.popleft()
                    busy[address] = self._submit(index, job, address)
                    listener.begun(index, job)
            yield from self._listen(waiting, busy, listener)

    def _listen(self, waiting: deque[tuple[int, Job]], busy: dict[str, _Task], listener: Listener) -> Iterator[Answer]:
        """Wait for what happens next, at most as long as may pass between two looks at the workers."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=_LOOK_EVERY_S)
            while True:
                if isinstance(event, _Task):
                    if busy.get(event.address) is event:  # else it was given up before
                        del busy[event.address]
                        yield from self._answered(waiting, event, listener)
                elif any(
                    (event["index"], event["attempt"]) == (task.index, task.job.attempt) for task in busy.values()
                ):
                    listener.tiles(event["index"], event["done"], event["total"])
                event = self._events.get_nowait()

    def _submit(self, index: int, job: Job, address: str) -> _Task:
        future = self._client.submit(
            work,
            self._run,
            index,
            encode(job),
            key=f"{self._run}-{index}-{job.attempt}",
            workers=[address],
            allow_other_workers=False,
            pure=False,
        )
        task = _Task(index, job, address, future)
        future.add_done_callback(lambda _: self._events.put(task))
        return task

    def _answered(self, waiting: deque[tuple[int, Job]], task: _Task, listener: Listener) -> Iterator[Answer]:
        """What follows from an answer: it is the job's, or the job is given to another worker."""
        if task.future.status in ("cancelled", "lost"):  # the scheduler forgot it
            yield from self._again(waiting, task, _lost(task))
            return
        try:
            report = decode(task.future.result(timeout=_CONNECT_S), JobReport)
        except Exception as error:  # whatever was raised on the way
            if type(error).__name__ == "KilledWorker":  # a worker that came back under its address, several times
                yield from self._again(waiting, task, _lost(task))
                return
            # Most likely the package is not installed there.
            answer = FleetError(f"{task.address}: {type(error).__name__}: {error}")
            report = replace(failed(task.job, answer, reach=WORKER), host=None)
        reach = report.error.reach if report.error else None
        if reach in (ENGINE, WORKER) and report.error:
            self._strikes[task.address] = self._strikes.get(task.address, 0) + 1
            if reach == WORKER or self._strikes[task.address] >= _STRIKES:
                self._refused[task.address] = report.error.message
                listener.note(f"no more scenes for the worker {task.address}: {report.error.message}")
            if reach == WORKER:  # it was not begun, so this is no attempt
                waiting.appendleft((task.index, task.job))
            else:
                yield from self._again(waiting, task, report)
            return
        self._strikes.pop(task.address, None)
        yield Answer(task.index, report)

    def _again(self, waiting: deque[tuple[int, Job]], task: _Task, report: JobReport) -> Iterator[Answer]:
        """Another attempt, or the end of them."""
        if task.job.attempt < ATTEMPTS:
            waiting.appendleft((task.index, replace(task.job, attempt=task.job.attempt + 1)))
        elif report.error:
            yield Answer(task.index, replace(report, error=replace(report.error, reach=SCENE)))

    def _living(self) -> dict[str, str]:
        """Addresses of the workers that are there, and what they do; only the ``running`` ones take jobs.

        Raises:
            FleetError: the scheduler does not answer.
        """
        try:
            workers = self._client.sync(self._client.scheduler.identity, callback_timeout=_CONNECT_S)["workers"]
        except Exception as error:  # of several libraries below
            raise FleetError(
                f"lost the dask scheduler: {str(error) or type(error).__name__}",
                hint="start it and run the same command again; what is finished is kept",
            ) from None
        return {address: worker.get("status", "running") for address, worker in workers.items()}

    def _stop(self, busy: dict[str, _Task]) -> None:
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


def worker_threads(workers: int) -> int:
    """CPU threads per engine if so many share this machine."""
    return max(1, available_cores() // workers)


def _lost(task: _Task) -> JobReport:
    error = FleetError(
        f"{ATTEMPTS} workers were lost while they labelled it, the last one at {task.address}",
        hint="see what their logs say; too little memory kills without a word",
    )
    return replace(failed(task.job, error), host=None)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that are started in the block ignore what a terminal or a job scheduler sends to all at once."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _TO_ALL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
