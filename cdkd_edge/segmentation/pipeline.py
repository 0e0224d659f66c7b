"""Labels a scene with an engine: reading threads, the engine, a writing thread; an interrupted run is resumed.

Labels go into a spool beside the label map, one row of tiles after the other, and the label map is made from it when
all are there (:mod:`.spool`, :mod:`.partial`, :mod:`.outputs`). Memory is bounded (:mod:`.plan`, :mod:`.flow`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine

from cdkd_edge import __version__
from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.core.machine import hand_memory_back
from cdkd_edge.core.manifest import CONFIDENCE, EngineManifest, missing_output, provides
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.aoi import AreaOnScene, read_area
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.raster.styles import sidecar_path
from cdkd_edge.segmentation.flow import Flow, RunTotals
from cdkd_edge.segmentation.merge import RowMerge
from cdkd_edge.segmentation.merge_modes import merge_mode
from cdkd_edge.segmentation.options import SegmentOptions, SegmentResult
from cdkd_edge.segmentation.outputs import RasterAssembler, confidence_path, require_file_place, require_gdal_name
from cdkd_edge.segmentation.partial import Partial, scene_identity, scene_sample, times_of_change
from cdkd_edge.segmentation.plan import PANEL_BYTES, CellLayout, TilePlan
from cdkd_edge.segmentation.spool import DiskSpaceWatch, Spool


def segment_scene(
    engine: Labeller,
    scene: str | Path,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    resume: bool = True,
    warn: Callable[[str], None] = lambda text: None,
) -> SegmentResult:
    """Label every pixel of a scene.

    If the run ends early, for whatever reason, finished tiles are kept in ``<output>.partial``. The next call resumes
    from there, and the label map has the same bytes as after an uninterrupted run.

    Args:
        engine: labels the tiles.
        scene: anything GDAL opens; RGB, 8 bit unless ``options.stretch`` is given.
        output: the label map (``.tif``); class names go to ``<output>.aux.xml``. An older one is replaced at the end.
        options: how the scene is read, tiled and put together.
        progress: called with tiles done and tiles in all.
        resume: resume an interrupted run; False: drop what it left.
        warn: called, from another thread, with what the user should know before the end: the disk will be full.

    Raises:
        SceneError: the scene cannot be read or the label map cannot be written; another run is writing it; or an
            interrupted run had another scene, engine or options.
        EngineError: the engine failed.
        SystemRefusalError, OSError: the disk is full (finished tiles are kept), or the system refused to write.
    """
    started = time.perf_counter()
    output = Path(os.path.normpath(output))
    confidence = confidence_path(output) if options.confidence else None
    with contextlib.suppress(OSError):
        if output.exists() and Path(str(scene)).samefile(output):
            raise SceneError(f"the label map would overwrite the scene {scene}", hint="choose another --output")
    require_gdal_name(output)
    require_file_place(output, sidecar_path(output), *([confidence] if confidence else []))
    _require_output(engine, options)
    schema = engine.schema.in_palette(options.palette)
    with contextlib.ExitStack() as stack:
        readers = _opened(stack, scene, options)
        reader, times = readers[0], times_of_change(readers[0])
        place = reader.georeference
        area = None
        if options.aoi is not None:
            transform = place.get("transform", Affine.identity())
            area = AreaOnScene(read_area(options.aoi), place.get("crs"), transform, reader.height, reader.width)
        plan = _plan(engine, reader, options, area)
        fingerprint = scene_identity(reader)
        tags = label_map_tags(engine, reader, options, fingerprint)
        identity = _identity(engine, reader, tags, fingerprint, confidence=options.confidence)
        partial = stack.enter_context(Partial(output, identity, resume=resume, replaces=output.exists()))
        stack.enter_context(_kept_when_the_disk_is_full(partial))
        spool = stack.enter_context(Spool(partial.spool, reader.height, reader.width))
        resumed = spool.bands
        if spool.damaged:
            warn(f"{spool.path} is damaged; its first {resumed} rows of tiles are good, the others are computed again")
        partial.worth_keeping = resumed > 0
        rasters = stack.enter_context(
            RasterAssembler(spool, schema, place, tags, partial.folder, confidence=options.confidence)
        )
        rasters.advance(plan.rows_done(resumed))
        totals = RunTotals()
        if resumed < plan.bands:
            space = DiskSpaceWatch(partial.folder, warn)

            def on_band() -> None:
                partial.worth_keeping = True
                rasters.advance(plan.rows_done(spool.bands))
                space.check(spool.path, plan.tiles_in(spool.bands) / len(plan.grid))

            inside, overlap = None if area is None else area.inside, options.overlap_of(engine.tile)
            kind = merge_mode(options.merge).load()
            merge = kind(engine, spool, plan, overlap, confidence=options.confidence, area=inside)
            merge.on_band = on_band
            totals = Flow(engine, readers, plan, merge, start=resumed, progress=progress).run()
            del merge
            hand_memory_back()
        if times_of_change(reader) != times:
            raise SceneError(f"{scene} changed while it was read", hint="start anew with --overwrite")
        finishing = time.perf_counter()
        areas = rasters.publish(output, confidence, partial.finishing)
        totals.stages["finish"] = time.perf_counter() - finishing
        partial.finished = True
    return SegmentResult(
        output=output,
        height=spool.height,
        width=spool.width,
        tiles=len(plan.grid),
        tiles_without_data=spool.tiles_without_data,
        seconds=time.perf_counter() - started,
        engine_seconds=totals.engine_seconds,
        class_pixels={area.name: area.pixels for area in areas.classes},
        no_data_pixels=areas.no_data.pixels,
        notes=tuple(reader.notes),
        tiles_resumed=plan.tiles_in(resumed),
        confidence=confidence,
        stretch_limits=_limits(reader),
        stages={name: round(seconds, 6) for name, seconds in totals.stages.items()},
        row_class_pixels=rasters.row_counts,
        areas=areas,
    )


def label_map_tags(
    engine: Labeller, reader: SceneReader, options: SegmentOptions, scene: dict[str, Any] | None = None
) -> dict[str, str]:
    """The tags of a label map: what it was made of and how. ``scene`` is its :func:`.partial.scene_identity`."""
    tags = {
        "CDKD_EDGE": __version__,
        "SCENE": Path(str(reader.path)).name,
        "ENGINE": f"{engine.artefact.file} sha256:{engine.artefact.sha256}",
        "CLASSES": ", ".join(engine.schema.class_names),
        "TILE_PX": str(engine.tile),
        **options.tags(reader, engine.tile),
    }
    if scene is not None:
        tags["SCENE_SAMPLE"] = f"sha256:{scene_sample(scene)}"
    manifest = getattr(engine, "manifest", None)
    if isinstance(manifest, EngineManifest):  # the same for the engines that boards built from one graph
        tags["GRAPH"] = f"{manifest.graph.file} sha256:{manifest.graph.sha256}"
    return tags


def label_rows(
    engine: Labeller,
    reader: SceneReader,
    grid: TileGrid,
    sink: Callable[[npt.NDArray[np.uint8]], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunTotals:
    """Label an open scene row by row, in the same way as label maps are made.

    ``grid`` comes from :meth:`.options.SegmentOptions.grid_over`. ``sink`` receives rows of labels ``[h, width]`` from
    top to bottom, in another thread; it must not keep the array. ``progress`` is called with tiles done and in all.
    Raises SceneError or EngineError if reading or computing failed, and whatever ``sink`` raises.
    """
    plan = TilePlan.over(grid, engine.tile, panel_bytes=None)
    merge = RowMerge(engine, reader.width, len(grid.columns), sink)
    return Flow(engine, [reader], plan, merge, progress=progress).run()


def _require_output(engine: Labeller, options: SegmentOptions) -> None:
    """Make sure that the engine gives what the merge and the confidence raster need."""
    needed = {merge_mode(options.merge).needs: f"--merge {options.merge}"}
    if options.confidence:
        needed.setdefault(CONFIDENCE, "--confidence")
    for kind, option in needed.items():
        if not provides(engine.output_kind, kind):
            missing = missing_output(engine.output_kind, kind, engine.artefact.file)
            raise SceneError(f"{missing.message}, which {option} needs", hint=missing.hint)


def _opened(stack: contextlib.ExitStack, scene: str | Path, options: SegmentOptions) -> list[SceneReader]:
    """The scene once for each reading thread."""
    first = stack.enter_context(contextlib.closing(options.open(scene)))
    more = 0 if first.sequential else options.readers - 1
    return [first, *(stack.enter_context(contextlib.closing(first.another())) for _ in range(more))]


def _plan(engine: Labeller, reader: SceneReader, options: SegmentOptions, area: AreaOnScene | None) -> TilePlan:
    grid, tile = options.grid_over(reader, engine.tile), engine.tile
    merge = merge_mode(options.merge).load()

    def wanted(row: Span, column: Span) -> bool:
        if area is None or not merge.blends:
            return area is None or area.touches(row.first, column.first, row.last, column.last)
        return area.touches(row.start, column.start, row.start + tile, column.start + tile)

    layout = CellLayout.of(reader)
    # A cell as wide as the panel brings all of the next row of tiles' pixels at once.
    slack = 2 * layout.rows if layout.columns else engine.tile
    return TilePlan.over(
        merge.arranged(grid),
        tile,
        slack_rows=slack,
        blends=merge.blends,
        panel_bytes=PANEL_BYTES,
        pixel_bytes=reader.pixel_bytes,
        wanted=wanted,
    )


def _identity(
    engine: Labeller, reader: SceneReader, tags: dict[str, str], scene: dict[str, Any], *, confidence: bool
) -> dict[str, Any]:
    """Everything that decides about the labels: a run resumes only from one with the same identity."""
    options = {**tags, "BANDS": list(reader.bands), "LIMITS": _limits(reader)}
    for name in ("SCENE", "SCENE_SAMPLE", "ENGINE"):  # the other entries tell these
        del options[name]
    made_by = {"file": engine.artefact.file, "sha256": engine.artefact.sha256}
    return {"scene": scene, "engine": made_by, "options": options, "confidence": confidence}


def _limits(reader: SceneReader) -> tuple[tuple[float, float], ...] | None:
    return None if reader.limits is None else tuple((float(low), float(high)) for low, high in reader.limits)


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
            reason, hint=f"free some space and run the same command again; finished tiles are kept in {partial.folder}"
        ) from None
