"""Stretches values of any kind to 0..255, with the same limits for the whole scene, so that tiles have no seams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.bands import Validity

_SAMPLE_SIDE = 1024  # longest side of the reduced scene from which percentiles are taken, px
_WHOLE_PIXELS = 8192 * 8192
"""Largest scene without overviews that is reduced as a whole; of a larger one, windows are sampled."""
_WINDOWS_A_SIDE, _WINDOW, _EVERY = 16, 256, 4
_STRIP_PIXELS = 1 << 21  # pixels read at once of a file in strips
_ROWS = 32  # rows stretched at once
_ENOUGH = 1000  # valid pixels of a band that make a sample; with fewer, all of the file is read

Limits = npt.NDArray[np.float32]  # per band the values that become 0 and 255, ``[3, 2]``


@dataclass(frozen=True)
class Stretch:
    """The values that become 0 and 255: percentiles of the scene's valid pixels, or the two values themselves."""

    low: float
    high: float
    percentiles: bool

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"a stretch needs low < high, both finite, got {self.low:g} and {self.high:g}")
        if self.percentiles and not (self.low >= 0 and self.high <= 100):
            raise UsageError(f"percentiles must lie within 0..100, got {self.low:g} and {self.high:g}")


def stretch_limits(
    dataset: Any, bands: Sequence[int], stretch: Stretch, name: object, validity: Validity | None = None
) -> Limits:
    """The limits of a stretch on an open dataset.

    Percentiles are those of the valid, finite pixels of a sample: the scene reduced to 1024 px a side or, of a large
    file without overviews, every fourth pixel of 16 x 16 windows spread evenly over it (of a file in strips, every
    fourth row of 16 such bands). No block is decoded twice. If the sample has almost no valid pixel, all of the file is
    read.

    Raises:
        SceneError: there is no valid pixel.
        RasterioError: the file cannot be read.
    """
    if not stretch.percentiles:
        return np.array([[stretch.low, stretch.high]] * len(bands), np.float32)
    limits = []
    for pixels in _sample(_Masked(dataset, bands, validity or Validity(dataset, bands))):
        if pixels.size == 0:
            raise SceneError(f"{name} has no valid pixel to take percentiles from")
        low, high = np.percentile(pixels, [stretch.low, stretch.high])
        limits.append((low, high if high > low else low + 1))
    return np.array(limits, np.float32)


@dataclass(frozen=True)
class _Masked:
    """Bands of a raster, with the validity of their pixels."""

    dataset: Any
    bands: Sequence[int]
    validity: Validity

    def read(self, window: Window, step: tuple[int, int]) -> Any:
        """Every ``step``-th row and column of a window as a masked array ``[bands, h, w]``."""
        every = np.s_[..., :: step[0], :: step[1]]
        pixels = self.dataset.read(self.bands, window=window)[every]
        valid = self.validity.read(self.dataset, window=window)
        return _masked(pixels, None if valid is None else valid[every])

    def reduced(self, height: int, width: int) -> Any:
        """All of it as a masked array ``[bands, height, width]``."""
        pixels = self.dataset.read(self.bands, out_shape=(len(self.bands), height, width))
        return _masked(pixels, self.validity.read(self.dataset, out_shape=(height, width)))


def _masked(pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None) -> Any:
    return np.ma.MaskedArray(pixels, False if valid is None else np.broadcast_to(~valid, pixels.shape))


def _sample(source: _Masked) -> list[npt.NDArray[np.float32]]:
    """Valid pixels of each band."""
    dataset, count = source.dataset, len(source.bands)
    height, width = dataset.height, dataset.width
    small = height * width <= _WHOLE_PIXELS
    if not small and not all(dataset.overviews(band) for band in source.bands):
        found = _valid(_windows(source), count)
        if all(pixels.size >= _ENOUGH for pixels in found):
            return found
    scale = min(1.0, _SAMPLE_SIDE / max(height, width))
    return _valid([source.reduced(max(1, round(height * scale)), max(1, round(width * scale)))], count)


def _valid(samples: Iterable[Any], count: int) -> list[npt.NDArray[np.float32]]:
    """The finite, unmasked pixels of samples ``[bands, h, w]``, band by band."""
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(count)]
    for sample in samples:
        for values, band in zip(found, sample, strict=True):
            some = band.compressed().astype(np.float32)
            values.append(some[np.isfinite(some)])
    return [np.concatenate(values) for values in found]


def _windows(source: _Masked) -> Iterator[Any]:
    """Samples along the file's blocks, from top to bottom, so that each decodes few of them."""
    dataset = source.dataset
    block_height, block_width = dataset.block_shapes[source.bands[0] - 1]
    height, width = min(_WINDOW, dataset.height), min(_WINDOW, dataset.width)
    tops = _spread(dataset.height, height, block_height)
    if block_width >= dataset.width > _WINDOW:
        # Strips: narrow windows beside each other would decode the same rows again and again.
        columns = max(1, dataset.width * _EVERY // (_WINDOWS_A_SIDE * _WINDOW))
        rows = max(1, min(block_height, _STRIP_PIXELS // dataset.width))
        for row in (row for top in tops for row in range(top, top + height, max(block_height, _EVERY))):
            window = Window(0, row, dataset.width, min(rows, dataset.height - row))
            yield source.read(window, (_EVERY, columns))
        return
    for top in tops:
        for left in _spread(dataset.width, width, block_width):
            yield source.read(Window(left, top, width, height), (_EVERY, _EVERY))


def _spread(size: int, window: int, block: int) -> list[int]:
    """Starts of windows along an axis: spread evenly, each at the beginning of a block."""
    count = min(_WINDOWS_A_SIDE, size // window)
    places = [round((index + 0.5) * size / count - window / 2) for index in range(count)]
    return sorted({min(max(place // block * block, 0), size - window) for place in places})


def stretched(pixels: npt.NDArray[Any], limits: Limits) -> npt.NDArray[np.uint8]:
    """Stretch pixels ``[3, h, w]`` to 0..255."""
    low, high = limits[:, :1, None], limits[:, 1:, None]
    result = np.empty(pixels.shape, np.uint8)
    for top in range(0, pixels.shape[1], _ROWS):  # floats take four times the room
        scaled = pixels[:, top : top + _ROWS].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # nodata is often the largest value there is
            scaled -= low
            scaled *= 255 / (high - low)
        np.nan_to_num(scaled, copy=False)
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        result[:, top : top + _ROWS] = scaled
    return result
