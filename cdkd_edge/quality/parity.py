"""Parity: does a candidate (an engine, a graph) label as its reference (a checkpoint) does?

Both label every image of a dataset by the path of ``cdkd-edge segment`` and are compared tile for tile. Scores against
the truth say what a difference costs; the agreement of both label maps says how large it is. Memory is that of the
largest image (its truth and two label maps, 3 bytes a pixel) and about 150 bytes per tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, UsageError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.quality import metrics
from cdkd_edge.quality.datasets import Dataset
from cdkd_edge.quality.evaluate import (
    Labels,
    absent_classes,
    check_image,
    label_image,
    no_labels,
    offset_progress,
    require_same_classes,
    training_notes,
)
from cdkd_edge.quality.masks import HiddenLabels, read_labels
from cdkd_edge.quality.pictures import write_differences
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.options import SegmentOptions

PARITY_VERSION = 1  # version of the document
_ROUNDING = 1e-9  # so that a loss of exactly the tolerance passes

SIDES = ("reference", "candidate")
Sides = tuple[metrics.ClassCounts, metrics.ClassCounts]


@dataclass(frozen=True)
class ParityGate:
    """Limits that a candidate must keep."""

    tolerance: float  # largest loss of mIoU, percentage points. A gain is no loss.
    min_agreement: float  # smallest share of pixels with the same label, 0..1

    @classmethod
    def of(cls, precision: str, tolerance: float | None = None, min_agreement: float | None = None) -> ParityGate:
        """The given limits, else those of the candidate's precision: 0.02 points (the paper's), 0.5 for INT8, BF16."""
        own = cls(0.5, 0.98) if precision in ("int8", "bf16") else cls(0.02, 0.999)
        return cls(
            own.tolerance if tolerance is None else tolerance,
            own.min_agreement if min_agreement is None else min_agreement,
        )


@dataclass(frozen=True)
class ComparedScore:
    """A score of both labellers, 0..1; None where there is no truth to score on."""

    reference: float | None
    candidate: float | None
    interval: metrics.ConfidenceInterval | None  # of the difference, percentage points

    @property
    def delta(self) -> float | None:
        """Candidate minus reference, percentage points."""
        if self.candidate is None or self.reference is None:
            return None
        return 100 * (self.candidate - self.reference)

    def document(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """JSON data: the scores, and their difference."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        scores = {"reference": self.reference, "candidate": self.candidate}
        return scores, {"value": self.delta, "low": low, "high": high}


@dataclass(frozen=True)
class ImageParity:
    """Comparison of one image."""

    name: str
    tiles: int
    agreement: float | None  # share of the pixels with data on which both agree, 0..1; None where there are none
    reference_mean_iou: float | None
    candidate_mean_iou: float | None


@dataclass(frozen=True)
class Parity:
    """Comparison of two labellers on a dataset."""

    schema: LabelSchema
    gate: ParityGate
    matrices: tuple[metrics.ConfusionMatrix, metrics.ConfusionMatrix]  # reference and candidate against the truth
    confusion: npt.NDArray[np.int64]  # see :attr:`cdkd_edge.quality.metrics.TileTable.confusion`
    images: tuple[ImageParity, ...]
    ignored_pixels: int  # pixels without truth; only the agreement counts them
    scores: Mapping[str, ComparedScore]  # by the names of :data:`cdkd_edge.quality.metrics.METRICS`
    class_iou: tuple[ComparedScore, ...]
    agreement: float  # share of the pixels with data on which both agree, 0..1
    agreement_interval: metrics.ConfidenceInterval | None
    labelled_agreement: float | None  # the same, of the pixels that also have a truth; None where there are none
    tiles: int  # tiles with data
    labelled_tiles: int
    resamples: int
    seed: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Loss of mIoU, percentage points; negative for a gain."""
        return -(self.scores["mean_iou"].delta or 0.0)

    @property
    def failures(self) -> tuple[str, ...]:
        """Limits that the candidate does not keep."""
        found = []
        if self.loss > self.gate.tolerance + _ROUNDING:
            found.append(f"it loses {self.loss:.3f} points of mIoU, more than {self.gate.tolerance:g}")
        if self.agreement < self.gate.min_agreement - _ROUNDING:
            fewer = f"fewer than {100 * self.gate.min_agreement:g} %"
            found.append(f"it gives the reference's label to {self.agreement:.4%} of the pixels, {fewer}")
        return tuple(found)

    @property
    def verdict(self) -> str:
        """``pass`` or ``fail``, by the measured values."""
        return "fail" if self.failures else "pass"

    @property
    def interval_position(self) -> str | None:
        """Where the interval of the mIoU difference lies: ``within`` the tolerance, ``beyond`` it, or ``across``."""
        interval = self.scores["mean_iou"].interval
        if interval is None:
            return None
        limit = -self.gate.tolerance - _ROUNDING
        return "within" if interval.low >= limit else "beyond" if interval.high < limit else "across"

    def differences(self) -> list[tuple[str, str, int]]:
        """Changed pixels by class, most frequent first: the reference's class, the candidate's, pixels."""
        names = [*self.schema.class_names, "no label"]
        changed = self.confusion * ~np.eye(len(names), dtype=bool)
        order = np.argsort(-changed, axis=None, kind="stable")[: np.count_nonzero(changed)]
        places = zip(*np.unravel_index(order, changed.shape), strict=True)
        return [(names[row], names[column], int(changed[row, column])) for row, column in places]

    def document(self) -> dict[str, Any]:
        """JSON data; scores in 0..1, deltas in percentage points, None where there is no number."""
        pixels = self.matrices[0].counts.sum(axis=1).tolist()
        classes = zip(self.schema.class_names, pixels, map(ComparedScore.document, self.class_iou), strict=True)
        span = self.agreement_interval
        low, high = (span.low, span.high) if span else (None, None)
        return {
            "parity_version": PARITY_VERSION,
            "verdict": self.verdict,
            "failures": list(self.failures),
            "gate": {"tolerance_points": self.gate.tolerance, "min_agreement": self.gate.min_agreement},
            "interval_position": self.interval_position,
            "scores": {name: score.document()[0] for name, score in self.scores.items()},
            "delta_points": {name: score.document()[1] for name, score in self.scores.items()},
            "classes": [
                {"name": name, "truth_pixels": truth, "iou": iou, "delta_points": delta}
                for name, truth, (iou, delta) in classes
            ],
            "agreement": {"with_data": self.agreement, "low": low, "high": high, "labelled": self.labelled_agreement},
            "bootstrap": {
                "unit": "tile",
                "tiles": self.tiles,
                "labelled_tiles": self.labelled_tiles,
                "resamples": self.resamples,
                "seed": self.seed,
                "level": metrics.LEVEL,
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


def measure_parity(
    reference: Labeller,
    candidate: Labeller,
    dataset: Dataset,
    schema: LabelSchema,
    gate: ParityGate,
    *,
    options: SegmentOptions = SegmentOptions(),
    maps: Path | None = None,
    trained_on: Mapping[str, Any] | None = None,
    resamples: int = metrics.RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Parity:
    """Label every image of a dataset with both labellers and compare.

    Args:
        reference, candidate: with tiles of the same side (else UsageError) and, as batches do not matter, of any batch.
        gate: the limits that the candidate must keep.
        maps: folder for both label maps and a picture of their differences, per image. Default: none are written.
        trained_on: training record of the reference.
        resamples, seed: of the bootstrap.
        progress: called with tiles done and tiles in all; every tile counts twice.
        dataset, schema, options: see :func:`cdkd_edge.quality.evaluate.evaluate`, also for errors.
    """
    started = time.perf_counter()
    if reference.tile != candidate.tile:
        raise UsageError(
            f"{reference.artefact.file} has tiles of {reference.tile} px, {candidate.artefact.file} of "
            f"{candidate.tile} px; compared tile for tile, both need the same",
            hint=f"export again with --tile {candidate.tile} or {reference.tile}",
        )
    labellers = (reference, candidate)
    for labeller in labellers:
        require_same_classes(labeller.schema, schema)
    images = [check_image(pair, reference.tile, options) for pair in dataset]
    if not images:
        raise DatasetError(f"{dataset.folder}: there is no image to compare on")
    total, done, ignored = 2 * sum(len(image.grid) for image in images), 0, 0
    table, hidden, compared = metrics.TileTable(len(schema)), HiddenLabels(), []
    for image in images:
        name, truth = image.pair.name, read_labels(image.pair.mask, schema, hidden)
        found = [np.empty((image.height, image.width), np.uint8) for _ in labellers]
        with image.open(options) as reader:
            for side, labeller, labels in zip(SIDES, labellers, found, strict=True):

                def take(first: int, rows: Labels, labels: Labels = labels) -> None:
                    labels[first : first + len(rows)] = rows

                path = None if maps is None else maps / f"{name}_{side}.tif"
                label_image(labeller, reader, image, options, take, path, offset_progress(progress, done, total))
                done += len(image.grid)
            if maps is not None:
                write_differences(maps / f"{name}_difference.png", image.pair, reader, schema, truth, *found)
        for row, column in image.grid:
            part = np.s_[row.first : row.last, column.first : column.last]
            table.count(name, truth[part], *(labels[part] for labels in found))
        ignored += int(np.count_nonzero(truth == NO_LABEL))
        sums = table.rows(name).sum(axis=0)
        agreement = metrics.number(float(table.agreement(sums)[0]))
        scores = [metrics.number(float(metrics.METRICS["mean_iou"].score(side))) for side in table.class_counts(sums)]
        compared.append(ImageParity(name, len(image.grid), agreement, *scores))
    if not table.matrices[0].pixels:
        raise no_labels(f"the {len(images)} masks of {dataset.folder}", hidden)
    rows, k = table.rows(), len(schema)
    if not len(rows):
        raise DatasetError(f"no pixel of the {len(images)} images of {dataset.folder} has data")
    labelled = int(np.count_nonzero(rows[:, :k].sum(axis=1)))
    notes = [*hidden.notes(), *reading_notes({image.pair.name: image.notes for image in images})]
    if absent := absent_classes(schema, table.matrices[0].counts.sum(axis=1)):
        notes.append(f"no pixel of the truth is {absent}: such a class is in no mean here")
    if labelled < metrics.MIN_TILES:
        notes.append(f"{labelled} labelled tiles are too few for an interval")
    elif labelled < metrics.FEW_TILES:
        notes.append(f"{labelled} labelled tiles are few: the true intervals may be wider")
    draws = metrics.resample(rows, resamples, seed) if labelled >= metrics.MIN_TILES else None
    sides = table.class_counts(rows.sum(axis=0))
    spread = None if draws is None else table.class_counts(draws)
    agreement, labelled_agreement = (float(value) for value in table.agreement(rows.sum(axis=0)))
    return Parity(
        schema=schema,
        gate=gate,
        matrices=table.matrices,
        confusion=table.confusion,
        images=tuple(compared),
        ignored_pixels=ignored,
        scores={name: _compared(metric, sides, spread) for name, metric in metrics.METRICS.items()},
        class_iou=tuple(_compared(metrics.CLASS_METRICS["iou"], sides, spread, label) for label in range(k)),
        agreement=agreement,
        agreement_interval=None if draws is None else metrics.confidence_interval(table.agreement(draws)[0]),
        labelled_agreement=metrics.number(labelled_agreement),
        tiles=len(rows),
        labelled_tiles=labelled,
        resamples=resamples,
        seed=seed,
        seconds=time.perf_counter() - started,
        notes=(*notes, *training_notes(dataset, trained_on or {})),
    )


def _compared(metric: metrics.Metric, sides: Sides, spread: Sides | None, label: int | None = None) -> ComparedScore:
    """A score of the sums and its interval by the resamples; of one class if there is a label."""

    def scores(sides: Sides) -> list[metrics.Floats]:
        return [metric.score(side) if label is None else metric.score(side)[..., label] for side in sides]

    reference, candidate = (metrics.number(float(score)) for score in scores(sides))
    if spread is None:
        return ComparedScore(reference, candidate, None)
    before, after = scores(spread)
    return ComparedScore(reference, candidate, metrics.confidence_interval(100 * (after - before)))
