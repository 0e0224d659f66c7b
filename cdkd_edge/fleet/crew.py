"""What does jobs: this process (:mod:`.local`) or the workers of a scheduler (:mod:`.dask`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from cdkd_edge.fleet.jobs import Job, JobReport


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

        The run ends early if whoever iterates stops doing so; jobs in work are then stopped, and leave nothing.

        Raises:
            CdkdEdgeError: no job can be done any more.
        """
