"""How values of any kind become 0..255: one stretch for the whole scene, so that tiles have no seams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window

from cdkd_edge.errors import SceneError

_SAMPLE_SIDE = 1024
"""Percentiles are taken from the scene reduced to at most this many pixels a side."""
_WHOLE_PIXELS = 8192 * 8192
"""Scenes up to this size are reduced as a whole; larger ones by their overviews, or sampled in windows."""
_WINDOWS_A_SIDE, _WINDOW, _EVERY = 16, 256, 4

Limits = npt.NDArray[np.float32]
"""Per band the values that become 0 and 255, ``[3, 2]``."""


@dataclass(frozen=True)
class Stretch:
    """How values become 0..255: by percentiles of the scene's valid pixels, or between two values."""

    low: float
    high: float
    percentiles: bool

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise SceneError(f"a stretch needs low < high, both finite, not {self.low:g} and {self.high:g}")
        if self.percentiles and not (self.low >= 0 and self.high <= 100):
            raise SceneError(f"percentiles lie within 0..100, not {self.low:g} and {self.high:g}")


def stretch_limits(dataset: Any, bands: Sequence[int], stretch: Stretch, name: object) -> Limits:
    """The limits of a stretch on an open dataset.

    Percentiles are those of valid, finite pixels of a sample: the scene reduced to 1024 px a side or, where that would
    mean reading all of a large file that has no overviews, every fourth pixel of 16 x 16 windows spread evenly over it.

    Raises:
        SceneError: there is no valid pixel.
        RasterioError: the file cannot be read.
    """
    if not stretch.percentiles:
        return np.array([[stretch.low, stretch.high]] * len(bands), np.float32)
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in bands]
    for sample in _samples(dataset, bands):
        for values, band in zip(found, sample, strict=True):
            some = band.compressed().astype(np.float32)
            values.append(some[np.isfinite(some)])
    limits = []
    for values in found:
        pixels = np.concatenate(values)
        if pixels.size == 0:
            raise SceneError(f"{name} has no valid pixel to take percentiles from")
        low, high = np.percentile(pixels, [stretch.low, stretch.high])
        limits.append((low, high if high > low else low + 1))
    return np.array(limits, np.float32)


def _samples(dataset: Any, bands: Sequence[int]) -> Iterator[Any]:
    height, width = dataset.height, dataset.width
    small = height * width <= _WHOLE_PIXELS
    if not small and not all(dataset.overviews(band) for band in bands):
        some = list(_windows(dataset, bands))
        if any(not band.mask.all() for sample in some for band in sample):
            yield from some
            return
    scale = min(1.0, _SAMPLE_SIDE / max(height, width))
    shape = (len(bands), max(1, round(height * scale)), max(1, round(width * scale)))
    yield dataset.read(bands, out_shape=shape, masked=True)


def _windows(dataset: Any, bands: Sequence[int]) -> Iterator[Any]:
    """Windows along the file's blocks, so that each costs few of them."""
    block_height, block_width = dataset.block_shapes[bands[0] - 1]
    height, width = min(_WINDOW, dataset.height), min(_WINDOW, dataset.width)
    for top in _spread(dataset.height, height, block_height):
        for left in _spread(dataset.width, width, block_width):
            pixels = dataset.read(bands, window=Window(left, top, width, height), masked=True)
            yield pixels[:, ::_EVERY, ::_EVERY]


def _spread(size: int, window: int, block: int) -> list[int]:
    count = min(_WINDOWS_A_SIDE, size // window)
    places = [round((index + 0.5) * size / count - window / 2) for index in range(count)]
    step = block if block <= window * 4 else 1
    return sorted({min(max(place // step * step, 0), size - window) for place in places})


def stretched(pixels: npt.NDArray[Any], limits: Limits) -> npt.NDArray[np.uint8]:
    """Pixels ``[3, h, w]`` as 0..255."""
    low, high = limits[:, :1, None], limits[:, 1:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # nodata values are often the largest there are
        scaled = (pixels.astype(np.float32) - low) * (255 / (high - low))
    return np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)
