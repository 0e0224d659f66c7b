"""Scenes one after the other through one engine, in this process."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cdkd_edge.engines.load import load_engine
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.fleet.crew import Answer, Listener
from cdkd_edge.fleet.jobs import EngineRef, Job, do_job, failed


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
