"""Makes calibration sets from scenes: ``cdkd-edge calibrate``."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, SceneError, UsageError
from cdkd_edge.core.files import occupied, whole_folder
from cdkd_edge.core.manifest import GraphManifest, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.graph.tiles import SetManifest, is_calibration_set
from cdkd_edge.precision.choose_tiles import Choice, choose_tiles
from cdkd_edge.precision.exclusions import Exclusions
from cdkd_edge.precision.scan_scenes import SKIP_BROKEN, CalibrateOptions, LabelMaps, Progress, TiledScene, scan_scenes
from cdkd_edge.precision.write_set import write_set
from cdkd_edge.quality.datasets import listed
from cdkd_edge.raster.open import file_key, scenes_named
from cdkd_edge.raster.read import reading_notes

DEFAULT_TILE = 1024


@dataclass(frozen=True)
class CalibrateResult:
    """A finished set."""

    folder: Path
    manifest: SetManifest


def default_tile(workspace: Workspace) -> int:
    """The tile side of the workspace's exported graphs, px; 1024 if there is none or they differ."""
    sides = tile_sides(workspace)
    return sides.pop() if len(sides) == 1 else DEFAULT_TILE


def tile_sides(workspace: Workspace) -> set[int]:
    """The tile sides of the workspace's exported graphs, px."""
    return {read_manifest(path, GraphManifest, verify=False).tile for path in workspace.graphs_of("fp32")}


def default_folder(workspace: Workspace, scenes: Sequence[str]) -> Path:
    """``engines/calibration/NAME``, with the name of the only scene or folder, or of the folder of all scenes."""
    places = {Path(scene) if len(scenes) == 1 else Path(scene).parent for scene in scenes}
    place = places.pop() if len(places) == 1 else Path("set")
    name = Path(os.path.realpath(place)).name if place.is_dir() else place.stem
    return workspace.engines / "calibration" / ("".join(c if c.isalnum() or c in "-_." else "_" for c in name) or "set")


def calibrate(
    scenes: Sequence[str],
    folder: Path,
    options: CalibrateOptions = CalibrateOptions(),
    progress: Progress = lambda done, total: None,
    *,
    overwrite: bool = False,
) -> CalibrateResult:
    """Make a calibration set.

    The result depends on the content of the scenes, their paths as given, options and seed; not on their order, the
    number of threads, the time or the name of the folder.

    Args:
        scenes: rasters, folders of rasters, patterns (:func:`cdkd_edge.raster.open.scenes_named`).
        folder: where the set is written; it must not exist, or be empty.
        options: size of the set, and which tiles may be in it.
        progress: called with tiles looked at and tiles in all.
        overwrite: replace ``folder`` if it is a calibration set.

    Raises:
        SceneError: a scene cannot be read, and broken ones are not skipped.
        DatasetError: no tile remains, or an evaluation set or a label map cannot be used.
        UsageError: ``folder`` is something else, or must not be replaced.
    """
    replace = _replaceable(folder, overwrite)
    paths = scenes_named(scenes)
    target = file_key(str(folder))
    if any(Path(file_key(path)).is_relative_to(target) for path in paths):
        raise UsageError(f"some of the scenes lie in {folder}", hint="name another --output")
    with whole_folder(folder, replace=replace) as place:
        exclusions = Exclusions.of(options.exclude)
        tiled, notes, counts = _open_scenes(paths, exclusions, options)
        label_maps = None if options.labels is None else LabelMaps(options.labels)
        evaluation = _evaluation_thumbnails(exclusions, options, notes, progress)
        candidates = scan_scenes(tiled, options, exclusions, label_maps, progress).without_duplicates(evaluation)
        report = candidates.report
        skipped = {reason: count for reason, count in sorted(report.skipped.items()) if count}
        counts.update(
            tiles_seen=report.scanned, candidates=len(candidates), scenes_broken=len(report.broken), **skipped
        )
        if report.broken and not report.scanned:
            raise SceneError(f"no scene can be read; the first: {report.broken[0]}")
        if not len(candidates):
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            raise DatasetError(
                f"none of {report.scanned} tiles can be used: {reasons}",
                hint="--max-nodata allows tiles with more pixels without data" if "nodata" in skipped else None,
            )
        notes += [f"skipped: {problem}" for problem in report.broken]
        if unlabelled := report.without_label_map:
            some = f"{len(unlabelled)} scenes have no label map, e.g. {unlabelled[0]}"
            notes.append(some if len(unlabelled) > 1 else f"{unlabelled[0]} has no label map")
        notes += reading_notes(report.reading_notes)
        choice = choose_tiles(candidates, options.count, options.check, options.seed, label_maps)
        name, description = Path(os.path.realpath(folder)).name, _description(options, choice, counts, notes)
        manifest = write_set(place, name, candidates, choice, options.reading, description)
    return CalibrateResult(folder, manifest)


def _replaceable(folder: Path, overwrite: bool) -> bool:
    """Whether there is a folder that may be replaced."""
    if not folder.exists():
        return False
    if Path(os.path.realpath(folder)) == Path.cwd():
        raise UsageError("the current folder cannot become a calibration set", hint="name one in it with --output")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="name another --output")
    if not any(folder.iterdir()):
        return True
    if not is_calibration_set(folder):
        raise UsageError(f"{folder} is not empty and no calibration set", hint="name another --output")
    if not overwrite:
        raise occupied(folder, UsageError)
    return True


def _open_scenes(
    paths: list[str], exclusions: Exclusions, options: CalibrateOptions
) -> tuple[list[TiledScene], list[str], Counter[str]]:
    """The scenes to choose from, notes on the others, and their numbers."""
    scenes, left_out = [], []
    broken: list[SceneError] = []
    for path in paths:
        if reason := exclusions.reason(path):
            left_out.append(f"{path} ({reason})")
            continue
        try:
            scenes.append(TiledScene.open(path, options.tile))
        except SceneError as error:
            if not options.skip_broken:
                raise SceneError(error.message, hint=error.hint or SKIP_BROKEN) from None
            broken.append(error)
    notes = [f"skipped: {error.message}" for error in broken]
    if left_out:
        notes.append(f"{len(left_out)} of {len(paths)} scenes are of an evaluation set: {listed(left_out, 4)}")
    if not scenes and broken:
        raise SceneError(f"no scene can be read; the first: {broken[0].message}", hint=broken[0].hint)
    if not scenes:
        raise DatasetError(
            f"nothing is left to calibrate on: {notes[-1]}", hint="give scenes that nothing is judged on"
        )
    counts = Counter(scenes=len(paths), scenes_excluded=len(left_out), scenes_broken=len(broken))
    return scenes, notes, counts


def _evaluation_thumbnails(
    exclusions: Exclusions, options: CalibrateOptions, notes: list[str], progress: Progress
) -> npt.NDArray[np.float16] | None:
    """Thumbnails of the tiles of evaluation sets, to find near-duplicates of them."""
    if not exclusions.images:
        return None
    scenes, unreadable = [], 0
    for image in sorted(set(exclusions.images)):
        try:
            scenes.append(TiledScene.open(str(image), options.tile))
        except SceneError:
            unreadable += 1
    every_tile = dataclasses.replace(options, max_nodata=1.0, skip_broken=True)
    seen = scan_scenes(scenes, every_tile, progress=progress)
    if unreadable := unreadable + len(seen.report.broken):
        notes.append(
            f"{unreadable} of {len(exclusions.images)} images to exclude cannot be read as scenes; only scenes with "
            "their names or content stay out, not near-duplicates of their tiles"
        )
    return seen.thumbnails


def _description(options: CalibrateOptions, choice: Choice, counts: Counter[str], notes: list[str]) -> dict[str, Any]:
    """The fields of the manifest about the whole set."""
    bands, stretch = options.reading.bands, options.reading.stretch
    return {
        "tile": options.tile,
        "seed": options.seed,
        "method": choice.method,
        "options": {
            "count": options.count,
            "check": options.check,
            "candidates": options.candidates,
            "max_nodata": options.max_nodata,
            "bands": None if bands is None else list(bands),
            "stretch": None if stretch is None else dataclasses.asdict(stretch),
            "labels": None if options.labels is None else str(options.labels),
            "exclude": list(options.exclude),
            "skip_broken": options.skip_broken,
        },
        "counts": dict(counts),
        "notes": (*notes, *choice.notes),
    }
