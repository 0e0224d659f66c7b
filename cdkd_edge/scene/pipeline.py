"""A scene through an engine: reading threads, the engine, a writing thread; what is done survives a crash.

Labels go into a spool beside the label map, row of tiles by row of tiles, and the label map is made from it when it is
whole (:mod:`.spool`, :mod:`.partial`, :mod:`.finish`). Memory is bounded by construction (:mod:`.plan`, :mod:`.flow`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge import __version__
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.errors import SceneError, SystemRefusalError
from cdkd_edge.labels import NO_LABEL
from cdkd_edge.manifest import EngineManifest
from cdkd_edge.scene.areas import Areas
from cdkd_edge.scene.cells import CellLayout
from cdkd_edge.scene.finish import Finished, finish_label_map
from cdkd_edge.scene.flow import Flow, RunTotals
from cdkd_edge.scene.grid import TileGrid, default_overlap
from cdkd_edge.scene.hann import HannMerge, hann_grid
from cdkd_edge.scene.identity import scene_identity, times_of_change
from cdkd_edge.scene.merge import RowMerge, SpoolMerge, require_output
from cdkd_edge.scene.outputs import confidence_path
from cdkd_edge.scene.partial import Partial
from cdkd_edge.scene.plan import PANEL_BYTES, Plan
from cdkd_edge.scene.reader import SceneReader, Stretch
from cdkd_edge.scene.spool import Spool
from cdkd_edge.scene.stitch import RowStitcher


@dataclass(frozen=True)
class SegmentOptions:
    """How a scene is read, tiled and put together again."""

    overlap: int | None = None
    """Overlap of neighbouring tiles, px. Default: :func:`.grid.default_overlap`."""
    bands: Sequence[int] | None = None
    """Red, green and blue as 1-based band numbers. Default: by colour tags, as :class:`.reader.SceneReader` says."""
    stretch: Stretch | None = None
    """How values become 0..255. Default: 8-bit values as they are, others are an error."""
    merge: str = "crop"
    """``crop``: each pixel from the tile in which it lies deepest. ``hann``: probabilities of tiles are blended."""
    confidence: bool = False
    """Also write ``NAME_confidence.tif``, the probability of the label in per cent."""
    readers: int = 2
    """Reading threads, each with the scene opened for itself."""


@dataclass(frozen=True)
class SegmentResult:
    """A finished label map."""

    output: Path
    height: int
    width: int
    tiles: int
    tiles_without_data: int
    seconds: float
    """From opening the scene to the finished file, of this run."""
    engine_seconds: float
    """Sum over batches of launch to result, of this run."""
    class_pixels: dict[str, int]
    no_data_pixels: int
    notes: tuple[str, ...]
    tiles_resumed: int = 0
    """Tiles that an earlier, interrupted run had done."""
    confidence: Path | None = None
    """The confidence raster, if one was asked for."""
    stretch_limits: tuple[tuple[float, float], ...] | None = None
    """Per band the values that became 0 and 255."""
    stages: dict[str, float] = field(default_factory=dict, compare=False)
    """Seconds by stage; those of threads added up."""
    row_class_pixels: npt.NDArray[np.uint32] | None = field(default=None, repr=False, compare=False)
    """Pixels per class in every row of pixels, ``[height, K + 1]``, the last column being no label: for areas where
    the size of a pixel depends on latitude."""
    areas: Areas | None = field(default=None, compare=False)
    """Pixels and hectares per class."""


def segment_scene(
    engine: Labeller,
    scene: str | Path,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    resume: bool = True,
) -> SegmentResult:
    """Label every pixel of a scene.

    What is done when the run ends early, however it ends, is kept in ``<output>.partial``; called again, it goes on
    from there, and the label map has the same bytes as if nothing had happened.

    Args:
        engine: what labels tiles.
        scene: anything GDAL opens; RGB, 8 bit unless ``options.stretch`` is given.
        output: the label map (``.tif``); class names go to ``<output>.aux.xml``. An older one is replaced at the end.
        options: overlap, bands, stretch, merge.
        progress: called with tiles done and tiles in all.
        resume: go on with what an interrupted run left; False: start anew.

    Raises:
        SceneError: the scene cannot be read or the label map not be written; another run is writing it; or what an
            interrupted run left was made of another scene, with another engine or other options.
        EngineError: the engine failed.
        SystemRefusalError: the disk is full; what is done is kept.
        OSError: the system refused to write.
    """
    started = time.perf_counter()
    output = Path(os.path.normpath(output))
    if _same_file(scene, output):
        raise SceneError(f"the label map would overwrite the scene {scene}")
    require_output(engine, merge=options.merge, confidence=options.confidence)
    with contextlib.ExitStack() as stack:
        readers = _opened(stack, scene, options)
        reader, times = readers[0], times_of_change(readers[0])
        plan = _plan(engine, reader, options)
        tags = label_map_tags(engine, reader, options)
        identity = _identity(engine, reader, tags)
        partial = stack.enter_context(Partial(output, identity, resume=resume, replaces=output.exists()))
        stack.enter_context(_kept_when_the_disk_is_full(partial))
        spool = stack.enter_context(Spool(partial.spool, reader.height, reader.width))
        resumed = spool.bands
        stack.callback(_note_what_is_worth, partial, spool)
        totals = RunTotals()
        if resumed < plan.bands:
            merge = _merge(engine, spool, plan, options)
            flow = Flow(engine, readers, plan, merge, start=resumed, progress=progress)
            flow.run()
            totals = flow.totals
        if times_of_change(reader) != times:
            raise SceneError(f"{scene} changed while it was read", hint="start anew with --overwrite")
        finishing = time.perf_counter()
        confidence = confidence_path(output) if options.confidence else None
        finished = finish_label_map(
            spool,
            output,
            engine.schema,
            reader.georeference,
            tags,
            folder=partial.folder,
            confidence=confidence,
        )
        totals.stages["finish"] = time.perf_counter() - finishing
        partial.finished = True
        result = _result(engine, reader, plan, output, finished, spool.tiles_without_data)
    return dataclasses.replace(
        result,
        seconds=time.perf_counter() - started,
        engine_seconds=totals.engine_seconds,
        tiles_resumed=plan.tiles_in(resumed),
        confidence=confidence,
        stages={name: round(seconds, 6) for name, seconds in totals.stages.items()},
    )


def grid_over(reader: SceneReader, tile: int, options: SegmentOptions) -> TileGrid:
    """The tiles of an open scene."""
    return TileGrid.over(reader.height, reader.width, tile, _overlap(tile, options))


def label_map_tags(engine: Labeller, reader: SceneReader, options: SegmentOptions) -> dict[str, str]:
    """What a label map says about its making."""
    tags = {
        "CDKD_EDGE": __version__,
        "SCENE": Path(str(reader.path)).name,
        "ENGINE": f"{engine.artefact.file} sha256:{engine.artefact.sha256}",
        "CLASSES": ", ".join(engine.schema.class_names),
        "TILE_PX": str(engine.tile),
        "OVERLAP_PX": str(_overlap(engine.tile, options)),
        "BANDS": ",".join(map(str, reader.bands)),
    }
    if options.merge != "crop":
        tags["MERGE"] = options.merge
    manifest = getattr(engine, "manifest", None)
    if isinstance(manifest, EngineManifest):  # the same for the engines that boards built from one graph
        tags["GRAPH"] = f"{manifest.graph.file} sha256:{manifest.graph.sha256}"
    if reader.limits is not None:
        tags["STRETCH"] = "; ".join(f"{low:.6g}..{high:.6g}" for low, high in reader.limits)
    return tags


def label_rows(
    engine: Labeller,
    reader: SceneReader,
    grid: TileGrid,
    sink: Callable[[npt.NDArray[np.uint8]], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunTotals:
    """Label an open scene row by row; scores come from here, by the same way as label maps.

    Args:
        engine: what labels tiles.
        reader: the scene.
        grid: its tiles, as :func:`grid_over` places them.
        sink: receives rows of labels ``[h, width]`` from top to bottom, in a thread of its own; it must not keep them.
        progress: called with tiles done and tiles in all.

    Raises:
        SceneError, EngineError: as the parts do; and whatever ``sink`` raises.
    """
    plan = Plan.over(grid, engine.tile, panel_bytes=None)
    merge = RowMerge(engine, RowStitcher(reader.width, len(grid.columns), sink))
    flow = Flow(engine, [reader], plan, merge, progress=progress)
    flow.run()
    return flow.totals


def _overlap(tile: int, options: SegmentOptions) -> int:
    return default_overlap(tile) if options.overlap is None else options.overlap


def _opened(stack: contextlib.ExitStack, scene: str | Path, options: SegmentOptions) -> list[SceneReader]:
    """The scene once for each reading thread."""
    first = SceneReader(scene, bands=options.bands, stretch=options.stretch)
    readers = [first]
    stack.callback(first.close)
    for _ in range(1, 1 if first.sequential else options.readers):
        readers.append(first.another())
        stack.callback(readers[-1].close)
    return readers


def _plan(engine: Labeller, reader: SceneReader, options: SegmentOptions) -> Plan:
    grid = grid_over(reader, engine.tile, options)
    blends = options.merge == "hann"
    layout = CellLayout.of(reader)
    # A cell as wide as the panel brings all of the next row of tiles' pixels at once.
    slack = 2 * layout.rows if layout.columns else engine.tile
    return Plan.over(
        hann_grid(grid) if blends else grid, engine.tile, slack_rows=slack, blends=blends, panel_bytes=PANEL_BYTES
    )


def _merge(engine: Labeller, spool: Spool, plan: Plan, options: SegmentOptions) -> SpoolMerge:
    if options.merge == "hann":
        return HannMerge(engine, spool, plan, _overlap(engine.tile, options), confidence=options.confidence)
    return SpoolMerge(engine, spool, confidence=options.confidence)


def _identity(engine: Labeller, reader: SceneReader, tags: dict[str, str]) -> dict[str, Any]:
    """What decides about the labels, so that parts of two runs are put together only if they fit."""
    limits = None if reader.limits is None else [[float(low), float(high)] for low, high in reader.limits]
    options = {key: value for key, value in tags.items() if key not in ("SCENE", "ENGINE")}
    return {
        "scene": scene_identity(reader),
        "engine": {"file": engine.artefact.file, "sha256": engine.artefact.sha256},
        "options": {**options, "BANDS": list(reader.bands), "LIMITS": limits},
    }


def _result(
    engine: Labeller, reader: SceneReader, plan: Plan, output: Path, finished: Finished, tiles_without_data: int
) -> SegmentResult:
    limits = reader.limits
    names = engine.schema.class_names
    return SegmentResult(
        output=output,
        height=reader.height,
        width=reader.width,
        tiles=len(plan.grid),
        tiles_without_data=tiles_without_data,
        seconds=0.0,
        engine_seconds=0.0,
        class_pixels={name: int(count) for name, count in zip(names, finished.counts, strict=False)},
        no_data_pixels=int(finished.counts[NO_LABEL]),
        notes=tuple(reader.notes),
        stretch_limits=None if limits is None else tuple((float(low), float(high)) for low, high in limits),
        row_class_pixels=finished.row_counts,
        areas=finished.areas,
    )


def _note_what_is_worth(partial: Partial, spool: Spool) -> None:
    partial.worth_keeping = spool.bands > 0


@contextlib.contextmanager
def _kept_when_the_disk_is_full(partial: Partial) -> Iterator[None]:
    try:
        yield
    except (SystemRefusalError, OSError) as error:
        full = isinstance(error, SystemRefusalError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full or not partial.worth_keeping:
            raise
        reason = error.message if isinstance(error, SystemRefusalError) else os.strerror(error.errno or 0)
        raise SystemRefusalError(
            reason, hint=f"make room and run the same command again; what is done is kept in {partial.folder}"
        ) from None


def _same_file(scene: str | Path, output: Path) -> bool:
    try:
        return output.exists() and Path(str(scene)).samefile(output)
    except OSError:
        return False
