"""Looks at the tiles of all scenes once and keeps a description of each that may be chosen.

A description takes some 600 bytes, and scenes share a budget of tiles (:func:`fair_limit`), so neither a thousand
scenes nor one of 100000 x 100000 px takes more memory or time. A tile is passed over, and counted, as ``nodata``, with
more pixels without data than allowed; ``blank`` (:func:`is_blank`); ``excluded``, part of an evaluation set or a
near-duplicate of a tile of one; ``near_duplicate``, of an earlier candidate.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.core.errors import DatasetError, SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.graph.tiles import pixels_sha256
from cdkd_edge.precision.describe_tiles import (
    FEATURES,
    THUMBNAIL,
    describe_tile,
    find_duplicates,
    make_thumbnail,
    match_thumbnails,
)
from cdkd_edge.precision.exclusions import Exclusions, overlaps
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.open import gdal, open_scene, place_problem
from cdkd_edge.segmentation.options import SegmentOptions

MIN_TILE = 32
SKIP_BROKEN = "leave it out, or skip what cannot be read with --skip-broken"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CalibrateOptions:
    """How scenes are read, the size of the set, and which tiles may be in it."""

    tile: int = 1024  # side of a tile, px
    seed: int = 0
    candidates: int = 10_000  # tiles looked at in all scenes together
    max_nodata: float = 0.1  # largest share of a tile without data
    reading: SegmentOptions = SegmentOptions()  # bands and stretch of scenes
    skip_broken: bool = False  # continue without scenes that cannot be read
    count: int = 64  # tiles for calibration
    check: int = 8  # tiles to check the quantised graph on
    labels: Path | None = None  # folder of label maps, ``NAME_labels.tif``: every class gets its share of the tiles
    exclude: tuple[str, ...] = ()  # evaluation sets that stay out, see :mod:`.exclusions`

    def __post_init__(self) -> None:
        if self.tile < MIN_TILE:
            raise UsageError(f"--tile must be at least {MIN_TILE} px, got {self.tile}")
        if self.count < 1 or self.check < 0 or self.candidates < 1:
            raise UsageError("a calibration set needs at least one tile and one candidate")
        if not 0 <= self.max_nodata <= 1:
            raise UsageError(f"--max-nodata is a share of 0..1, got {self.max_nodata:g}")


@dataclass(frozen=True)
class TiledScene:
    """The size of a scene, and its tiles."""

    path: str
    height: int
    width: int
    tile: int

    @classmethod
    def open(cls, path: str, tile: int) -> TiledScene:
        """Read the size of a scene; SceneError if it cannot be opened."""
        with open_scene(path) as dataset:
            return cls(path, int(dataset.height), int(dataset.width), tile)

    @property
    def grid(self) -> TileGrid:
        """Tiles side by side: they overlap only as much as they must, and a small scene is one tile."""
        return TileGrid.over(self.height, self.width, self.tile, 0)

    def sample(self, limit: int, seed: int) -> Iterator[tuple[Span, Span]]:
        """The tiles row by row; if there are more than ``limit``, a random choice by the seed and the scene's name."""
        grid = self.grid
        chosen: Iterable[int] = range(len(grid))
        if len(grid) > limit:
            generator = np.random.default_rng([seed, zlib.crc32(Path(self.path).name.encode(errors="replace"))])
            chosen = sorted(generator.choice(len(grid), limit, replace=False).tolist())
        columns = len(grid.columns)
        for index in chosen:
            yield grid.rows[index // columns], grid.columns[index % columns]


def fair_limit(sizes: Sequence[int], budget: int) -> int:
    """The most tiles (at least 1) that a scene may give within a ``budget`` of which small scenes take less."""
    limit, left, scenes = 0, budget, len(sizes)
    for size in sorted(sizes):
        if size > left // scenes:
            return max(1, left // scenes)
        limit, left, scenes = size, left - size, scenes - 1
    return max(1, limit)


class LabelMaps:
    """The label maps ``NAME_labels.tif`` of a folder, found by the names of scenes; DatasetError if it holds none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.class_names: tuple[str, ...] = ()  # of the first map that has them
        if not folder.is_dir():
            raise DatasetError(f"label maps {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        if not any(folder.glob("*_labels.tif")):
            raise DatasetError(
                f"{folder} holds no label map (NAME_labels.tif)",
                hint=f"make them: cdkd-edge segment SCENES -o {folder}",
            )

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    def open(self, scene: TiledScene) -> Any:
        """The label map of a scene, opened, None if there is none; DatasetError if it does not fit the scene."""
        path = self.folder / f"{Path(scene.path).stem}_labels.tif"
        if not path.is_file():
            return None
        try:
            dataset: Any = open_scene(path)
        except SceneError as error:
            raise DatasetError(f"label map {path} cannot be read: {error}") from None
        if problem := self._problem(dataset, scene):
            dataset.close()
            raise DatasetError(f"label map {path} {problem}")
        return dataset

    def _problem(self, dataset: Any, scene: TiledScene) -> str | None:
        if dataset.count != 1 or dataset.dtypes[0] != "uint8":
            return f"holds {dataset.count} bands of {dataset.dtypes[0]}, not one of uint8"
        if (dataset.height, dataset.width) != (scene.height, scene.width):
            return f"is {dataset.width} x {dataset.height} px, its scene {scene.width} x {scene.height}"
        with open_scene(scene.path) as image:
            if problem := place_problem(image, dataset):
                return f"{problem} ({scene.path})"
        names = tuple(filter(None, (name.strip() for name in dataset.tags().get("CLASSES", "").split(","))))
        self.class_names = self.class_names or names
        if names and names != self.class_names:
            return f"has the classes {', '.join(names)}; those before it have {', '.join(self.class_names)}"
        return None


@dataclass
class ScanReport:
    """Numbers and notes of a scan."""

    scanned: int = 0  # tiles looked at
    skipped: Counter[str] = field(default_factory=Counter)  # tiles passed over, by reason
    broken: list[str] = field(default_factory=list)  # errors of the scenes that were skipped
    without_label_map: list[str] = field(default_factory=list)
    reading_notes: dict[str, list[str]] = field(default_factory=dict)  # how scenes were read, by path


@dataclass(frozen=True)
class Candidates:
    """Descriptions of the tiles that may be chosen, in order of scene and place."""

    scenes: tuple[TiledScene, ...]
    scene: npt.NDArray[np.int32]  # index of the scene, ``[N]``
    place: npt.NDArray[np.int32]  # left and upper border, px, ``[N, 2]``
    features: npt.NDArray[np.float32]  # ``[N, 25]``, see :mod:`.descriptors`
    thumbnails: npt.NDArray[np.float16]  # ``[N, 192]``
    pixels: npt.NDArray[np.object_]  # SHA-256 of the pixels of each tile, ``[N]``
    labels: npt.NDArray[np.int64] | None  # pixels per label, ``[N, 255]``, if there are label maps
    limits: dict[int, npt.NDArray[np.float32]]  # stretch of each scene that has one, ``[3, 2]``
    report: ScanReport

    def __len__(self) -> int:
        return len(self.pixels)

    def keep(self, mask: npt.NDArray[np.bool_]) -> Candidates:
        """Those for which ``mask`` ``[N]`` is true."""
        names = ("scene", "place", "features", "thumbnails", "pixels", "labels")
        arrays = {name: array[mask] for name in names if (array := getattr(self, name)) is not None}
        return dataclasses.replace(self, **arrays)

    def without_duplicates(self, evaluation: npt.NDArray[np.float16] | None = None) -> Candidates:
        """Those that are no near-duplicate of an earlier one, nor of an evaluation tile (thumbnails ``[M, 192]``)."""
        kept = self
        if evaluation is not None and len(evaluation):
            excluded = match_thumbnails(self.thumbnails.astype(np.float32), evaluation.astype(np.float32))
            self.report.skipped["excluded"] += int(excluded.sum())
            kept = self.keep(~excluded)
        duplicate = find_duplicates(kept.thumbnails.astype(np.float32))
        self.report.skipped["near_duplicate"] += int(duplicate.sum())
        return kept.keep(~duplicate)


def scan_scenes(
    scenes: Sequence[TiledScene],
    options: CalibrateOptions,
    exclusions: Exclusions | None = None,
    label_maps: LabelMaps | None = None,
    progress: Progress = lambda done, total: None,
) -> Candidates:
    """Describe the tiles of all scenes; near-duplicates are still among them.

    Raises:
        SceneError, DatasetError: a scene cannot be read, and broken ones are not skipped; a label map does not fit.
    """
    limit = fair_limit([len(scene.grid) for scene in scenes], options.candidates) if scenes else 0
    total, done = sum(min(limit, len(scene.grid)) for scene in scenes), 0
    scanner = _Scanner(options, exclusions or Exclusions(), label_maps)
    kept: list[tuple[Any, ...]] = []
    for index, scene in enumerate(scenes):
        found: list[tuple[Any, ...] | str] = []
        try:
            for tile in scanner.tiles(scene, index, limit):
                found.append(tile)
                progress(done + len(found), total)
        except SceneError as error:
            if not options.skip_broken:
                named = error.message if scene.path in error.message else f"{scene.path}: {error.message}"
                raise SceneError(named, hint=error.hint or SKIP_BROKEN) from None
            scanner.report.broken.append(error.message)
        else:
            kept += [tile for tile in found if not isinstance(tile, str)]
            scanner.report.skipped.update(tile for tile in found if isinstance(tile, str))
            scanner.report.scanned += len(found)
        done += min(limit, len(scene.grid))
    index_of, places, features, thumbnails, pixels, labels = zip(*kept, strict=True) if kept else ((),) * 6
    return Candidates(
        tuple(scenes),
        np.array(index_of, np.int32),
        np.array(places, np.int32).reshape(-1, 2),
        np.array(features, np.float32).reshape(-1, FEATURES),
        np.array(thumbnails, np.float16).reshape(-1, THUMBNAIL),
        np.array(pixels, object),
        None if label_maps is None else np.array(labels, np.int64).reshape(-1, NO_LABEL),
        scanner.limits,
        scanner.report,
    )


class _Scanner:
    def __init__(self, options: CalibrateOptions, exclusions: Exclusions, label_maps: LabelMaps | None) -> None:
        self._options, self._exclusions, self._label_maps = options, exclusions, label_maps
        self.report = ScanReport()
        self.limits: dict[int, npt.NDArray[np.float32]] = {}

    def tiles(self, scene: TiledScene, index: int, limit: int) -> Iterator[tuple[Any, ...] | str]:
        """Descriptions of a scene's tiles, as :class:`Candidates` has them; for a tile that is passed over, why."""
        options = self._options
        reader = options.reading.open(scene.path)
        label_map = None
        try:
            if reader.limits is not None:
                self.limits[index] = reader.limits
            if self._label_maps is not None:
                label_map = self._label_maps.open(scene)
                if label_map is None:
                    self.report.without_label_map.append(scene.path)
            windows = self._exclusions.windows_of(scene.path)
            pixels = np.empty((3, options.tile, options.tile), np.uint8)
            for row, column in scene.sample(limit, options.seed):
                place = column.start, row.start
                if any(overlaps((*place, options.tile, options.tile), window) for window in windows):
                    yield "excluded"
                    continue
                valid = reader.read_tile(row, column, pixels)
                if valid is not None and 1 - valid.mean() > options.max_nodata:
                    yield "nodata"
                elif is_blank(pixels, valid):
                    yield "blank"
                elif (sha256 := pixels_sha256(pixels)) in self._exclusions.pixels:
                    yield "excluded"
                else:
                    counts = None if self._label_maps is None else _count_labels(label_map, place, options.tile)
                    yield index, place, describe_tile(pixels), make_thumbnail(pixels), sha256, counts
        finally:
            self.report.reading_notes[scene.path] = reader.notes
            reader.close()
            if label_map is not None:
                label_map.close()


def _count_labels(label_map: Any, place: tuple[int, int], tile: int) -> npt.NDArray[np.int64]:
    """Pixels per label of the part of a tile that lies in the scene, ``[255]``; none without a label map."""
    if label_map is None:
        return np.zeros(NO_LABEL, np.int64)
    left, top = max(place[0], 0), max(place[1], 0)
    right, bottom = min(place[0] + tile, label_map.width), min(place[1] + tile, label_map.height)
    try:
        with gdal(f"reading {label_map.name}"):
            labels = label_map.read(1, window=Window(left, top, right - left, bottom - top))
    except SceneError as error:
        raise DatasetError(f"label map {label_map.name} is damaged: {error}") from None
    return np.bincount(labels.ravel(), minlength=256)[:NO_LABEL]


def is_blank(pixels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_] | None) -> bool:
    """Whether no channel varies by half a grey level, or nine tenths are black or white, as undeclared nodata is."""

    def blank(seen: npt.NDArray[np.uint8], least: float) -> bool:
        solid = any((seen == value).all(axis=0).mean() > 0.9 for value in (0, 255))
        return bool(solid or seen.std(axis=1).max() < least)

    # Every fourth pixel first: a picture is seldom blank there and not elsewhere.
    if valid is None and not blank(pixels[:, ::4, ::4].reshape(3, -1), 2):
        return False
    return blank(pixels.reshape(3, -1) if valid is None else pixels[:, valid], 0.5)
