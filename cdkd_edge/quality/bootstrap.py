"""What each tile contributed to two scores, and how far their difference would move on other tiles.

Two labellers that saw the same tiles are compared tile by tile: a resample draws tiles with replacement and takes
both labellers' pixels from the tiles it drew (a paired bootstrap; Efron & Tibshirani, An Introduction to the
Bootstrap, 1993, ch. 13 for percentile intervals). What makes both scores better or worse alike then cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.quality.metrics import ClassCounts, ConfusionMatrix, Floats, ratio

LEVEL = 0.95
RESAMPLES = 2000
MIN_TILES = 5
"""With fewer labelled tiles there is no interval: four tiles have 35 different resamples."""
FEW_TILES = 30
"""Below this number an interval is too narrow; docs/decisions.md has how much."""


_CHUNK = 2_000_000
"""Random counts held at a time, whatever the number of tiles."""


@dataclass(frozen=True)
class Interval:
    """Where a number lies with a probability of :data:`LEVEL`."""

    low: float
    high: float


class TileTable:
    """Counts of tiles, one row each; rows of any tiles can be added.

    A row has 5 K + 4 numbers instead of two confusion matrices: by class pixels of truth, predictions and hits of
    the reference, predictions and hits of the candidate; then pixels with data, those on which both agree, and the same
    two of the pixels that have a truth. At 7 classes a tile takes 156 bytes, so that a million of them fit in memory.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._images: dict[str, list[npt.NDArray[np.uint32]]] = {}

    def add(
        self,
        image: str,
        reference: ConfusionMatrix,
        candidate: ConfusionMatrix,
        agreement: tuple[int, int, int, int],
    ) -> None:
        """Add a tile of an image.

        Args:
            image: its name; images may come in any order, their tiles come in the grid's.
            reference, candidate: of the pixels that the tile contributes to the label map.
            agreement: pixels with data, those of them with the same label, and both for pixels that have a truth.
        """
        row = [reference.counts.sum(axis=1)]
        for matrix in (reference, candidate):
            row += [matrix.counts[:, :-1].sum(axis=0), np.diagonal(matrix.counts)]
        self._images.setdefault(image, []).append(np.concatenate([*row, np.array(agreement)]).astype(np.uint32))

    def __len__(self) -> int:
        return sum(map(len, self._images.values()))

    def rows(self, image: str | None = None) -> Floats:
        """The rows of all tiles with data, or of an image's, in an order that does not depend on that of images."""
        images = sorted(self._images) if image is None else [image]
        rows = [row for name in images for row in self._images[name] if row[5 * self.classes]]
        return np.array(rows, np.float64).reshape(len(rows), 5 * self.classes + 4)

    def class_counts(self, rows: Floats) -> tuple[ClassCounts, ClassCounts]:
        """Counts of reference and candidate, of sums of rows ``[..., 5 K + 4]``.

        Scored are the classes that occur in the truth, the same for both. (A single pixel given a class that is
        nowhere in the truth would otherwise add a class of IoU 0 to the mean of one of them.)
        """
        truth, *others = (rows[..., start : start + self.classes] for start in range(0, 5 * self.classes, self.classes))
        return ClassCounts(truth, *others[:2], truth > 0), ClassCounts(truth, *others[2:], truth > 0)

    def agreement(self, rows: Floats) -> tuple[Floats, Floats]:
        """Share of pixels with the same label: of those with data, and of those that also have a truth; 0..1 or nan."""
        k = 5 * self.classes
        return ratio(rows[..., k + 1], rows[..., k]), ratio(rows[..., k + 3], rows[..., k + 2])


def resampled(rows: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Sums of resamples: ``resamples`` times as many rows as there are, drawn with replacement and added.

    Args:
        rows: ``[n, C]``, n >= 1.
        resamples: how many sums.
        seed: the same seed gives the same sums.

    Returns:
        ``[resamples, C]``.
    """
    random, n = np.random.default_rng(seed), len(rows)
    sums = np.empty((resamples, rows.shape[1]))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        sums[start : start + step] = counts.astype(np.float64) @ rows
    return sums


def interval(values: Floats) -> Interval | None:
    """The percentile interval of resampled values; None where a value is known in none of them."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))
