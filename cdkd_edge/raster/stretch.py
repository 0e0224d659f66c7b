"""Stretches values of any kind to 0..255, with the same limits for the whole scene, so that tiles have no seams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.bands import Validity

_SAMPLE_SIDE = 1024  # longest side of the reduced scene from which percentiles are taken, px
_WHOLE_PIXELS = 8192 * 8192  # largest scene without overviews that is reduced as a whole; a larger one is sampled
_WINDOWS_A_SIDE, _WINDOW, _EVERY = 16, 256, 4
_STRIP_PIXELS = 1 << 21  # pixels read at once of a file in strips
_ROWS = 32  # rows stretched at once
_ENOUGH = 1000  # valid pixels of a band that make a sample; with fewer, all of the file is read

Limits = npt.NDArray[np.float32]  # per band the values that become 0 and 255, ``[3, 2]``


class NoDataError(SceneError):
    """A scene has no valid pixel."""


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


def stretch_limits(dataset: Any, bands: Sequence[int], stretch: Stretch, name: object, validity: Validity) -> Limits:
    """The limits of a stretch on an open dataset.

    Percentiles are those of the valid, finite pixels of a sample: the scene reduced to 1024 px a side or, of a large
    file without overviews, every fourth pixel of 16 x 16 windows spread evenly over it (of a file in strips, every
    fourth row of 16 such bands). No block is decoded twice. If the sample has almost no valid pixel, all of the file is
    read.

    Raises:
        NoDataError, RasterioError: there is no valid pixel; the file cannot be read.
    """
    if not stretch.percentiles:
        return np.array([[stretch.low, stretch.high]] * len(bands), np.float32)
    limits = []
    for pixels in _sample(dataset, bands, validity):
        if pixels.size == 0:
            raise NoDataError(f"{name} has no valid pixel to take percentiles from")
        low, high = np.percentile(pixels, [stretch.low, stretch.high])
        limits.append((low, high if high > low else low + 1))
    return np.array(limits, np.float32)


def _sample(dataset: Any, bands: Sequence[int], validity: Validity) -> list[npt.NDArray[np.float32]]:
    """Valid, finite pixels of each band."""
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in bands]

    def take(window: Window | None, shape: tuple[int, int] | None, steps: tuple[int, int]) -> None:
        """Add every so-many-th row and column of a window, or all of the raster reduced to a shape."""
        every = np.s_[..., :: steps[0], :: steps[1]]
        pixels = dataset.read(bands, window=window, out_shape=shape and (len(bands), *shape))[every].astype(np.float32)
        known = np.isfinite(pixels)
        if (valid := validity.read(dataset, window=window, out_shape=shape)) is not None:
            known &= valid[every]
        for values, band, where in zip(found, pixels, known, strict=True):
            values.append(band[where])

    height, width = dataset.height, dataset.width
    if height * width > _WHOLE_PIXELS and not all(dataset.overviews(band) for band in bands):
        for window, steps in _windows(dataset, bands[0]):
            take(window, None, steps)
    if any(sum(part.size for part in parts) < _ENOUGH for parts in found):
        found = [[] for _ in bands]
        scale = min(1.0, _SAMPLE_SIDE / max(height, width))
        take(None, (max(1, round(height * scale)), max(1, round(width * scale))), (1, 1))
    return [np.concatenate(parts) for parts in found]


def _windows(dataset: Any, band: int) -> Iterator[tuple[Window, tuple[int, int]]]:
    """Windows along the file's blocks, from top to bottom, so that each decodes few of them; their steps."""
    block_height, block_width = dataset.block_shapes[band - 1]
    height, width = min(_WINDOW, dataset.height), min(_WINDOW, dataset.width)
    tops = _spread(dataset.height, height, block_height)
    if block_width >= dataset.width > _WINDOW:
        # Strips: narrow windows beside each other would decode the same rows again and again.
        columns = max(1, dataset.width * _EVERY // (_WINDOWS_A_SIDE * _WINDOW))
        rows = max(1, min(block_height, _STRIP_PIXELS // dataset.width))
        for row in (row for top in tops for row in range(top, top + height, max(block_height, _EVERY))):
            yield Window(0, row, dataset.width, min(rows, dataset.height - row)), (_EVERY, columns)
        return
    for top in tops:
        for left in _spread(dataset.width, width, block_width):
            yield Window(left, top, width, height), (_EVERY, _EVERY)


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
