"""Reads scenes as uint8 RGB tiles: chooses bands, stretches values, reflects borders, knows pixels without data."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.core.errors import CdkdEdgeError, SceneError
from cdkd_edge.raster.bands import Upright, Validity, choose_bands
from cdkd_edge.raster.grid import Span
from cdkd_edge.raster.open import Warnings, gdal, open_scene
from cdkd_edge.raster.resample import ground_sample_distance, resampled
from cdkd_edge.raster.stretch import Stretch as Stretch
from cdkd_edge.raster.stretch import stretch_limits, stretched

INVALID_FILL = np.array([124, 116, 104], np.uint8).reshape(3, 1, 1)  # no data: the mean colour, 0 once normalised
_SEQUENTIAL = ("PNG", "JPEG", "GIF")

_MOST_SIDE, _MOST_PIXELS = 10_000_000, 10**12  # largest side and area of a scene, px: those of all land at 10 m
_NAMES, _MOST_NOTES = 3, 100  # images named with a note; different notes
_MOST_BLOCK = 1 << 29  # largest block, bytes; GDAL decodes it as a whole


class SceneReader:
    """One open scene. Not thread-safe: use it from the thread that reads.

    Args:
        path: anything GDAL opens.
        bands: red, green and blue, 1-based. Default: as :func:`.bands.choose_bands` finds them.
        stretch: how values become 0..255.
        limits: of an earlier reader of the same file; saves reading all of it again for percentiles.
        gsd: resample to this ground sample distance, m (:mod:`.resample`).
        strict: whether a GDAL warning is an error.

    Raises:
        SceneError: the file is no raster, has no usable bands, is too large, or needs a stretch and none is given.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        bands: Sequence[int] | None = None,
        stretch: Stretch | None = None,
        limits: npt.NDArray[np.float32] | None = None,
        gsd: float | None = None,
        strict: bool = False,
    ) -> None:
        self.path, self.gsd = path, gsd
        self._warnings = Warnings(strict=strict)
        self._values: npt.NDArray[Any] | None = None
        self._source: Any = open_scene(path, self._warnings)
        self._dataset = self._source
        self._notes: list[str] = [self._source.note] if isinstance(self._source, Upright) else []
        try:
            with self._gdal("opening"):
                self.bands, how = choose_bands(self._source, path, bands)
                self._notes += [how] if how else []
                self._indexes: tuple[int, ...] = self.bands
                self._float = any(np.dtype(self._source.dtypes[band - 1]).kind == "f" for band in self.bands)
                self._validity = Validity(self._source, self.bands)
                self._require_bounded(self._source)
                if not all(map(math.isfinite, self._source.transform)):
                    note = "its geotransform is not finite and is ignored: the label map has no place on Earth"
                    self._notes.append(note)
            self.limits = self._stretch_limits(stretch) if limits is None else limits
            if gsd is not None:
                with self._gdal("resampling"):
                    self._dataset, how = resampled(self._source, gsd, self.bands, self._validity)
                    self._notes.append(how)
                    if self._dataset is not self._source:
                        self._indexes = (1, 2, 3)
                        self._validity = Validity(self._dataset, self._indexes)
                    self._require_bounded(self._dataset)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError | LookupError | OverflowError) and not isinstance(error, CdkdEdgeError):
                raise SceneError(f"{path} has a header that makes no sense: {error}") from None
            raise
        self.height, self.width = int(self._dataset.height), int(self._dataset.width)

    def _gdal(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return gdal(f"{doing} {self.path}", self._warnings)

    def _require_bounded(self, dataset: Any) -> None:
        """Refuse sizes that a header of a few bytes can declare and no machine can label."""
        height, width = dataset.height, dataset.width
        if max(height, width) > _MOST_SIDE or height * width > _MOST_PIXELS:
            raise SceneError(
                f"{self.path} would be {width} x {height} px; at most {_MOST_SIDE:,} px a side and "
                f"{_MOST_PIXELS:,} px in all are possible",
                hint="cut it into parts, e.g. with gdal_translate -srcwin",
            )
        rows, columns = dataset.block_shapes[self._indexes[0] - 1]
        together = dataset.count if dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL" else 1
        if rows * columns * together * np.dtype(dataset.dtypes[self._indexes[0] - 1]).itemsize > _MOST_BLOCK:
            raise SceneError(
                f"{self.path} is stored in blocks of {columns} x {rows} px, too large to be decoded one by one",
                hint="tile it: gdal_translate -co TILED=YES IN OUT.tif",
            )

    @property
    def notes(self) -> list[str]:
        """What the user should know about how the scene is read, and GDAL's warnings so far."""
        return [*self._notes, *self.warnings]

    @property
    def warnings(self) -> list[str]:
        """GDAL's warnings so far, a sentence for each kind."""
        return self._warnings.notes

    @property
    def files(self) -> list[str]:
        """The names of its files, with sidecars and the files of a VRT."""
        with gdal(f"opening {self.path}"):
            return list(self._source.files)

    @property
    def stored(self) -> str:
        """How many bands the file has, and of which type: ``4 x uint16``."""
        return f"{self._source.count} x {self._source.dtypes[0]}"

    @property
    def own_gsd(self) -> float | None:
        """The scene's own ground sample distance, m (of rows and columns the larger); None if it does not tell."""
        if self._source.crs is not None:
            with contextlib.suppress(SceneError), self._gdal("placing"):
                return max(ground_sample_distance(self._source))
        return None

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of the blocks in which the file is stored, px."""
        height, width = self._dataset.block_shapes[self._indexes[0] - 1]
        return int(height), int(width)

    @property
    def pixel_bytes(self) -> int:
        """Memory of a pixel, bytes: red, green, blue, validity if any may have no data, floats before the stretch."""
        return 3 + (self._float or bool(self._validity)) + 4 * self._float

    @property
    def sequential(self) -> bool:
        """Whether the format is always decoded from its beginning, so that a second reader would repeat all of it."""
        source = self._source
        return (source.stored_driver if isinstance(source, Upright) else source.driver) in _SEQUENTIAL

    @property
    def georeference(self) -> dict[str, Any]:
        """The scene's place on Earth, as keyword arguments for a rasterio writer."""
        dataset = self._dataset
        place: dict[str, Any] = {}
        if dataset.crs is not None:
            place["crs"] = dataset.crs
        if not dataset.transform.is_identity and all(map(math.isfinite, dataset.transform)):
            place["transform"] = dataset.transform
        points, points_crs = dataset.gcps
        if points and "transform" not in place:
            place.update(gcps=points, crs=points_crs)
        # Polynomials may lack a term; GDAL itself leaves out those of a resampled scene.
        with contextlib.suppress(KeyError, ValueError, IndexError):
            if dataset.rpcs is not None:
                place["rpcs"] = dataset.rpcs
        return place

    def close(self) -> None:
        """Close the dataset."""
        if self._dataset is not self._source:
            self._dataset.close()
        self._source.close()

    def read_tile(self, row: Span, column: Span, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_] | None:
        """Read one tile into ``out``, uint8 ``[3, T, T]``; beyond its borders the scene is reflected.

        Returns:
            Validity ``[T, T]``, or None where every pixel is valid.
        """
        tile = out.shape[1]
        top, left = max(row.start, 0), max(column.start, 0)
        bottom, right = min(row.start + tile, self.height), min(column.start + tile, self.width)
        pixels, valid = self.read_window(top, left, bottom - top, right - left)
        if pixels.shape == out.shape:
            out[:] = pixels
            return valid
        rows = reflected(row.start, tile, self.height) - top
        columns = reflected(column.start, tile, self.width) - left
        out[:] = pixels[:, rows[:, None], columns]
        return valid if valid is None else valid[rows[:, None], columns]

    def read_window(
        self, top: int, left: int, height: int, width: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        """Read a rectangle within the scene, px: RGB ``[3, h, w]``, and validity ``[h, w]`` or None if all is valid."""
        window = Window(left, top, width, height)
        with self._gdal("reading"):
            out = None if self.limits is None else self._place_for(height, width)
            pixels: npt.NDArray[Any] = self._dataset.read(self._indexes, window=window, out=out)
            valid = self._validity.read(self._dataset, window=window)
        if self._float:
            finite = np.isfinite(pixels).all(axis=0)
            valid = finite if valid is None else valid & finite
        if self.limits is not None:
            pixels = stretched(pixels, self.limits)
        if valid is None or valid.all():
            return pixels, None
        np.copyto(pixels, INVALID_FILL, where=~valid)
        return pixels, valid

    def _place_for(self, height: int, width: int) -> npt.NDArray[Any] | None:
        """A reused array for values before the stretch (freed ones would fragment the heap); None for mixed types."""
        kinds = {self._dataset.dtypes[band - 1] for band in self._indexes}
        if len(kinds) > 1:
            return None
        size = 3 * height * width
        if self._values is None or self._values.size < size:
            self._values = np.empty(size, kinds.pop())
        return self._values[:size].reshape(3, height, width)

    def another(self) -> SceneReader:
        """The same scene opened once more, for another thread."""
        other = SceneReader(self.path, bands=self.bands, limits=self.limits, gsd=self.gsd)
        other._warnings = self._warnings
        return other

    def overview(self, longest_side: int) -> npt.NDArray[np.uint8]:
        """The whole scene as a small RGB picture, ``[H, W, 3]``, with the same bands and stretch as its tiles."""
        scale = min(1.0, longest_side / max(self.height, self.width))
        shape = (3, max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        with self._gdal("reading"):
            pixels = self._dataset.read(self._indexes, out_shape=shape)
        if self.limits is not None:
            pixels = stretched(np.nan_to_num(pixels), self.limits)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))

    def _stretch_limits(self, stretch: Stretch | None) -> npt.NDArray[np.float32] | None:
        """Per band ``[3, 2]`` the values that become 0 and 255; None: 8-bit data stays as it is."""
        if stretch is not None:
            with self._gdal("reading"):
                return stretch_limits(self._source, self.bands, stretch, self.path, self._validity)
        kinds = set()
        for band in self.bands:
            kind, bits = self._source.dtypes[band - 1], self._source.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8")
            kinds.add(f"{bits}-bit" if kind == "uint8" and bits != "8" else kind)
        if kinds != {"uint8"}:
            raise SceneError(
                f"{self.path} holds {' and '.join(sorted(kinds))} values; the network takes 0..255",
                hint="choose how they become 0..255: --stretch (percentiles 2..98 of the scene), "
                "--stretch-percentiles LOW HIGH or --stretch-range LOW HIGH",
            )
        return None


def reflected(start: int, length: int, size: int) -> npt.NDArray[np.intp]:
    """Indices ``start .. start + length - 1``, however far out, mirrored into ``0 .. size - 1``; borders count once."""
    period = max(1, 2 * (size - 1))
    position = np.arange(start, start + length) % period
    return np.where(position < size, position, period - position).astype(np.intp)


class ReadingNotes:
    """Notes on images: each note once, after the names of the first images it is about. Of many notes, the first."""

    def __init__(self) -> None:
        self._about: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self._others = 0

    def add(self, image: str, notes: Iterable[str]) -> None:
        """Add the notes on an image."""
        for note in notes:
            if note not in self._about and len(self._about) >= _MOST_NOTES:
                self._others += 1
                continue
            self._counts[note] += 1
            names = self._about.setdefault(note, [])
            if len(names) < _NAMES:
                names.append(image)

    @property
    def texts(self) -> list[str]:
        """The notes, a line each."""
        more = {note: f" and {count - _NAMES} more" for note, count in self._counts.items() if count > _NAMES}
        texts = [f"{', '.join(names)}{more.get(note, '')}: {note}" for note, names in self._about.items()]
        return [*texts, f"{self._others} more notes"] if self._others else texts


def reading_notes(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes on images, given by image, as :class:`ReadingNotes` says them."""
    found = ReadingNotes()
    for image, about in notes.items():
        found.add(image, about)
    return found.texts
