"""From scenes to a calibration set on disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, SceneError, UsageError
from cdkd_edge.core.files import require_free, whole_folder
from cdkd_edge.core.manifest import GraphManifest, read_manifest
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.graph.tiles import CalibrationSet, SetManifest, is_calibration_set
from cdkd_edge.precision.calibration.candidates import Candidates, Progress, ScanOptions, scan
from cdkd_edge.precision.calibration.classes import LabelMaps
from cdkd_edge.precision.calibration.duplicates import without_duplicates
from cdkd_edge.precision.calibration.exclusions import Exclusions
from cdkd_edge.precision.calibration.pick import Pick, pick_tiles
from cdkd_edge.precision.calibration.scenes import Source, expand, measure
from cdkd_edge.precision.calibration.write import store
from cdkd_edge.raster.find import file_key
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segment.options import SegmentOptions

DEFAULT_TILE = 1024
MIN_TILE = 32

_SHOWN = 4


@dataclass(frozen=True)
class CalibrateOptions:
    """What kind of set is wanted."""

    count: int = 64
    """Tiles for calibration."""
    check: int = 8
    """Tiles kept apart to judge on."""
    tile: int = DEFAULT_TILE
    """Side, px."""
    seed: int = 0
    candidates: int = 10_000
    """Tiles looked at in all scenes together."""
    max_nodata: float = 0.1
    """Share of a tile that may have no data."""
    scene: SegmentOptions = SegmentOptions()
    """Bands and stretch of scenes."""
    labels: Path | None = None
    """Folder of label maps, ``NAME_labels.tif``."""
    exclude: tuple[str, ...] = ()
    """Evaluation sets, see :mod:`.exclusions`."""
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.tile < MIN_TILE:
            raise UsageError(f"tiles of {self.tile} px are too small to describe; at least {MIN_TILE} px")
        if self.count < 1 or self.check < 0 or self.candidates < 1:
            raise UsageError("a calibration set needs at least one tile and one candidate")
        if not 0 <= self.max_nodata <= 1:
            raise UsageError(f"a share of nodata is 0..1, not {self.max_nodata:g}")


@dataclass(frozen=True)
class CalibrateResult:
    """A finished set."""

    folder: Path
    manifest: SetManifest

    def open(self) -> CalibrationSet:
        """The set, to read its tiles."""
        return CalibrationSet.load(self.folder)


def default_tile(workspace: Workspace) -> int:
    """The tile side of the workspace's exported graph if there is one (or several agree), else 1024 px.

    Raises:
        ManifestError: a graph's manifest is damaged.
    """
    sides = tile_sides(workspace)
    return sides.pop() if len(sides) == 1 else DEFAULT_TILE


def tile_sides(workspace: Workspace) -> set[int]:
    """The tile sides of the workspace's exported graphs, px; see :func:`default_tile`."""
    return {read_manifest(path, GraphManifest, verify=False).tile for path in workspace.graphs_of("fp32")}


def default_folder(workspace: Workspace, scenes: Sequence[str]) -> Path:
    """``engines/calibration/NAME`` with the name of the only scene or folder, or of the folder all scenes lie in."""
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

    The result depends on what the scenes hold, their paths as given, options and seed; not on the order of scenes,
    the number of threads, the time or the name of the folder.

    Args:
        scenes: rasters, folders of rasters, patterns (:func:`.scenes.expand`).
        folder: where the set goes; it must not exist, or be empty.
        options: how many tiles of what.
        progress: called with tiles looked at and tiles in all.
        overwrite: replace ``folder`` if it is a calibration set.

    Raises:
        SceneError: a scene cannot be read (and broken ones are not to be skipped).
        DatasetError: no tile remains, or an evaluation set or a label map cannot be used.
        UsageError: ``folder`` is something else, or is not to be replaced.
        OSError: the system refused to write.
    """
    replace = _replaceable(folder, overwrite)
    paths = expand(scenes)
    target = file_key(str(folder))
    if any(Path(file_key(path)).is_relative_to(target) for path in paths):
        raise UsageError(f"some of the scenes lie in {folder}", hint="name another --output")
    with whole_folder(folder, replace=replace) as place:
        exclusions = Exclusions.of(options.exclude)
        sources, notes, counts = _sources(paths, exclusions, options)
        label_maps = None if options.labels is None else LabelMaps(options.labels)
        scanning = ScanOptions(
            options.tile, options.seed, options.candidates, options.max_nodata, options.scene, options.skip_broken
        )
        evaluation = _evaluation(exclusions, scanning, notes, progress)
        candidates = without_duplicates(scan(sources, scanning, exclusions, label_maps, progress), evaluation)
        counts.update(tiles_seen=candidates.scanned, candidates=len(candidates))
        counts.update({reason: count for reason, count in sorted(candidates.skipped.items()) if count})
        counts["scenes_broken"] += len(candidates.broken)
        _require_some(candidates, counts)
        notes += [f"skipped: {problem}" for problem in candidates.broken]
        notes += _listed_notes(candidates.notes) + reading_notes(candidates.said)
        pick = pick_tiles(candidates, options.count, options.check, options.seed, label_maps)
        manifest = store(
            place,
            Path(os.path.realpath(folder)).name,
            candidates,
            pick,
            options.scene,
            _description(options, pick, counts, notes),
        )
    return CalibrateResult(folder, manifest)


def _replaceable(folder: Path, overwrite: bool) -> bool:
    """Whether there is something that may be replaced."""
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
    require_free(folder, overwrite=overwrite, error=UsageError)
    return True


def _sources(
    paths: list[str], exclusions: Exclusions, options: CalibrateOptions
) -> tuple[list[Source], list[str], Counter[str]]:
    """The scenes that take part, notes on the others, and how many they are."""
    notes: list[str] = []
    counts: Counter[str] = Counter(scenes=len(paths), scenes_excluded=0, scenes_broken=0)
    sources, left_out = [], []
    first_error: SceneError | None = None
    for path in paths:
        if reason := exclusions.reason(path):
            left_out.append(f"{path} ({reason})")
            continue
        try:
            sources.append(measure(path, options.tile))
        except SceneError as error:
            if not options.skip_broken:
                raise SceneError(
                    error.message, hint=error.hint or "leave it out, or skip what cannot be read with --skip-broken"
                ) from None
            first_error = first_error or error
            counts["scenes_broken"] += 1
            notes.append(f"skipped: {error.message}")
    counts["scenes_excluded"] = len(left_out)
    if left_out:
        notes.append(f"{len(left_out)} of {len(paths)} scenes are of an evaluation set: {_listed(left_out)}")
    if not sources and first_error is None:
        raise DatasetError(
            f"nothing is left to calibrate on: {notes[-1]}", hint="give scenes that nothing is judged on"
        )
    if not sources and first_error is not None:
        raise SceneError(f"no scene can be read; the first: {first_error.message}", hint=first_error.hint)
    return sources, notes, counts


def _evaluation(
    exclusions: Exclusions, scanning: ScanOptions, notes: list[str], progress: Progress
) -> npt.NDArray[np.float16] | None:
    """Thumbnails of the evaluation sets' tiles, to find their near-duplicates by."""
    sources, unreadable = [], 0
    for image in sorted(set(exclusions.images)):
        try:
            sources.append(measure(str(image), scanning.tile))
        except SceneError:
            unreadable += 1
    if not exclusions.images:
        return None
    looking = ScanOptions(scanning.tile, scanning.seed, scanning.budget, 1.0, scanning.scene, skip_broken=True)
    seen = scan(sources, looking, progress=progress)
    if unreadable := unreadable + len(seen.broken):
        notes.append(
            f"{unreadable} of {len(exclusions.images)} images to exclude cannot be read as scenes: they are known by "
            "name and file only"
        )
    return seen.thumbnails


def _require_some(candidates: Candidates, counts: Counter[str]) -> None:
    if len(candidates):
        return
    if candidates.broken and not candidates.scanned:
        raise SceneError(f"no scene can be read; the first: {candidates.broken[0]}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(candidates.skipped.items()) if count)
    raise DatasetError(
        f"none of {candidates.scanned} tiles can be used: {reasons}",
        hint="--max-nodata says how much of a tile may have no data" if candidates.skipped["nodata"] else None,
    )


def _description(options: CalibrateOptions, pick: Pick, counts: Counter[str], notes: list[str]) -> dict[str, Any]:
    """What the manifest says of the whole set."""
    stretch = options.scene.stretch
    return {
        "tile": options.tile,
        "seed": options.seed,
        "method": pick.method,
        "options": {
            "count": options.count,
            "check": options.check,
            "candidates": options.candidates,
            "max_nodata": options.max_nodata,
            "bands": None if options.scene.bands is None else list(options.scene.bands),
            "stretch": None
            if stretch is None
            else {"low": stretch.low, "high": stretch.high, "percentiles": stretch.percentiles},
            "labels": None if options.labels is None else str(options.labels),
            "exclude": list(options.exclude),
            "skip_broken": options.skip_broken,
        },
        "counts": dict(counts),
        "notes": (*notes, *pick.notes),
    }


def _listed_notes(notes: list[str]) -> list[str]:
    """Notes of scenes; those that say the same of many become one."""
    unlabelled = [note for note in notes if note.endswith(" has no label map")]
    others = [note for note in notes if note not in unlabelled]
    if len(unlabelled) > 1:
        unlabelled = [
            f"{len(unlabelled)} scenes have no label map, e.g. {unlabelled[0].removesuffix(' has no label map')}"
        ]
    return others + unlabelled


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
