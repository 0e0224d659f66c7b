"""Scenes as uint8 RGB tiles: bands chosen, values stretched, borders reflected, validity known."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window

from cdkd_edge.errors import SceneError
from cdkd_edge.scene.grid import Span
from cdkd_edge.scene.raster import gdal, open_scene
from cdkd_edge.scene.resample import resampled
from cdkd_edge.scene.stretch import Stretch as Stretch
from cdkd_edge.scene.stretch import stretch_limits, stretched
from cdkd_edge.scene.upright import Upright

Bands = tuple[int, int, int]

INVALID_FILL = np.array([124, 116, 104], np.uint8).reshape(3, 1, 1)
"""Pixels without data enter the network as its mean colour, which is zero after normalisation."""

_SEQUENTIAL = ("PNG", "JPEG", "GIF")


class SceneReader:
    """One open scene. Not thread-safe: use it from the thread that reads.

    Args:
        path: anything GDAL opens.
        bands: red, green and blue, 1-based; default: by colour tags, and as upstream where there are none.
        stretch: how values become 0..255.
        limits: of a reader that had the same file open; spares another look at the whole scene for percentiles.
        gsd: resample to this ground sample distance, m (:mod:`.resample`).

    Raises:
        SceneError: the file is no raster, has no usable bands, or holds values other than 0..255
            and no stretch is given.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        bands: Sequence[int] | None = None,
        stretch: Stretch | None = None,
        limits: npt.NDArray[np.float32] | None = None,
        gsd: float | None = None,
    ) -> None:
        self.path = path
        self.gsd = gsd
        self._values: npt.NDArray[Any] | None = None
        self._source: Any = open_scene(path)
        self._dataset = self._source
        try:
            self.notes: list[str] = [self._source.note] if isinstance(self._source, Upright) else []
            self.bands = self._choose_bands(bands)
            self._float = any(np.dtype(self._dataset.dtypes[band - 1]).kind == "f" for band in self.bands)
            self._masked = self._float or not all(
                MaskFlags.all_valid in flags for flags in self._dataset.mask_flag_enums
            )
            self.limits = self._stretch_limits(stretch) if limits is None else limits
            if gsd is not None:
                with gdal(f"resampling {self.path}"):
                    self._dataset, how = resampled(self._source, gsd)
                self.notes.append(how)
                flags = self._dataset.mask_flag_enums
                self._masked = self._masked or not all(MaskFlags.all_valid in flag for flag in flags)
        except BaseException:
            self.close()
            raise

    @property
    def height(self) -> int:
        """Rows, px."""
        return int(self._dataset.height)

    @property
    def width(self) -> int:
        """Columns, px."""
        return int(self._dataset.width)

    @property
    def files(self) -> list[str]:
        """The files it consists of as GDAL names them, sidecars and what a VRT refers to included."""
        with gdal(f"opening {self.path}"):
            return list(self._source.files)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of the blocks in which the file is stored, px."""
        height, width = self._dataset.block_shapes[self.bands[0] - 1]
        return int(height), int(width)

    @property
    def pixel_bytes(self) -> int:
        """Bytes that a pixel takes in memory: red, green, blue, validity if it may be without data, and of
        floats some more on their way to bytes."""
        return 3 + self._masked + 4 * self._float

    @property
    def sequential(self) -> bool:
        """Whether the format can only be decoded from its beginning, so that a second reader would do it all again."""
        source = self._source
        return (source.stored_driver if isinstance(source, Upright) else source.driver) in _SEQUENTIAL

    @property
    def georeference(self) -> dict[str, Any]:
        """What places the scene on Earth, as keyword arguments for a rasterio writer."""
        dataset = self._dataset
        place: dict[str, Any] = {}
        if dataset.crs is not None:
            place["crs"] = dataset.crs
        if not dataset.transform.is_identity:
            place["transform"] = dataset.transform
        points, points_crs = dataset.gcps
        if points and "transform" not in place:
            place.update(gcps=points, crs=points_crs)
        # Polynomials that lack a term are of no use to anybody; those of a resampled scene GDAL leaves out itself.
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
        """Read one tile into an engine's buffer.

        Args:
            row, column: where the tile lies; what is beyond the scene is reflected.
            out: uint8 ``[3, T, T]``, contiguous, written in place.

        Returns:
            Validity ``[T, T]``, or None where every pixel is valid.

        Raises:
            SceneError: the file cannot be read there.
        """
        tile = out.shape[1]
        top, left = max(row.start, 0), max(column.start, 0)
        bottom, right = min(row.start + tile, self.height), min(column.start + tile, self.width)
        inside = (bottom - top, right - left) == (tile, tile)
        pixels, valid = self.read_window(top, left, bottom - top, right - left, out=out if inside else None)
        if inside:
            if pixels is not out:
                out[:] = pixels
            return valid
        rows = reflected(row.start, tile, self.height) - top
        columns = reflected(column.start, tile, self.width) - left
        out[:] = pixels[:, rows[:, None], columns]
        return valid if valid is None else valid[rows[:, None], columns]

    def read_window(
        self,
        top: int,
        left: int,
        height: int,
        width: int,
        *,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_] | None]:
        """Read a rectangle of the scene.

        Args:
            top, left, height, width: the rectangle, px; it lies within the scene.
            out: uint8 ``[3, h, w]`` that may be used for the pixels.

        Returns:
            RGB ``[3, h, w]``, and validity ``[h, w]`` or None where every pixel is valid.

        Raises:
            SceneError: the file cannot be read there.
        """
        window = Window(left, top, width, height)
        with gdal(f"reading {self.path}"):
            if self.limits is None:
                pixels: npt.NDArray[Any] = self._dataset.read(self.bands, window=window, out=out)
            else:
                pixels = self._dataset.read(self.bands, window=window, out=self._place_for((3, height, width)))
            valid = self._dataset.dataset_mask(window=window) != 0 if self._masked else None
        if self._float:
            finite = np.isfinite(pixels).all(axis=0)
            valid = finite if valid is None else valid & finite
        if self.limits is not None:
            pixels = stretched(pixels, self.limits)
        if valid is None or valid.all():
            return pixels, None
        np.copyto(pixels, INVALID_FILL, where=~valid)
        return pixels, valid

    def _place_for(self, shape: tuple[int, int, int]) -> npt.NDArray[Any] | None:
        """An array for values before they are stretched, the same again and again: pieces of this size that come and
        go leave the heap in holes. None: of bands of several kinds."""
        kinds = {self._dataset.dtypes[band - 1] for band in self.bands}
        if len(kinds) > 1:
            return None
        size = math.prod(shape)
        if self._values is None or self._values.size < size:
            self._values = np.empty(size, kinds.pop())
        return self._values[:size].reshape(shape)

    def another(self) -> SceneReader:
        """The same scene opened once more, for another thread."""
        return SceneReader(self.path, bands=self.bands, limits=self.limits, gsd=self.gsd)

    def overview(self, longest_side: int) -> npt.NDArray[np.uint8]:
        """The whole scene as a small RGB picture, ``[H, W, 3]``, with the same bands and stretch as its tiles."""
        scale = min(1.0, longest_side / max(self.height, self.width))
        shape = (3, max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        with gdal(f"reading {self.path}"):
            pixels = self._dataset.read(self.bands, out_shape=shape)
        if self.limits is not None:
            pixels = stretched(np.nan_to_num(pixels), self.limits)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))

    def _choose_bands(self, bands: Sequence[int] | None) -> Bands:
        dataset, count = self._dataset, self._dataset.count
        if count == 0:
            raise SceneError(
                f"{self.path} holds no bands" + (" of its own, only subdatasets" if dataset.subdatasets else ""),
                hint=f"name one, e.g. {dataset.subdatasets[0]}" if dataset.subdatasets else None,
            )
        if any(kind.startswith("complex") for kind in dataset.dtypes):  # also complex_int16, unknown to NumPy
            raise SceneError(f"{self.path} holds complex values, not an image")
        if bands is not None:
            if len(bands) != 3 or not all(1 <= band <= count for band in bands):
                shown = ",".join(map(str, bands))
                raise SceneError(f"{self.path} has bands 1..{count}; --bands {shown} does not name three of them")
            return bands[0], bands[1], bands[2]
        meaning = {interp: index for index, interp in reversed(list(enumerate(dataset.colorinterp, 1)))}
        tagged = [meaning.get(color) for color in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
        if all(tagged):
            return tagged[0] or 0, tagged[1] or 0, tagged[2] or 0
        if count == 3:
            return 1, 2, 3
        if count == 4:
            self.notes.append("4 bands without color tags taken as B, G, R, NIR, as upstream does (else: --bands)")
            return 3, 2, 1
        if ColorInterp.palette in dataset.colorinterp:
            raise SceneError(f"{self.path} is a paletted image", hint="expand it: gdal_translate -expand rgb IN OUT")
        raise SceneError(
            f"{self.path} has {count} band{'s' if count > 1 else ''} and no color tags; red, green, blue are needed",
            hint="say which they are, e.g. --bands 3,2,1" if count > 3 else "a grey image works with --bands 1,1,1",
        )

    def _stretch_limits(self, stretch: Stretch | None) -> npt.NDArray[np.float32] | None:
        """Per band ``[3, 2]`` the values that become 0 and 255, or None for 8-bit data as it is."""
        kinds = {self._dataset.dtypes[band - 1] for band in self.bands}
        if stretch is None:
            if kinds != {"uint8"}:
                raise SceneError(
                    f"{self.path} holds {' and '.join(sorted(kinds))} values; the network takes 0..255",
                    hint="choose how they become 0..255: --stretch (percentiles 2..98 of the scene), "
                    "--stretch-percentiles LOW HIGH or --stretch-range LOW HIGH",
                )
            return None
        with gdal(f"reading {self.path}"):
            return stretch_limits(self._source, self.bands, stretch, self.path)


def reflected(start: int, length: int, size: int) -> npt.NDArray[np.intp]:
    """Indices ``start .. start + length - 1`` mirrored into ``0 .. size - 1`` (border pixels not repeated).

    Any distance works, also several times the size; an axis of one pixel repeats it.
    """
    if size == 1:
        return np.zeros(length, np.intp)
    period = 2 * (size - 1)
    position = np.arange(start, start + length) % period
    return np.where(position < size, position, period - position).astype(np.intp)
