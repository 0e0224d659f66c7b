"""Describes tiles: 25 numbers for what a tile looks like, and a thumbnail to find near-duplicates by.

Colour is described in Ohta's opponent axes (Ohta, Kanade, Sakai 1980), which are close to the principal axes of
natural colour images: lightness ``(R+G+B)/3``, ``(R-B)/2`` and ``(2G-R-B)/4``. Of each: mean, standard deviation,
2nd and 98th percentile.

Texture is the energy of Haar wavelet bands: with ``L0`` an opponent plane and ``Lb+1`` the 2x2 means of ``Lb``, band
``b`` has the energy ``mean(Lb^2) - mean(Lb+1^2)``. The descriptor has the logarithms of the amplitudes of six bands of
lightness, and of three of each colour axis from half resolution on. Its last number says whether fine texture is the
same all over the tile, or one half is water and the other a town.

Numbers are rounded: processors add in different orders, and the choice of tiles must not depend on that.
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
# Tiles are near-duplicates if their thumbnails differ, root mean square, by at most half a grey level + 15 % of their
# contrast. On 512 px tiles of the Dubai images, JPEG at quality 50 changes at most half a grey level (median 0.34); a
# shift by a hundredth of the tile changes another 10 % of the contrast in the median, by a fiftieth 23 %.
_SAME_FLOOR, _SAME_SHARE = 0.5, 0.15
_CHUNK = 256
_CELLS = 8
_SAMPLE = 128  # percentiles are taken of at most this many pixels a side

Float = npt.NDArray[np.float32]


def describe_tile(tile: npt.NDArray[np.uint8]) -> Float:
    """The descriptor ``[25]`` of an RGB tile ``[3, T, T]``, T >= 32: colour, in grey levels; texture, in logarithms."""
    side = tile.shape[1] // 2 * 2
    # Most compressed imagery stores colour at half resolution.
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


def make_thumbnail(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Means of 8 x 8 cells of a tile ``[3, T, T]``, T >= 8; float16 ``[192]``, in grey levels."""
    return _cells(tile, THUMBNAIL_SIDE).ravel().astype(np.float16)


def standardise(features: Float) -> Float:
    """Scale descriptors ``[N, 25]`` so that tiles that look alike have a small Euclidean distance.

    Each number is divided by its standard deviation, and colour and texture get the same weight as groups. (A robust
    scale, by quartiles, would stretch those numbers in which a small part of an archive differs from the rest.)
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
    """Standard deviation over cells of the logarithm of a band's amplitude; 0 if texture is the same all over."""
    detail = np.maximum(_pairs(np.square(plane)[None]) / 4 - np.square(coarser), 0)
    if detail.shape[1] < _CELLS:
        return 0.0
    return float(np.log2(1 + np.sqrt(_cells(detail, _CELLS))).std())


def _cells(planes: npt.NDArray[Any], count: int) -> npt.NDArray[np.float64]:
    """Means of ``count x count`` cells, ``[C, count, count]``; the rest of a side that does not divide is unused."""
    side = planes.shape[1] // count
    used = planes[:, : side * count, : side * count]
    cells: npt.NDArray[np.float64] = used.reshape(len(planes), count, side, count, side).mean(
        axis=(2, 4), dtype=np.float64
    )
    return cells


def find_duplicates(thumbnails: Float) -> npt.NDArray[np.bool_]:
    """Which of the thumbnails ``[N, 192]`` are near-duplicates of an earlier one that is none itself; ``[N]``."""
    duplicate = np.zeros(len(thumbnails), bool)
    kept: list[Float] = []
    for start in range(0, len(thumbnails), _CHUNK):
        chunk = thumbnails[start : start + _CHUNK]
        same = match_thumbnails(chunk, np.concatenate(kept)) if kept else np.zeros(len(chunk), bool)
        for row in range(1, len(chunk)):
            earlier = chunk[:row][~same[:row]]
            same[row] = same[row] or bool(_same(chunk[row], earlier).any())
        duplicate[start : start + _CHUNK] = same
        kept.append(chunk[~same])
    return duplicate


def match_thumbnails(thumbnails: Float, known: Float) -> npt.NDArray[np.bool_]:
    """Which of the thumbnails ``[N, 192]`` are near-duplicates of one of ``known`` ``[M, 192]``; ``[N]``."""
    found = np.zeros(len(thumbnails), bool)
    known_power, known_contrast = np.square(known - 128).sum(axis=1), _contrast(known)
    for start in range(0, len(thumbnails), _CHUNK):
        chunk = thumbnails[start : start + _CHUNK]
        centred = chunk - 128
        # A matrix product finds the few pairs that may be the same; those are compared exactly.
        squares = np.square(centred).sum(axis=1)[:, None] + known_power - 2 * centred @ (known - 128).T
        tolerance = _SAME_FLOOR + _SAME_SHARE * np.minimum(_contrast(chunk)[:, None], known_contrast)
        near = squares / THUMBNAIL <= np.square(tolerance + 0.05)  # more than the product's rounding
        for index in np.flatnonzero(near.any(axis=1)):
            found[start + index] = _same(chunk[index], known[near[index]]).any()
    return found


def _same(one: Float, others: Float) -> npt.NDArray[np.bool_]:
    """Whether a thumbnail ``[192]`` is the same as each of others ``[N, 192]``."""
    distance = np.sqrt(np.square(others - one).mean(axis=1))
    contrast = np.minimum(_contrast(others), _contrast(one[None]))
    return np.asarray(distance <= _SAME_FLOOR + _SAME_SHARE * contrast)


def _contrast(thumbnails: Float) -> Float:
    """Standard deviation within the channels, ``[N]``."""
    channels = thumbnails.reshape(len(thumbnails), 3, THUMBNAIL // 3)
    return np.asarray(np.sqrt(channels.var(axis=2).mean(axis=1)), np.float32)
