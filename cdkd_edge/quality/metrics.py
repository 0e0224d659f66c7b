"""Scores of label maps against the truth: metrics, the confusion matrix they come from, confidence intervals.

To add a metric, write its function and name it in :data:`METRICS`: every table, file and model card then shows it.

IoU, F1 and accuracy are those of the land-cover papers: pixels without truth (255) are left out, and a class that
occurs neither in the truth nor in the prediction has no score (nan) and is left out of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import MAX_CLASSES, NO_LABEL

LEVEL = 0.95  # probability with which an interval holds the value
RESAMPLES = 2000
MIN_TILES = 5  # fewer labelled tiles give no interval: four tiles have 35 different resamples
FEW_TILES = 30  # fewer labelled tiles give intervals that are too narrow; docs/decisions.md says by how much
_CHUNK = 2_000_000  # random counts in memory at a time, whatever the number of tiles

Labels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64] | Floats


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of each class, for one collection of pixels or for many: arrays ``[..., K]``."""

    truth: Counts  # pixels of the class in the truth
    predicted: Counts  # pixels that were given the class
    hit: Counts  # pixels that have the class in both
    scored: npt.NDArray[np.bool_]  # classes that have a score; the others are nan and in no mean


def iou(counts: ClassCounts) -> Floats:
    """Intersection over union of each class."""
    return np.where(counts.scored, ratio(counts.hit, counts.truth + counts.predicted - counts.hit), np.nan)


def f1(counts: ClassCounts) -> Floats:
    """F1 score (Dice) of each class."""
    return np.where(counts.scored, ratio(2 * counts.hit, counts.truth + counts.predicted), np.nan)


def overall_accuracy(counts: ClassCounts) -> Floats:
    """Share of the pixels with the right label."""
    return ratio(counts.hit.sum(axis=-1), counts.truth.sum(axis=-1))


def mean(values: Floats) -> Floats:
    """Mean over the classes that have a value, ``[..., K]`` to ``[...]``."""
    return ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1))


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    """``part / whole``; nan where ``whole`` is 0."""
    part, whole = np.asarray(part), np.asarray(whole)
    result = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


@dataclass(frozen=True)
class Metric:
    """A score in 0..1, which tables show in percent."""

    name: str  # in JSON files
    label: str  # in tables
    score: Callable[[ClassCounts], Floats]


_METRICS = (
    Metric("mean_iou", "mIoU", lambda counts: mean(iou(counts))),
    Metric("overall_accuracy", "OA", overall_accuracy),
    Metric("mean_f1", "mF1", lambda counts: mean(f1(counts))),
)
METRICS = {metric.name: metric for metric in _METRICS}  # scores of all classes together, ``[...]``
CLASS_METRICS = {"iou": Metric("iou", "IoU", iou), "f1": Metric("f1", "F1", f1)}  # scores of each class, ``[..., K]``


def number(value: float) -> float | None:
    """A score for JSON, which has no nan."""
    return None if math.isnan(value) else float(value)


class ConfusionMatrix:
    """Pixel counts by true and predicted class. They are int64: exact over any number of scenes, and can be added."""

    counts: npt.NDArray[np.int64]  # ``[K, K + 1]``: row = truth, column = prediction; last: predicted as "no label"

    def __init__(self, classes: int) -> None:
        if not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"a confusion matrix has 1 to {MAX_CLASSES} classes, not {classes}")
        self.classes = classes
        self.counts = np.zeros((classes, classes + 1), np.int64)

    def update(self, truth: npt.NDArray[np.uint8], prediction: npt.NDArray[np.uint8]) -> None:
        """Count uint8 labels of any one shape, else ValueError.

        A truth of 255 is ignored; a prediction of 255 is a miss of the true class and a false alarm for none.
        """
        if truth.shape != prediction.shape:
            raise ValueError(f"truth has shape {truth.shape} and prediction {prediction.shape}; they must agree")
        for name, labels in (("truth", truth), ("prediction", prediction)):
            if labels.dtype != np.uint8:
                raise ValueError(f"{name} is {labels.dtype}; labels are uint8")
        # One pass over all pairs of bytes: cheaper than selecting the valid pixels first.
        pairs = truth.ravel().astype(np.uint16) << 8 | prediction.ravel()
        table = np.bincount(pairs, minlength=1 << 16).reshape(256, 256)
        for name, total in (("truth", table.sum(axis=1)), ("prediction", table.sum(axis=0))):
            if total[self.classes : NO_LABEL].any():
                label = self.classes + int(np.flatnonzero(total[self.classes : NO_LABEL])[0])
                raise ValueError(f"{name} holds the label {label}; there are {self.classes} classes")
        self.counts[:, :-1] += table[: self.classes, : self.classes]
        self.counts[:, -1] += table[: self.classes, NO_LABEL]

    def __iadd__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if other.classes != self.classes:
            raise ValueError(f"cannot add a matrix of {other.classes} classes to one of {self.classes}")
        self.counts += other.counts
        return self

    @property
    def pixels(self) -> int:
        """Pixels counted, those without truth excluded."""
        return int(self.counts.sum())

    def class_counts(self) -> ClassCounts:
        """The counts that metrics are computed from."""
        truth, predicted = self.counts.sum(axis=1), self.counts[:, :-1].sum(axis=0)
        return ClassCounts(truth, predicted, np.diagonal(self.counts), truth + predicted > 0)

    def score(self, metric: str) -> float:
        """A score of :data:`METRICS`, 0..1; nan before the first pixel."""
        return float(METRICS[metric].score(self.class_counts()))

    def class_scores(self, metric: str) -> Floats:
        """A score of :data:`CLASS_METRICS`, ``[K]`` in 0..1; nan for a class in neither truth nor prediction."""
        return CLASS_METRICS[metric].score(self.class_counts())

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur; nan before the first pixel."""
        return self.score("mean_iou")

    def scores(self) -> dict[str, float | None]:
        """All of :data:`METRICS` by name, for JSON; None where there is no number."""
        return {name: number(self.score(name)) for name in METRICS}


@dataclass(frozen=True)
class ConfidenceInterval:
    """A value lies between these with a probability of :data:`LEVEL`."""

    low: float
    high: float


# --- confidence intervals by resampling tiles -----------------------------------------------------
# A paired bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13: percentile intervals): a
# resample draws tiles with replacement and takes the pixels of both labellers from them, so that what makes both scores
# better or worse cancels.


class TileTable:
    """Pixel counts of tiles, one row each, for two labellers; rows of any tiles can be added.

    A row holds, by class, the pixels of the truth, then predictions and hits of the reference and of the candidate;
    then the pixels with data, those on which both agree, and the same two of the pixels that have a truth. With
    7 classes a tile takes 156 bytes, so that a million tiles fit in memory.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.matrices = (ConfusionMatrix(classes), ConfusionMatrix(classes))  # reference and candidate, with the truth
        # Pixels with data by the reference's label (row) and the candidate's, ``[K + 1, K + 1]``; last: no label.
        self.confusion = np.zeros((classes + 1, classes + 1), np.int64)
        self._images: dict[str, list[npt.NDArray[np.uint32]]] = {}

    def count(self, image: str, truth: Labels, reference: Labels, candidate: Labels) -> None:
        """Count and add a tile of an image; labels ``[H, W]``."""
        own = ConfusionMatrix(self.classes), ConfusionMatrix(self.classes)
        for total, matrix, labels in zip(self.matrices, own, (reference, candidate), strict=True):
            matrix.update(truth, labels)
            total += matrix
        # Where the image has no data, the stitcher took the label of both maps. If only one has none, they differ.
        valid = (reference != NO_LABEL) | (candidate != NO_LABEL)
        same, known = valid & (reference == candidate), valid & (truth != NO_LABEL)
        self.add(image, *own, [int(np.count_nonzero(where)) for where in (valid, same, known, known & same)])
        k = self.classes
        pairs = np.minimum(reference[valid], k).astype(np.int64) * (k + 1) + np.minimum(candidate[valid], k)
        self.confusion += np.bincount(pairs, minlength=(k + 1) ** 2).reshape(k + 1, k + 1)

    def add(self, image: str, reference: ConfusionMatrix, candidate: ConfusionMatrix, agreement: Sequence[int]) -> None:
        """Add a tile of an image; images may come in any order.

        ``agreement``: pixels with data, those of them with the same label, and both for pixels that have a truth.
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
    """Draw as many rows ``[n, C]`` as there are, with replacement, and add them: sums ``[resamples, C]``."""
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
