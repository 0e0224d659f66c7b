"""Tiles of images without labels, in the views of :mod:`cdkd_edge.training.views`.

What a place gives depends on its view and on the seed that is given with it, and on nothing that was read before. So a
run that resumes, several processes, and any number of threads read the same pixels.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import rasterio

from cdkd_edge.core.errors import SceneError
from cdkd_edge.distillation.imagery import OPENING, Imagery, Progress, few, tiles_along
from cdkd_edge.precision.exclusions import overlaps
from cdkd_edge.precision.scan_scenes import is_blank
from cdkd_edge.raster.open import gdal
from cdkd_edge.raster.stretch import Limits, NoDataError
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.training.views import Augmentation, TilePlace, UInt8Array, View, as_seen, window_of

# A view needs data in at least half of its pixels. The others get the mean colour; a tile with a border of it still
# shows ground, one of little else only teaches to draw that colour.
MOST_WITHOUT_DATA = 0.5
_ATTEMPTS = 1000  # places tried for one view
_NOTES = 20  # damaged images that are named while a run goes on; all are counted
_REPLACED = 4  # added to a seed, so that draws for different purposes differ
_LOCKS = 16

_DAMAGED, _EXCLUDED, _NO_DATA, _BLANK = REASONS = ("damaged", "excluded", "without_data", "blank")


class Places(Sequence[TilePlace]):
    """The tiles of images as :class:`.TileGrid` lays them, without overlap; a place is worked out when it is asked for.

    Args:
        heights, widths: of the images, px.
        tile: side of a tile, px.
    """

    def __init__(self, heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32], tile: int) -> None:
        self._heights, self._widths, self._tile = heights, widths, tile
        counts = tiles_along(heights.astype(np.int64), tile) * tiles_along(widths.astype(np.int64), tile)
        self._ends = np.cumsum(counts)  # number of the first place of the next image

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> TilePlace:  # type: ignore[override]  # no slices
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"place {index} of {len(self)}")
        image = int(np.searchsorted(self._ends, index, side="right"))
        height, width = int(self._heights[image]), int(self._widths[image])
        first = int(self._ends[image - 1]) if image else 0
        row, column = divmod(index - first, int(tiles_along(width, self._tile)))
        return TilePlace(image, _start(row, height, self._tile), _start(column, width, self._tile))


class SceneTiles:
    """Places and views of images as tiles of T px. Any number of threads may read at once.

    An image smaller than a tile is one place, mirrored at its borders.

    Args:
        arguments, options, exclude, progress: see :class:`.imagery.Imagery`.
        tile: side of a tile, px.
        augmentation: how views differ.
        note: called once with a sentence about each of the first damaged images that are met later.

    Raises:
        SceneError, DatasetError: see :class:`.imagery.Imagery`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        tile: int,
        augmentation: Augmentation = Augmentation(),
        options: SegmentOptions = SegmentOptions(),
        *,
        exclude: Sequence[str] = (),
        progress: Progress = lambda done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.tile, self.augmentation, self._options, self._note = tile, augmentation, options, note
        self.imagery = Imagery(arguments, tile, options, exclude, progress)
        self.places = Places(self.imagery.heights, self.imagery.widths, tile)
        self.damaged: dict[int, str] = {}  # images met so far that cannot be decoded, and why
        self.replaced = dict.fromkeys(REASONS, 0)  # views replaced so far
        self._lock, self._locks = threading.Lock(), [threading.Lock() for _ in range(_LOCKS)]
        # Percentiles of an image are taken when it is first read, so that no pixel is decoded at the start.
        percentiles = options.stretch is not None and options.stretch.percentiles
        self._limits = np.full((len(self.imagery), 3, 2), np.nan, np.float32) if percentiles else None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def notes(self) -> list[str]:
        """What to know of the images, with what was met so far."""
        found = f"{len(self.damaged)} images are damaged and were passed over: {few([*self.damaged.values()])}"
        return [*self.imagery.notes, *([found] if self.damaged else [])]

    @property
    def skipped(self) -> dict[str, int]:
        """Images left out at the start, images found damaged since, and views replaced since, by reason."""
        at_start = {"images_unreadable": len(self.imagery.unreadable), "images_excluded": len(self.imagery.excluded)}
        views = {f"views_{reason}": count for reason, count in self.replaced.items()}
        return {**at_start, "images_damaged": len(self.damaged), **views}

    def usable(self, place: TilePlace) -> bool:
        """Whether :meth:`read` would give a place as it is. SceneError with ``strict``: its image is damaged."""
        return not isinstance(self._read(place, View()), str)

    def read(
        self,
        place: TilePlace,
        view: View,
        seed: Sequence[int] = (),
        among: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> UInt8Array:
        """Read a view of a place, RGB uint8 ``[3, T, T]``.

        Where the view cannot be used (blank as for `calibrate`, more than half of it without data, damaged, or of an
        evaluation set), the same view of another place comes in its stead. ``seed``, the place and the number of the
        attempt alone decide which.

        Args:
            place, view: see there.
            seed: of the run, and the epoch.
            among: numbers of the places that may take its place. Default: all.

        Raises:
            SceneError: no place can be used; an image was replaced by another. With ``strict``: an image is damaged.
        """
        generator, tried = None, Counter[str]()
        for _ in range(_ATTEMPTS):
            window = self._read(place, view)
            if not isinstance(window, str):
                return as_seen(window, view, self.tile, self.augmentation)
            tried[window] += 1
            with self._lock:
                self.replaced[window] += 1
            if generator is None:
                at = (place.image, place.row + self.tile, place.column + self.tile)  # a start may be negative
                generator = np.random.default_rng([*seed, _REPLACED, *at])
            index = int(generator.integers(len(self) if among is None else len(among)))
            place = self.places[index if among is None else int(among[index])]
        reasons = ", ".join(f"{count} {reason}" for reason, count in tried.items()).replace("_", " ")
        first = f"; {few([*self.damaged.values()])}" if self.damaged else ""
        raise SceneError(f"of {_ATTEMPTS} tiles none can be used: {reasons}{first}")

    def _read(self, place: TilePlace, view: View) -> UInt8Array | str:
        """The pixels of a view ``[3, S, S]``, or why it cannot be used."""
        image = place.image
        shape = int(self.imagery.heights[image]), int(self.imagery.widths[image])
        row, column = window_of(place, view, self.tile, shape)
        rectangle = (column.first, row.first, column.last - column.first, row.last - row.first)
        if any(overlaps(rectangle, window) for window in self.imagery.windows.get(image, ())):
            return _EXCLUDED
        pixels = np.empty((3, row.last - row.first, column.last - column.first), np.uint8)
        try:
            with (
                rasterio.Env(**OPENING),
                gdal("reading"),
                closing(self.imagery.open(image, self._limits_of(image))) as reader,
            ):
                if (reader.height, reader.width) != shape:
                    raise _ReplacedError(f"{self.imagery.shown(image)} was replaced by another while it was read")
                known = reader.warnings
                valid = reader.read_tile(row, column, pixels)
                if reader.warnings != known:  # GDAL fills what it cannot decode, and only warns
                    raise SceneError(f"{self.imagery.shown(image)}: {reader.warnings[-1]}")
        except NoDataError:
            return _NO_DATA
        except SceneError as error:
            problem = self.imagery.named(error, image)
            if self._options.strict or isinstance(error, _ReplacedError):
                raise problem from None
            self._remember(image, problem.message)
            return _DAMAGED
        if valid is not None and 1 - valid.mean() > MOST_WITHOUT_DATA:
            return _NO_DATA
        return _BLANK if is_blank(pixels, valid) else pixels

    def _limits_of(self, image: int) -> Limits | None:
        """How the values of an image are stretched, if by percentiles."""
        if self._limits is None:
            return None
        with self._locks[image % _LOCKS]:
            if np.isnan(self._limits[image]).any():
                with closing(self.imagery.open(image)) as reader:
                    self._limits[image] = reader.limits
            limits: Limits = self._limits[image]
            return limits

    def _remember(self, image: int, problem: str) -> None:
        with self._lock:
            if image in self.damaged:
                return
            self.damaged[image] = problem
            if len(self.damaged) <= _NOTES:
                more = "; further ones are only counted" if len(self.damaged) == _NOTES else ""
                self._note(f"passed over: {problem}{more}")


class _ReplacedError(SceneError):
    """An image is not the one that was looked at."""


def _start(index: int, size: int, tile: int) -> int:
    """First pixel of a tile along an axis, as in :func:`cdkd_edge.raster.grid.tile_axis` without overlap."""
    count = tiles_along(size, tile)
    return -((tile - size) // 2) if count == 1 else round(index * (size - tile) / (count - 1))
