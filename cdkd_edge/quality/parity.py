"""Parity: whether a candidate (an engine, a graph) labels as its reference (a checkpoint) does; numbers and verdict.

Scores against the truth say what a difference costs, the agreement of both label maps says how large it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.quality.bootstrap import LEVEL, Interval
from cdkd_edge.quality.metrics import ConfusionMatrix

PARITY_VERSION = 1
"""Of the document."""
_ROUNDING = 1e-9
"""A loss of exactly the tolerance passes, whatever the last bit says."""

SIDES = ("reference", "candidate")


@dataclass(frozen=True)
class Gate:
    """What a candidate has to keep."""

    tolerance: float
    """Largest loss of mIoU, percentage points. A gain is no loss."""
    min_agreement: float
    """Smallest share of pixels with the same label, 0..1."""

    @classmethod
    def of(cls, precision: str, tolerance: float | None = None, min_agreement: float | None = None) -> Gate:
        """Defaults by the candidate's precision (the paper's 0.02 points, 0.5 for INT8) where nothing is given."""
        own = cls(0.5, 0.98) if precision == "int8" else cls(0.02, 0.999)
        return cls(
            own.tolerance if tolerance is None else tolerance,
            own.min_agreement if min_agreement is None else min_agreement,
        )


@dataclass(frozen=True)
class Delta:
    """Candidate minus reference, percentage points."""

    value: float | None
    interval: Interval | None

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        span = self.interval
        return {"value": self.value, "low": span and span.low, "high": span and span.high}


@dataclass(frozen=True)
class ImageParity:
    """One image."""

    name: str
    tiles: int
    agreement: float | None
    """Share of the pixels with data on which both agree, 0..1; None where there are none."""
    reference_mean_iou: float | None
    candidate_mean_iou: float | None


@dataclass(frozen=True)
class Parity:
    """A comparison of two labellers on a dataset."""

    schema: LabelSchema
    gate: Gate
    matrices: tuple[ConfusionMatrix, ConfusionMatrix]
    """Reference and candidate against the truth."""
    confusion: npt.NDArray[np.int64]
    """``[K + 1, K + 1]``: row = the reference's label, column = the candidate's; last: no label. Pixels with data."""
    images: tuple[ImageParity, ...]
    ignored_pixels: int
    """Without truth; they count for the agreement alone."""
    deltas: Mapping[str, Delta]
    """By the names of :data:`cdkd_edge.quality.metrics.METRICS`."""
    class_deltas: tuple[Delta, ...]
    """Of IoU, by class."""
    scores: Mapping[str, tuple[float, float]]
    """By the same names as the deltas: reference and candidate, 0..1."""
    class_iou: tuple[tuple[float | None, float | None], ...]
    agreement: float
    """Share of the pixels with data on which both agree, 0..1."""
    agreement_interval: Interval | None
    labelled_agreement: float | None
    """The same, of the pixels that have a truth; None where no pixel has both."""
    tiles: int
    """With data."""
    labelled_tiles: int
    resamples: int
    seed: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Loss of mIoU, percentage points; negative for a gain."""
        return -(self.deltas["mean_iou"].value or 0.0)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the candidate does not pass; empty if it does."""
        found = []
        if self.loss > self.gate.tolerance + _ROUNDING:
            found.append(f"it loses {self.loss:.3f} points of mIoU, more than {self.gate.tolerance:g}")
        if self.agreement < self.gate.min_agreement - _ROUNDING:
            found.append(
                f"it gives the reference's label to {self.agreement:.4%} of the pixels, "
                f"fewer than {100 * self.gate.min_agreement:g} %"
            )
        return tuple(found)

    @property
    def verdict(self) -> str:
        """``pass`` or ``fail``, of what was measured."""
        return "fail" if self.failures else "pass"

    @property
    def interval_position(self) -> str | None:
        """Where the interval of the mIoU difference lies: ``within`` the tolerance, ``beyond`` it, or ``across``."""
        span = self.deltas["mean_iou"].interval
        if span is None:
            return None
        limit = -self.gate.tolerance - _ROUNDING
        return "within" if span.low >= limit else "beyond" if span.high < limit else "across"

    def differences(self) -> list[tuple[str, str, int]]:
        """Pixels that changed their class, most frequent first: the reference's class, the candidate's, how many."""
        names = [*self.schema.class_names, "no label"]
        changed = self.confusion * ~np.eye(len(names), dtype=bool)
        order = np.argsort(-changed, axis=None, kind="stable")[: np.count_nonzero(changed)]
        return [
            (names[row], names[column], int(changed[row, column]))
            for row, column in zip(*np.unravel_index(order, changed.shape), strict=True)
        ]

    def document(self) -> dict[str, Any]:
        """As JSON data; scores in 0..1, deltas in percentage points, None where there is no number."""
        return {
            "parity_version": PARITY_VERSION,
            "verdict": self.verdict,
            "failures": list(self.failures),
            "gate": {"tolerance_points": self.gate.tolerance, "min_agreement": self.gate.min_agreement},
            "interval_position": self.interval_position,
            "scores": {name: dict(zip(SIDES, values, strict=True)) for name, values in self.scores.items()},
            "delta_points": {name: delta.document() for name, delta in self.deltas.items()},
            "classes": [
                {
                    "name": name,
                    "truth_pixels": int(self.matrices[0].counts[label].sum()),
                    "iou": dict(zip(SIDES, self.class_iou[label], strict=True)),
                    "delta_points": self.class_deltas[label].document(),
                }
                for label, name in enumerate(self.schema.class_names)
            ],
            "agreement": {
                "with_data": self.agreement,
                "low": self.agreement_interval and self.agreement_interval.low,
                "high": self.agreement_interval and self.agreement_interval.high,
                "labelled": self.labelled_agreement,
            },
            "bootstrap": {
                "unit": "tile",
                "tiles": self.tiles,
                "labelled_tiles": self.labelled_tiles,
                "resamples": self.resamples,
                "seed": self.seed,
                "level": LEVEL,
            },
            "pixels": int(self.confusion.sum()),
            "labelled_pixels": self.matrices[0].pixels,
            "ignored_pixels": self.ignored_pixels,
            "confusion": {
                "reference_candidate": self.confusion.tolist(),
                "truth_reference": self.matrices[0].counts.tolist(),
                "truth_candidate": self.matrices[1].counts.tolist(),
            },
            "images": [vars(image) for image in self.images],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
