"""Scores of label maps against the truth: the table of metrics, and the confusion matrix they are computed from.

To add a metric, write its function and name it in :data:`METRICS`: every table, file and model card then shows it.

IoU, F1 and accuracy are those of the land-cover papers: pixels without truth (255) are left out, and a class that
occurs neither in the truth nor in the prediction has no score (nan) and is left out of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import MAX_CLASSES, NO_LABEL

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


METRICS = {
    metric.name: metric
    for metric in (
        Metric("mean_iou", "mIoU", lambda counts: mean(iou(counts))),
        Metric("overall_accuracy", "OA", overall_accuracy),
        Metric("mean_f1", "mF1", lambda counts: mean(f1(counts))),
    )
}
"""Scores of all classes together, ``[...]``."""

CLASS_METRICS = {metric.name: metric for metric in (Metric("iou", "IoU", iou), Metric("f1", "F1", f1))}
"""Scores of each class, ``[..., K]``."""


def number(value: float) -> float | None:
    """A score for JSON, which has no nan."""
    return None if math.isnan(value) else float(value)


class ConfusionMatrix:
    """Pixel counts by true and predicted class. They are int64: exact over any number of scenes, and can be added."""

    counts: npt.NDArray[np.int64]
    """``[K, K + 1]``: row = truth, column = prediction; the last column counts "no label" predictions."""

    def __init__(self, classes: int) -> None:
        if not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"a confusion matrix has 1 to {MAX_CLASSES} classes, not {classes}")
        self.classes = classes
        self.counts = np.zeros((classes, classes + 1), np.int64)

    def update(self, truth: npt.NDArray[np.uint8], prediction: npt.NDArray[np.uint8]) -> None:
        """Count a piece.

        Args:
            truth: uint8 labels of any shape; 255 is ignored.
            prediction: uint8 labels of the same shape. 255 where there is a truth is a miss for the
                true class (a false negative) and a false alarm for none.

        Raises:
            ValueError: the shapes differ, an array is not uint8, or a label is neither below K nor 255.
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
        """Add the counts of another matrix with the same classes."""
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
