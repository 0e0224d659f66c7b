"""Near-duplicates: tiles whose thumbnails are the same, such as two versions or two deliveries of one image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cdkd_edge.precision.calibration.candidates import Candidates
from cdkd_edge.precision.calibration.describe import THUMBNAIL

_SAME_FLOOR, _SAME_SHARE = 0.5, 0.15
"""Thumbnails are the same if they differ, root mean square, by less than half a grey level + 15 % of their contrast.
On 512 px tiles of the Dubai images JPEG at quality 50 changes at most half a grey level (median 0.34), and a shift by
a hundredth of the tile another 10 % of the contrast, in the median; by a fiftieth 23 %."""

_CHUNK = 256


def without_duplicates(candidates: Candidates, evaluation: npt.NDArray[np.float16] | None = None) -> Candidates:
    """Candidates without those that look like an earlier one, or like a tile of an evaluation set.

    Args:
        candidates: from :func:`.candidates.scan`.
        evaluation: thumbnails of the evaluation set's tiles, ``[M, 192]``.
    """
    if not len(candidates):
        return candidates
    thumbnails = candidates.thumbnails.astype(np.float32)
    keep = np.ones(len(candidates), bool)
    if evaluation is not None and len(evaluation):
        known = _Known(evaluation.astype(np.float32))
        for start in range(0, len(keep), _CHUNK):
            keep[start : start + _CHUNK] = ~known.has(thumbnails[start : start + _CHUNK])
        candidates.skipped["excluded"] += int((~keep).sum())
        candidates = candidates.kept(keep)
        thumbnails = thumbnails[keep]
        keep = np.ones(len(candidates), bool)
    kept: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(keep), _CHUNK):
        chunk = thumbnails[start : start + _CHUNK]
        same = _Known(np.concatenate(kept)).has(chunk) if kept else np.zeros(len(chunk), bool)
        for row in range(1, len(chunk)):
            earlier = chunk[:row][~same[:row]]
            same[row] = same[row] or bool(_same(chunk[row], earlier).any())
        keep[start : start + _CHUNK] = ~same
        kept.append(chunk[~same])
    candidates.skipped["near_duplicate"] += int((~keep).sum())
    return candidates.kept(keep)


def _same(one: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether a thumbnail ``[192]`` is the same as each of others ``[N, 192]``."""
    distance = np.sqrt(np.square(others - one).mean(axis=1))
    contrast = np.minimum(_contrast(others), _contrast(one[None]))
    return np.asarray(distance <= _SAME_FLOOR + _SAME_SHARE * contrast)


def _contrast(thumbnails: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Standard deviation within the channels, ``[N]``."""
    channels = thumbnails.reshape(len(thumbnails), 3, THUMBNAIL // 3)
    return np.asarray(np.sqrt(channels.var(axis=2).mean(axis=1)), np.float32)


class _Known:
    """Thumbnails to compare others with. A matrix product finds the few pairs that are compared exactly."""

    def __init__(self, thumbnails: npt.NDArray[np.float32]) -> None:
        self._thumbnails = thumbnails
        self._centred = thumbnails - 128
        self._power = np.square(self._centred).sum(axis=1)
        self._contrast = _contrast(thumbnails)

    def has(self, others: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Whether each of ``others`` ``[N, 192]`` is the same as one of these."""
        centred = others - 128
        squares = np.square(centred).sum(axis=1)[:, None] + self._power - 2 * centred @ self._centred.T
        tolerance = _SAME_FLOOR + _SAME_SHARE * np.minimum(_contrast(others)[:, None], self._contrast)
        near = squares / THUMBNAIL <= np.square(tolerance + 0.05)  # more than the product's rounding
        found = np.zeros(len(others), bool)
        for index in np.flatnonzero(near.any(axis=1)):
            found[index] = _same(others[index], self._thumbnails[near[index]]).any()
        return found
