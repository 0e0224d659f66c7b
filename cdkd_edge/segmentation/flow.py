"""Moves tiles through reading threads, the engine (in the calling thread) and a writing thread.

The reading threads share one list of jobs, taken in order: read a cell of the file, or cut a batch of tiles into the
engine's slot ``number % slots``. The list reads a few batches ahead, so that cells are there when their tiles are cut.
Batches are computed and written in the order of their numbers, however many threads there are. Memory holds the cells
under a row of tiles and those few batches, and the engine's slots. An error in any thread stops all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.read import INVALID_FILL, SceneReader
from cdkd_edge.segmentation.plan import Cell, CellLayout, Cells, PlannedTile, TilePlan, cut_tile

AHEAD = 4  # batches beyond the engine's slots for which cells are read early
_MOST_PLACES = 1024  # of a batch; reached only far outside an area of interest, where no tile is computed

Mask = npt.NDArray[np.bool_]


class Merge(Protocol):
    """Takes the computed tiles, in the writing thread and in the order of the plan."""

    blends: bool  # whether all of a tile counts, so that it is computed if any pixel is valid, not only a kept one

    def add(self, place: PlannedTile, slot: int | None, index: int, valid: Mask | None) -> None:
        """Take a tile, which the engine holds at ``slot`` and ``index``; slot None: not computed, without valid pixel.

        ``valid`` is ``[T, T]``, or None where every pixel is valid.
        """


@dataclass
class RunTotals:
    """Totals of one pass over a scene."""

    tiles_without_data: int = 0
    engine_seconds: float = 0.0
    # Seconds by part of the work, added over threads.
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "cut", "merge"), 0.0))


@dataclass
class _Batch:
    """Up to N tiles for one slot, and the tiles between them that need not be computed."""

    number: int
    places: list[PlannedTile] = field(default_factory=list)
    cells: list[list[Cell]] = field(default_factory=list)
    valid: list[Mask | None] = field(default_factory=list)
    empty: list[bool] = field(default_factory=list)


class _StoppedError(Exception):
    """Another thread failed; its error is the one to show."""


class ThreadGroup:
    """Threads that wait for one another on one condition, and stop together at the first error."""

    def __init__(self) -> None:
        self.turn = threading.Condition()  # guards what the threads share; notified when any of it changes
        self._threads: list[threading.Thread] = []
        self._ended = 0
        self._stopped = False
        self._error: BaseException | None = None

    def start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Run ``work`` in a thread; an exception in it stops the group."""
        thread = threading.Thread(target=self._run, args=(work, *arguments), name=name)
        thread.start()
        self._threads.append(thread)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``, with ``turn`` held; end this thread's work if the group is stopped."""
        self.require_running()
        while not ready():
            self.turn.wait()
            self.require_running()

    def require_running(self) -> None:
        """End this thread's work if the group is stopped; call it with ``turn`` held."""
        if self._stopped:
            raise _StoppedError

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work`` in this thread beside the others, and wait for all; raise the first error of any."""
        try:
            work()
            self.join()
        except _StoppedError:
            pass
        except BaseException:
            self.stop()
            raise
        finally:
            self.join()
        self.raise_error()

    def stop(self, error: BaseException | None = None) -> None:
        """Make all threads end soon, because of ``error`` if there is one."""
        with self.turn:
            if not self._stopped:
                self._error = error
            self._stopped = True
            self.turn.notify_all()

    def join(self) -> None:
        """Wait for all threads to end."""
        # Not by Thread.join() alone: when Ctrl-C interrupts it, Python up to 3.12 takes the thread for finished.
        with self.turn:
            while self._ended < len(self._threads):
                self.turn.wait()
        for thread in self._threads:
            thread.join()

    def raise_error(self) -> None:
        """Raise the error that stopped the group, if any."""
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except _StoppedError:
            pass
        except BaseException as error:
            self.stop(error)
        finally:
            with self.turn:
                self._ended += 1
                self.turn.notify_all()


class Flow:
    """One pass over a plan.

    ``readers`` are the scene, opened once for each reading thread; ``start`` rows of tiles of the plan are already
    done. ``progress`` is called with tiles done and tiles in all, from the writing thread.
    """

    def __init__(
        self,
        engine: Labeller,
        readers: Sequence[SceneReader],
        plan: TilePlan,
        merge: Merge,
        *,
        start: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.totals = RunTotals()
        self._engine, self._readers, self._plan, self._merge = engine, readers, plan, merge
        self._start, self._progress = start, progress
        self._layout = CellLayout.of(readers[0])
        self._cells = Cells(self._layout, plan, start)
        self._jobs = self._job_list()
        self._threads = ThreadGroup()
        self._turn = self._threads.turn
        self._filled: dict[int, _Batch] = {}
        self._computed: deque[_Batch] = deque()
        self._released = 0  # batches whose slots are free again
        self._batches: int | None = None  # known when all are cut
        self._all_computed = False

    def run(self) -> RunTotals:
        """Run to the end, or raise the first error of any thread after all have stopped."""
        self._threads.run(self._label)
        return self.totals

    def _job_list(self) -> Iterator[Cell | _Batch]:
        waiting: deque[_Batch] = deque()
        for batch in self._grouped():
            for place in batch.places:
                cells, new = self._cells.of(place) if place.wanted else ([], [])
                batch.cells.append(cells)
                yield from new
            waiting.append(batch)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        self._batches = waiting[-1].number + 1 if waiting else 0
        yield from waiting

    def _grouped(self) -> Iterator[_Batch]:
        batch, count = _Batch(0), 0
        for place in self._plan.places(self._start):
            if (place.wanted and count == self._engine.batch) or len(batch.places) == _MOST_PLACES:
                yield batch
                batch, count = _Batch(batch.number + 1), 0
            batch.places.append(place)
            count += place.wanted
        if batch.places:
            yield batch

    def _read(self, reader: SceneReader) -> None:
        """The work of a reading thread."""
        while True:
            with self._turn:
                self._threads.require_running()
                job = next(self._jobs, None)
                if job is None:
                    self._turn.notify_all()  # the number of batches is known now
                    return
            if isinstance(job, Cell):
                started = time.perf_counter()
                job.load(reader)
                with self._turn:
                    job.read = True
                    self.totals.stages["read"] += time.perf_counter() - started
                    self._turn.notify_all()
            else:
                self._cut(job)

    def _cut(self, batch: _Batch) -> None:
        slots = self._engine.slots
        cells_under = [cell for cells in batch.cells for cell in cells]
        with self._turn:
            self._threads.wait_until(
                lambda: batch.number - slots < self._released and all(cell.read for cell in cells_under)
            )
        started = time.perf_counter()
        tiles = self._engine.input(batch.number % slots) if any(p.wanted for p in batch.places) else None
        index = 0
        for place, cells in zip(batch.places, batch.cells, strict=True):
            if not place.wanted or tiles is None:
                batch.valid.append(None)
                batch.empty.append(True)
                continue
            valid = cut_tile(place, cells, self._layout, tiles[index])
            batch.valid.append(valid)
            part = np.s_[:, :] if self._merge.blends else (place.row.kept, place.column.kept)
            batch.empty.append(valid is not None and not valid[part].any())
            index += 1
        if tiles is not None:
            tiles[index:] = INVALID_FILL
        batch.cells = []
        with self._turn:
            self._cells.release(cells_under)
            self._filled[batch.number] = batch
            self.totals.stages["cut"] += time.perf_counter() - started
            self._turn.notify_all()

    def _label(self) -> None:
        """The work of the calling thread."""
        for reader in self._readers:
            self._threads.start("read", self._read, reader)
        self._threads.start("write", self._write)
        number = 0
        while (batch := self._next_filled(number)) is not None:
            if not all(batch.empty):
                slot = batch.number % self._engine.slots
                started = time.perf_counter()
                self._engine.launch(slot)
                self._engine.wait(slot)
                self.totals.engine_seconds += time.perf_counter() - started
            with self._turn:
                self._computed.append(batch)
                self._turn.notify_all()
            number += 1
        with self._turn:
            self._all_computed = True
            self._turn.notify_all()

    def _next_filled(self, number: int) -> _Batch | None:
        with self._turn:
            self._threads.wait_until(
                lambda: number in self._filled or (self._batches is not None and number >= self._batches)
            )
            return self._filled.pop(number, None)

    def _write(self) -> None:
        """The work of the writing thread."""
        done, total = self._plan.tiles_in(self._start), len(self._plan.grid)
        while (batch := self._next_computed()) is not None:
            started = time.perf_counter()
            index = 0
            for place, valid, empty in zip(batch.places, batch.valid, batch.empty, strict=True):
                slot = None if empty else batch.number % self._engine.slots
                if place.emits:
                    self.totals.tiles_without_data += empty
                    done += 1
                self._merge.add(place, slot, index, valid)
                index += place.wanted
            with self._turn:
                self._released += 1
                self.totals.stages["merge"] += time.perf_counter() - started
                self._turn.notify_all()
            self._progress(done, total)

    def _next_computed(self) -> _Batch | None:
        with self._turn:
            self._threads.wait_until(lambda: bool(self._computed) or self._all_computed)
            return self._computed.popleft() if self._computed else None
