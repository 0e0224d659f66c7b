"""Candidates: tiles of all scenes, seen once, of which only a description stays in memory.

A candidate keeps some 600 bytes. How many tiles are looked at is bounded too: a budget is shared by the scenes, those
with few tiles leave their part to the others, and of a scene with more tiles than its part a random choice is looked
at. So neither a thousand scenes nor one of 100000 x 100000 px takes more memory, or more time than the budget allows.

A tile is passed over, and counted, if

* ``nodata``: more of it has no data than is allowed,
* ``blank``: it shows nothing: no channel varies by half a grey level, or nine tenths of it are pure black or pure
  white (borders of scenes that do not say what their nodata value is),
* ``excluded``: it is of an evaluation set,
* ``near_duplicate``: its thumbnail is that of an earlier candidate, or of a tile of an evaluation set (then it counts
  as ``excluded``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.graph.tiles import pixels_sha256
from cdkd_edge.precision.calibration.classes import LabelMaps
from cdkd_edge.precision.calibration.describe import FEATURES, THUMBNAIL, describe, thumbnail
from cdkd_edge.precision.calibration.exclusions import Exclusions, Window, overlaps
from cdkd_edge.precision.calibration.scenes import Source, fair_limit
from cdkd_edge.segment.options import SegmentOptions

_BLANK_STD = 0.5
_SOLID_SHARE = 0.9


@dataclass(frozen=True)
class ScanOptions:
    """How scenes are read and which tiles are passed over."""

    tile: int
    seed: int = 0
    budget: int = 10_000
    """Tiles looked at in all scenes together."""
    max_nodata: float = 0.1
    """Share of a tile."""
    scene: SegmentOptions = SegmentOptions()
    """Bands and stretch."""
    skip_broken: bool = False


@dataclass
class Candidates:
    """Descriptions of the tiles that may be chosen, in order of scene and place."""

    sources: list[Source]
    scene: npt.NDArray[np.int32]
    """Index of the source, ``[N]``."""
    place: npt.NDArray[np.int32]
    """Left and upper border, px, ``[N, 2]``."""
    features: npt.NDArray[np.float32]
    """``[N, 25]``, see :mod:`.describe`."""
    thumbnails: npt.NDArray[np.float16]
    """``[N, 192]``."""
    pixels: list[str]
    """SHA-256 of each tile's pixels."""
    labels: npt.NDArray[np.int64] | None = None
    """Pixels per label, ``[N, 255]``, where label maps were given."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Tiles passed over, by reason."""
    scanned: int = 0
    limits: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Stretch of each source that has one, ``[3, 2]``."""
    broken: list[str] = field(default_factory=list)
    """What was wrong with the scenes that were skipped."""
    notes: list[str] = field(default_factory=list)
    said: dict[str, list[str]] = field(default_factory=dict)
    """Notes on how scenes were read."""

    def __len__(self) -> int:
        return len(self.pixels)

    def kept(self, mask: npt.NDArray[np.bool_]) -> Candidates:
        """Those for which ``mask`` ``[N]`` is true."""
        return Candidates(
            self.sources,
            self.scene[mask],
            self.place[mask],
            self.features[mask],
            self.thumbnails[mask],
            [sha for sha, keep in zip(self.pixels, mask.tolist(), strict=True) if keep],
            None if self.labels is None else self.labels[mask],
            self.skipped,
            self.scanned,
            self.limits,
            self.broken,
            self.notes,
            self.said,
        )


@dataclass
class _Tile:
    place: tuple[int, int]
    features: npt.NDArray[np.float32]
    thumbnail: npt.NDArray[np.float16]
    pixels: str
    labels: npt.NDArray[np.int64] | None


Progress = Callable[[int, int], None]


def scan(
    sources: Sequence[Source],
    options: ScanOptions,
    exclusions: Exclusions | None = None,
    label_maps: LabelMaps | None = None,
    progress: Progress = lambda done, total: None,
) -> Candidates:
    """Look at the tiles of all scenes; near-duplicates are still among the result (:mod:`.duplicates`).

    Raises:
        SceneError: a scene cannot be read, and broken ones are not to be skipped.
        DatasetError: a label map does not fit.
    """
    limit = fair_limit([len(source.grid) for source in sources], options.budget) if sources else 0
    total = sum(min(limit, len(source.grid)) for source in sources)
    result = Candidates(list(sources), *_nothing())
    rows: list[tuple[int, _Tile]] = []
    exclusions = exclusions or Exclusions()
    done = 0
    for index, source in enumerate(sources):
        tiles: list[_Tile] = []
        skipped: Counter[str] = Counter()
        before = done
        try:
            for tile in _tiles_of(source, index, limit, options, exclusions, label_maps, result):
                if isinstance(tile, str):
                    skipped[tile] += 1
                else:
                    tiles.append(tile)
                done += 1
                progress(done, total)
        except SceneError as error:
            if not options.skip_broken:
                named = error.message if source.path in error.message else f"{source.path}: {error.message}"
                hint = error.hint or "leave it out, or skip what cannot be read with --skip-broken"
                raise SceneError(named, hint=hint) from None
            result.broken.append(error.message)
            done = before + min(limit, len(source.grid))
            continue
        rows += [(index, tile) for tile in tiles]
        result.skipped += skipped
        result.scanned += len(tiles) + skipped.total()
    if not rows:
        return result
    result.scene = np.array([index for index, _ in rows], np.int32)
    result.place = np.array([tile.place for _, tile in rows], np.int32)
    result.features = np.stack([tile.features for _, tile in rows])
    result.thumbnails = np.stack([tile.thumbnail for _, tile in rows])
    result.pixels = [tile.pixels for _, tile in rows]
    if label_maps is not None:
        none = np.zeros(NO_LABEL, np.int64)
        result.labels = np.stack([none if tile.labels is None else tile.labels for _, tile in rows])
    return result


def _tiles_of(
    source: Source,
    index: int,
    limit: int,
    options: ScanOptions,
    exclusions: Exclusions,
    label_maps: LabelMaps | None,
    result: Candidates,
) -> Iterator[_Tile | str]:
    """Descriptions of a scene's tiles, or why one is passed over."""
    reader = options.scene.open(source.path)
    label_map = None
    try:
        if reader.limits is not None:
            result.limits[index] = reader.limits
        if label_maps is not None:
            label_map = label_maps.of(source.path, source.height, source.width)
            if label_map is None:
                result.notes.append(f"{source.path} has no label map")
        windows = exclusions.windows_of(source.path)
        pixels = np.empty((3, options.tile, options.tile), np.uint8)
        for row, column in source.places(limit, options.seed):
            if any(overlaps((column.start, row.start, options.tile, options.tile), window) for window in windows):
                yield "excluded"
                continue
            valid = reader.read_tile(row, column, pixels)
            if valid is not None and 1 - valid.mean() > options.max_nodata:
                yield "nodata"
            elif _blank(pixels, valid):
                yield "blank"
            elif (sha256 := pixels_sha256(pixels)) in exclusions.pixels:
                yield "excluded"
            else:
                counts = None if label_map is None else label_map.count(row, column, options.tile)
                yield _Tile((column.start, row.start), describe(pixels), thumbnail(pixels), sha256, counts)
    finally:
        result.said[source.path] = reader.notes
        reader.close()
        if label_map is not None:
            label_map.close()


def _blank(pixels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_] | None) -> bool:
    # Every fourth pixel first: a picture is seldom blank there and not elsewhere.
    if valid is None:
        sample = pixels[:, ::4, ::4]
        if sample.reshape(3, -1).std(axis=1).max() >= 2 and not _solid(sample):
            return False
    seen = pixels.reshape(3, -1) if valid is None else pixels[:, valid]
    return bool(seen.std(axis=1).max() < _BLANK_STD or _solid(seen))


def _solid(pixels: npt.NDArray[np.uint8]) -> bool:
    return any((pixels == value).all(axis=0).mean() > _SOLID_SHARE for value in (0, 255))


def window_of(candidates: Candidates, index: int) -> Window:
    """Where a candidate lies in its scene."""
    x, y = candidates.place[index].tolist()
    side = candidates.sources[int(candidates.scene[index])].tile
    return x, y, side, side


def _nothing() -> tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float16], list[str]
]:
    return (
        np.empty(0, np.int32),
        np.empty((0, 2), np.int32),
        np.empty((0, FEATURES), np.float32),
        np.empty((0, THUMBNAIL), np.float16),
        [],
    )
