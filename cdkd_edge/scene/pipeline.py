"""A scene through an engine: a reading thread, the engine, a writing thread.

The engine's buffer slots are the only queue between them, so memory is bounded by construction: a slot
is free, then holds tiles, then labels, then is free again. A failure anywhere stops all three and
leaves no output.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdkd_edge import __version__
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.errors import SceneError
from cdkd_edge.labels import NO_LABEL
from cdkd_edge.manifest import EngineManifest
from cdkd_edge.scene.grid import Span, TileGrid, default_overlap
from cdkd_edge.scene.reader import SceneReader, Stretch
from cdkd_edge.scene.stitch import RowStitcher
from cdkd_edge.scene.writer import LabelMapWriter


@dataclass(frozen=True)
class SegmentOptions:
    """How a scene is read and tiled."""

    overlap: int | None = None
    """Overlap of neighbouring tiles, px. Default: :func:`.grid.default_overlap`."""
    bands: Sequence[int] | None = None
    """Red, green and blue as 1-based band numbers. Default: by colour tags, as :class:`.reader.SceneReader` says."""
    stretch: Stretch | None = None
    """How values become 0..255. Default: 8-bit values as they are, others are an error."""


@dataclass(frozen=True)
class SegmentResult:
    """A finished label map."""

    output: Path
    height: int
    width: int
    tiles: int
    tiles_without_data: int
    seconds: float
    """From opening the scene to the finished file."""
    engine_seconds: float
    """Sum over batches of launch to result."""
    class_pixels: dict[str, int]
    no_data_pixels: int
    notes: tuple[str, ...]


@dataclass
class _Batch:
    """Up to N tiles in one slot."""

    slot: int
    places: list[tuple[Span, Span]]
    valid: list[npt.NDArray[np.bool_] | None]
    empty: list[bool]


class _StoppedError(Exception):
    """Another part of the pipeline failed; its error is the one to show."""


def segment_scene(
    engine: Labeller,
    scene: str | Path,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentResult:
    """Label every pixel of a scene.

    Args:
        engine: what labels tiles.
        scene: anything GDAL opens; RGB, 8 bit unless ``options.stretch`` is given.
        output: the label map (``.tif``); class names go to ``<output>.aux.xml``.
        options: overlap, bands, stretch.
        progress: called with tiles done and tiles in all.

    Raises:
        SceneError: the scene cannot be read or the label map not be written.
        EngineError: the engine failed.
        OSError: the system refused to write.
    """
    started = time.perf_counter()
    output = Path(os.path.normpath(output))
    if _same_file(scene, output):
        raise SceneError(f"the label map would overwrite the scene {scene}")
    reader = SceneReader(scene, bands=options.bands, stretch=options.stretch)
    try:
        grid = grid_over(reader, engine.tile, options)
        writer = LabelMapWriter(
            output,
            reader.height,
            reader.width,
            engine.schema,
            reader.georeference,
            label_map_tags(engine, reader, options),
        )
        with writer:
            totals = label_rows(engine, reader, grid, writer.write_rows, progress)
        notes = tuple(reader.notes)
    finally:
        reader.close()
    names = engine.schema.class_names
    return SegmentResult(
        output=output,
        height=grid.rows[-1].last,
        width=grid.columns[-1].last,
        tiles=len(grid),
        tiles_without_data=totals.tiles_without_data,
        seconds=time.perf_counter() - started,
        engine_seconds=totals.engine_seconds,
        class_pixels={name: int(count) for name, count in zip(names, writer.counts, strict=False)},
        no_data_pixels=int(writer.counts[NO_LABEL]),
        notes=notes,
    )


def grid_over(reader: SceneReader, tile: int, options: SegmentOptions) -> TileGrid:
    """The tiles of an open scene."""
    overlap = default_overlap(tile) if options.overlap is None else options.overlap
    return TileGrid.over(reader.height, reader.width, tile, overlap)


def label_map_tags(engine: Labeller, reader: SceneReader, options: SegmentOptions) -> dict[str, str]:
    """What a label map says about its making."""
    overlap = default_overlap(engine.tile) if options.overlap is None else options.overlap
    tags = {
        "CDKD_EDGE": __version__,
        "SCENE": Path(str(reader.path)).name,
        "ENGINE": f"{engine.artefact.file} sha256:{engine.artefact.sha256}",
        "CLASSES": ", ".join(engine.schema.class_names),
        "TILE_PX": str(engine.tile),
        "OVERLAP_PX": str(overlap),
        "BANDS": ",".join(map(str, reader.bands)),
    }
    manifest = getattr(engine, "manifest", None)
    if isinstance(manifest, EngineManifest):  # the same for the engines that boards built from one graph
        tags["GRAPH"] = f"{manifest.graph.file} sha256:{manifest.graph.sha256}"
    if reader.limits is not None:
        tags["STRETCH"] = "; ".join(f"{low:.6g}..{high:.6g}" for low, high in reader.limits)
    return tags


@dataclass
class RunTotals:
    """What one pass over a scene added up to."""

    tiles_without_data: int = 0
    engine_seconds: float = 0.0


def label_rows(
    engine: Labeller,
    reader: SceneReader,
    grid: TileGrid,
    sink: Callable[[npt.NDArray[np.uint8]], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunTotals:
    """Label an open scene; label maps and scores both come from here.

    Args:
        engine: what labels tiles.
        reader: the scene.
        grid: its tiles, as :func:`grid_over` places them.
        sink: receives rows of labels ``[h, width]`` from top to bottom, in a thread of its own; it must not keep them.
        progress: called with tiles done and tiles in all.

    Raises:
        SceneError, EngineError: as the parts do; and whatever ``sink`` raises.
    """
    run = _Run(engine, reader, grid, RowStitcher(reader.width, len(grid.columns), sink), progress)
    run.run()
    return run.totals


class _Run:
    """One pass over the grid."""

    def __init__(
        self,
        engine: Labeller,
        reader: SceneReader,
        grid: TileGrid,
        stitcher: RowStitcher,
        progress: Callable[[int, int], None],
    ) -> None:
        self.engine = engine
        self.reader = reader
        self.grid = grid
        self.stitcher = stitcher
        self.progress = progress
        self.totals = RunTotals()
        # None in a queue means "stop"; an exception in `ready` means "a thread failed".
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Batch | BaseException | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        for slot in range(engine.slots):
            self._free.put(slot)

    def run(self) -> None:
        """Run to the end, or raise the first error of any part after all have stopped."""
        reading = threading.Thread(target=self._guard, args=(self._read,), name="read")
        writing = threading.Thread(target=self._guard, args=(self._write,), name="write")
        try:
            reading.start()
            writing.start()
            self._infer()
        finally:
            self._free.put(None)
            self._done.put(None)
            for thread in (reading, writing):
                if thread.is_alive():
                    thread.join()
        while not self._ready.empty():  # the writer may fail after the last tile was computed
            late = self._ready.get()
            if isinstance(late, BaseException):
                raise late

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _StoppedError:
            pass
        except BaseException as error:
            self._ready.put(error)

    def _read(self) -> None:
        for places in _grouped(iter(self.grid), self.engine.batch):
            slot = self._free.get()
            if slot is None:
                raise _StoppedError
            batch = _Batch(slot, places, [], [])
            tiles = self.engine.input(slot)
            for index, (row, column) in enumerate(places):
                valid = self.reader.read_tile(row, column, tiles[index])
                batch.valid.append(valid)
                batch.empty.append(valid is not None and not valid[row.kept, column.kept].any())
            self._ready.put(batch)
        self._ready.put(None)

    def _infer(self) -> None:
        while True:
            batch = self._ready.get()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            if not all(batch.empty):
                started = time.perf_counter()
                self.engine.launch(batch.slot)
                self.engine.wait(batch.slot)
                self.totals.engine_seconds += time.perf_counter() - started
            self._done.put(batch)

    def _write(self) -> None:
        done = 0
        while (batch := self._done.get()) is not None:
            labels = self.engine.output(batch.slot)
            for index, (row, column) in enumerate(batch.places):
                empty = batch.empty[index]
                self.stitcher.place(row, column, None if empty else labels[index], batch.valid[index])
                self.totals.tiles_without_data += empty
            self._free.put(batch.slot)
            done += len(batch.places)
            self.progress(done, len(self.grid))


def _grouped(tiles: Iterator[tuple[Span, Span]], size: int) -> Iterator[list[tuple[Span, Span]]]:
    group: list[tuple[Span, Span]] = []
    for tile in tiles:
        group.append(tile)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _same_file(scene: str | Path, output: Path) -> bool:
    try:
        return output.exists() and Path(str(scene)).samefile(output)
    except OSError:
        return False
