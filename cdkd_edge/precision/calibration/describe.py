"""What a tile looks like, in 25 numbers; and a thumbnail that recognises it.

Colour is described in Ohta's opponent axes (Ohta, Kanade, Sakai 1980), which are close to the principal axes of
natural colour images: lightness ``(R+G+B)/3``, ``(R-B)/2`` and ``(2G-R-B)/4``. Of each: mean, standard deviation,
2nd and 98th percentile.

Texture is the energy of Haar wavelet bands: with ``L0`` an opponent plane and ``Lb+1`` the 2x2 means of ``Lb``, band
``b`` has the energy ``mean(Lb^2) - mean(Lb+1^2)``. Six bands of lightness, and three of each colour axis from half
resolution on, as the logarithm of the amplitude. One more number says whether fine texture is the same all over the
tile, or one half is water and the other a town.

Numbers are rounded: sums may be taken in another order by another processor, and choices must not depend on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

COLOUR_FEATURES = 12
_LIGHT_BANDS, _COLOUR_BANDS = 6, 3
TEXTURE_FEATURES = _LIGHT_BANDS + 2 * _COLOUR_BANDS + 1
FEATURES = COLOUR_FEATURES + TEXTURE_FEATURES

THUMBNAIL_SIDE = 8
THUMBNAIL = 3 * THUMBNAIL_SIDE**2
_CELLS = 8
_SAMPLE = 128
"""Percentiles are taken of at most this many pixels a side."""

Float = npt.NDArray[np.float32]


def describe(tile: npt.NDArray[np.uint8]) -> Float:
    """The descriptor of a tile.

    Args:
        tile: RGB uint8 ``[3, T, T]``, T >= 32.

    Returns:
        float32 ``[25]``: colour (12), in grey levels; texture (13), logarithms of grey levels.
    """
    side = tile.shape[1] // 2 * 2
    # Colour is described at half resolution, which is what most compressed imagery holds of it.
    halved = _pairs(tile[:, :side, :side].astype(np.uint16)).astype(np.float32) / 4
    red, green, blue = halved
    planes = np.stack([(red + green + blue) / 3, (red - blue) / 2, (2 * green - red - blue) / 4])
    means = planes.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
    step = max(1, side // 2 // _SAMPLE)
    low, high = np.percentile(planes[:, ::step, ::step], [2, 98], axis=(1, 2))
    planes -= means[:, None, None]  # so that differences of squares below keep their digits
    light: Float = (
        tile[:, :side, :side].sum(axis=0, dtype=np.uint16).astype(np.float32)[None] / 3 - means[:1, None, None]
    )
    power = _power(planes)
    finest = _power(light)
    amplitude = np.zeros((3, _LIGHT_BANDS))
    amplitude[0, 0] = finest[0] - power[0]
    evenness = _evenness(light[0], planes[0])
    spread = np.sqrt([finest[0], *power[1:]])
    for band in range(1, _LIGHT_BANDS):
        even = planes.shape[1] // 2 * 2
        if even < 2:
            break
        planes = _pairs(planes[:, :even, :even]) / np.float32(4)
        coarser = _power(planes)
        amplitude[: len(planes), band] = power - coarser
        power = coarser
        if band == _COLOUR_BANDS:
            planes, power = planes[:1], power[:1]
    amplitude = np.log2(1 + np.sqrt(np.maximum(amplitude, 0)))
    texture = [*amplitude[0], *amplitude[1:, 1 : _COLOUR_BANDS + 1].ravel(), evenness]
    descriptor: Float = np.round(np.concatenate([means, spread, low, high, texture]), 3).astype(np.float32)
    return descriptor


def thumbnail(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Means of 8 x 8 cells of a tile ``[3, T, T]``, T >= 8; float16 ``[192]``, in grey levels."""
    return _cells(tile, THUMBNAIL_SIDE).ravel().astype(np.float16)


def standardised(features: Float) -> Float:
    """Descriptors ``[N, 25]`` as points among which Euclidean distance is likeness.

    Each number is divided by its standard deviation, and colour and texture as groups have the same weight. (A robust
    scale, by quartiles, would stretch exactly those numbers in which a small part of an archive differs from the rest.)
    """
    values = features.astype(np.float64)
    scale = values.std(axis=0)
    points = (values - values.mean(axis=0)) / np.where(scale > 1e-3, scale, 1.0)
    points[:, :COLOUR_FEATURES] /= np.sqrt(COLOUR_FEATURES)
    points[:, COLOUR_FEATURES:] /= np.sqrt(TEXTURE_FEATURES)
    rounded: Float = np.round(points, 4).astype(np.float32)
    return rounded


def _pairs(planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sums of 2 x 2 pixels, ``[C, H/2, W/2]``; rows first, because they are contiguous."""
    rows = planes[:, ::2] + planes[:, 1::2]
    pairs: npt.NDArray[Any] = rows[:, :, ::2] + rows[:, :, 1::2]
    return pairs


def _power(planes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Mean squares, ``[C]``."""
    power: npt.NDArray[np.float64] = np.square(planes).mean(axis=(1, 2), dtype=np.float64)
    return power


def _evenness(plane: Float, coarser: Float) -> float:
    """Standard deviation over cells of the logarithm of a band's amplitude: 0 where texture is the same all over."""
    detail = np.maximum(_pairs(np.square(plane)[None]) / 4 - np.square(coarser), 0)
    if detail.shape[1] < _CELLS:
        return 0.0
    return float(np.log2(1 + np.sqrt(_cells(detail, _CELLS))).std())


def _cells(planes: npt.NDArray[Any], count: int) -> npt.NDArray[np.float64]:
    """Means of ``count x count`` cells, ``[C, count, count]``; the last pixels of sides that do not divide are left."""
    side = planes.shape[1] // count
    used = planes[:, : side * count, : side * count]
    cells: npt.NDArray[np.float64] = used.reshape(len(planes), count, side, count, side).mean(
        axis=(2, 4), dtype=np.float64
    )
    return cells
