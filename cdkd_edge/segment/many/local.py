"""Scenes on this machine: one after the other in this process, or several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from cdkd_edge.core.process import end_children, events, module_command, start_child
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.engines.runtimes import load_engine
from cdkd_edge.segment.many.crew import Answer, Listener, Task, WorkerCrew
from cdkd_edge.segment.many.jobs import EngineRef, Job, JobReport, decode, do_job, encode, failed

_COMMAND = module_command("cdkd_edge.segment.many.worker")
_STOP_S = 10
"""How long processes may take to leave their scenes in order."""


class LocalCrew:
    """This process and one engine. See :class:`.crew.Crew`."""

    def __init__(self, engine: EngineRef) -> None:
        self._ref = engine
        self._engine: Labeller | None = None

    def __enter__(self) -> LocalCrew:
        """Load the engine.

        Raises:
            ManifestError: the engine is not what its manifest says.
            EngineError: it does not run here.
        """
        self._engine = load_engine(Path(self._ref.path), threads=self._ref.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()

    def describe(self) -> dict[str, Any]:
        """See :meth:`.crew.Crew.describe`."""
        return {"kind": "local"}

    def answers(self, jobs: Sequence[Job], listener: Listener) -> Generator[Answer, None, None]:
        """See :meth:`.crew.Crew.answers`."""
        assert self._engine is not None, "used outside its with block"
        for index, job in enumerate(jobs):
            listener.begun(index, job)
            started = time.perf_counter()

            def progress(done: int, total: int, index: int = index) -> None:
                listener.tiles(index, done, total)

            error: Exception | None = None
            try:
                report = do_job(self._engine, job, progress, listener.note)
            except Exception as caught:
                error = caught
                report = failed(job, caught, time.perf_counter() - started, self._engine.artefact.sha256)
            yield Answer(index, report, error)


class ProcessCrew(WorkerCrew):
    """Processes on this machine, each with its own engine. See :class:`.crew.Crew`.

    One that dies is replaced.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._count = workers
        self._workers: dict[str, _Process] = {}

    def __enter__(self) -> ProcessCrew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_children([worker.process for worker in self._workers.values()], _STOP_S)

    def describe(self) -> dict[str, Any]:
        """See :meth:`.crew.Crew.describe`."""
        return {"kind": "workers", "workers": self._count}

    def answers(self, jobs: Sequence[Job], listener: Listener) -> Generator[Answer, None, None]:
        """See :meth:`.crew.Crew.answers`.

        Raises:
            EngineError: none of the processes can do the jobs.
            OSError: no process can be started.
        """
        yield from self._serve(deque(enumerate(jobs)), {}, listener)

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
    """One process of a :class:`ProcessCrew`, and a thread that listens to it."""

    def __init__(self, events: queue.SimpleQueue[Any]) -> None:
        self._events = events
        self._task: Task | None = None
        self.process = start_child(_COMMAND)
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, task: Task) -> Task:
        """Have it do a job. One that has just died leaves the task unanswered."""
        self._task = task
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(encode(task.job).encode() + b"\n")
            self.process.stdin.flush()
        return task

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for said in events(lines):
                task = self._task
                assert task is not None
                if "report" in said:
                    task.future.set_result(said["report"])
                    self._events.put(task)
                else:
                    self._events.put({"index": task.index, "attempt": task.job.attempt, **said})
        self.process.wait()
        self._events.put({"index": -1, "attempt": 0})  # so that its end is seen at once
