"""How well a label map agrees with the truth: one confusion matrix, filled piece by piece.

Counts are int64, so a matrix over any number of scenes is exact, and matrices of parts can be added.
IoU, F1 and accuracy are those of the land-cover papers: pixels without truth (255) are left out;
a class that occurs neither in the truth nor in the prediction has no IoU (nan) and is left out of means.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import MAX_CLASSES, NO_LABEL


class ConfusionMatrix:
    """Pixel counts by true and predicted class."""

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

    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union, float64 ``[K]`` in 0..1; nan for a class in neither truth nor prediction."""
        hit, truth, predicted = self._totals()
        return _ratio(hit, truth + predicted - hit)

    def f1(self) -> npt.NDArray[np.float64]:
        """F1 score (Dice), float64 ``[K]`` in 0..1; nan for a class in neither truth nor prediction."""
        hit, truth, predicted = self._totals()
        return _ratio(2 * hit, truth + predicted)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur; nan before the first pixel."""
        return _mean(self.iou())

    @property
    def mean_f1(self) -> float:
        """Mean F1 over the classes that occur; nan before the first pixel."""
        return _mean(self.f1())

    @property
    def overall_accuracy(self) -> float:
        """Share of pixels with the right label, 0..1; nan before the first pixel."""
        return float(self._totals()[0].sum()) / self.pixels if self.pixels else float("nan")

    def _totals(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """True positives, truth and prediction by class, int64 ``[K]``."""
        return np.diagonal(self.counts), self.counts.sum(axis=1), self.counts[:, :-1].sum(axis=0)


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    result = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
