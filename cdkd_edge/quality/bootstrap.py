"""Pixel counts of two labellers per tile, and confidence intervals by resampling tiles.

This is a paired bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13: percentile intervals):
a resample draws tiles with replacement and takes the pixels of both labellers from them, so that what makes both scores
better or worse cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.quality.metrics import ClassCounts, ConfusionMatrix, Floats, ratio

Labels = npt.NDArray[np.uint8]

LEVEL = 0.95  # probability with which an interval holds the value
RESAMPLES = 2000
MIN_TILES = 5  # fewer labelled tiles give no interval: four tiles have 35 different resamples
FEW_TILES = 30  # fewer labelled tiles give intervals that are too narrow; docs/decisions.md says by how much
_CHUNK = 2_000_000  # random counts in memory at a time, whatever the number of tiles


@dataclass(frozen=True)
class ConfidenceInterval:
    """A value lies between these with a probability of :data:`LEVEL`."""

    low: float
    high: float


class TileTable:
    """Pixel counts of tiles, one row each, for two labellers; rows of any tiles can be added.

    A row holds, by class, the pixels of the truth, then predictions and hits of the reference and of the candidate;
    then the pixels with data, those on which both agree, and the same two of the pixels that have a truth. With
    7 classes a tile takes 156 bytes, so that a million tiles fit in memory.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.matrices = (ConfusionMatrix(classes), ConfusionMatrix(classes))
        """Reference and candidate against the truth."""
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)
        """Pixels with data by the reference's label (row) and the candidate's, ``[K + 1, K + 1]``; last: no label."""
        self._images: dict[str, list[npt.NDArray[np.uint32]]] = {}

    def count(self, image: str, truth: Labels, reference: Labels, candidate: Labels) -> None:
        """Count and add a tile of an image; labels ``[H, W]``."""
        own = []
        for total, labels in zip(self.matrices, (reference, candidate), strict=True):
            matrix = ConfusionMatrix(self.classes)
            matrix.update(truth, labels)
            total += matrix
            own.append(matrix)
        # Where the image has no data, the stitcher took the label of both maps. If only one has none, they differ.
        valid = (reference != NO_LABEL) | (candidate != NO_LABEL)
        same, known = valid & (reference == candidate), valid & (truth != NO_LABEL)
        counts = [int(np.count_nonzero(where)) for where in (valid, same, known, known & same)]
        self.add(image, own[0], own[1], (counts[0], counts[1], counts[2], counts[3]))
        k = self.classes
        pairs = np.minimum(reference[valid], k).astype(np.int64) * (k + 1) + np.minimum(candidate[valid], k)
        self.confusion += np.bincount(pairs, minlength=(k + 1) ** 2).reshape(k + 1, k + 1)

    def add(
        self, image: str, reference: ConfusionMatrix, candidate: ConfusionMatrix, agreement: tuple[int, int, int, int]
    ) -> None:
        """Add a tile of an image.

        Args:
            image: its name. Images may come in any order, the tiles of one in that of the grid.
            reference, candidate: counts of the pixels that the tile contributes to the label map.
            agreement: pixels with data, those of them with the same label, and both for pixels that have a truth.
        """
        row = [reference.counts.sum(axis=1)]
        for matrix in (reference, candidate):
            row += [matrix.counts[:, :-1].sum(axis=0), np.diagonal(matrix.counts)]
        self._images.setdefault(image, []).append(np.concatenate([*row, np.array(agreement)]).astype(np.uint32))

    def __len__(self) -> int:
        return sum(map(len, self._images.values()))

    def rows(self, image: str | None = None) -> Floats:
        """The rows of all tiles with data, or of one image's; the order does not depend on that of the images."""
        images = sorted(self._images) if image is None else [image]
        rows = [row for name in images for row in self._images[name] if row[5 * self.classes]]
        return np.array(rows, np.float64).reshape(len(rows), 5 * self.classes + 4)

    def class_counts(self, rows: Floats) -> tuple[ClassCounts, ClassCounts]:
        """Counts of reference and candidate, of sums of rows ``[..., 5 K + 4]``.

        Both are scored on the classes that occur in the truth. (Otherwise a single pixel with a class that is nowhere
        in the truth would add a class of IoU 0 to the mean of one of them.)
        """
        k = self.classes
        truth, predicted, hit, other_predicted, other_hit = (rows[..., i * k : (i + 1) * k] for i in range(5))
        scored = truth > 0
        return ClassCounts(truth, predicted, hit, scored), ClassCounts(truth, other_predicted, other_hit, scored)

    def agreement(self, rows: Floats) -> tuple[Floats, Floats]:
        """Share of pixels with the same label: of those with data, and of those that also have a truth; 0..1 or nan."""
        k = 5 * self.classes
        return ratio(rows[..., k + 1], rows[..., k]), ratio(rows[..., k + 3], rows[..., k + 2])


def resample(rows: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Draw as many rows ``[n, C]`` as there are, with replacement, and add them; ``resamples`` times.

    Returns:
        The sums, ``[resamples, C]``. The same seed gives the same sums.
    """
    random, n = np.random.default_rng(seed), len(rows)
    sums = np.empty((resamples, rows.shape[1]))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        sums[start : start + step] = counts.astype(np.float64) @ rows
    return sums


def confidence_interval(values: Floats) -> ConfidenceInterval | None:
    """The percentile interval of resampled values; None where none of them is known."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return ConfidenceInterval(float(low), float(high))
