"""Parity: does a candidate (an engine, a graph) label as its reference (a checkpoint) does?

Both label every image of a dataset by the path of ``cdkd-edge segment`` and are compared tile for tile. Scores against
the truth say what a difference costs; the agreement of both label maps says how large it is. Memory is that of the
largest image (its truth and two label maps, 3 bytes a pixel) and about 150 bytes per tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, UsageError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.quality.bootstrap import (
    FEW_TILES,
    LEVEL,
    MIN_TILES,
    RESAMPLES,
    ConfidenceInterval,
    TileTable,
    confidence_interval,
    resample,
)
from cdkd_edge.quality.datasets import Dataset
from cdkd_edge.quality.evaluate import (
    CheckedImage,
    Labels,
    absent_classes,
    check_image,
    label_image,
    no_labels,
    offset_progress,
    require_same_classes,
    require_valid_labels,
    training_notes,
)
from cdkd_edge.quality.masks import HiddenLabels, ImageReader, read_labels
from cdkd_edge.quality.metrics import CLASS_METRICS, METRICS, ClassCounts, ConfusionMatrix, Floats, Metric, number
from cdkd_edge.quality.pictures import write_differences
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.options import SegmentOptions

PARITY_VERSION = 1  # version of the document
_ROUNDING = 1e-9  # so that a loss of exactly the tolerance passes

SIDES = ("reference", "candidate")
Sides = tuple[ClassCounts, ClassCounts]


@dataclass(frozen=True)
class ParityGate:
    """Limits that a candidate must keep."""

    tolerance: float  # largest loss of mIoU, percentage points. A gain is no loss.
    min_agreement: float  # smallest share of pixels with the same label, 0..1

    @classmethod
    def of(cls, precision: str, tolerance: float | None = None, min_agreement: float | None = None) -> ParityGate:
        """The given limits, else those of the candidate's precision: 0.02 points (the paper's), 0.5 for INT8."""
        own = cls(0.5, 0.98) if precision == "int8" else cls(0.02, 0.999)
        return cls(
            own.tolerance if tolerance is None else tolerance,
            own.min_agreement if min_agreement is None else min_agreement,
        )


@dataclass(frozen=True)
class ComparedScore:
    """A score of both labellers, 0..1; None where there is no truth to score on."""

    reference: float | None
    candidate: float | None
    interval: ConfidenceInterval | None  # of the difference, percentage points

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
    matrices: tuple[ConfusionMatrix, ConfusionMatrix]  # reference and candidate against the truth
    confusion: npt.NDArray[np.int64]
    """Pixels with data by the reference's label (row) and the candidate's, ``[K + 1, K + 1]``; last: no label."""
    images: tuple[ImageParity, ...]
    ignored_pixels: int  # pixels without truth; only the agreement counts them
    scores: Mapping[str, ComparedScore]  # by the names of :data:`cdkd_edge.quality.metrics.METRICS`
    class_iou: tuple[ComparedScore, ...]
    agreement: float  # share of the pixels with data on which both agree, 0..1
    agreement_interval: ConfidenceInterval | None
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
            found.append(
                f"it gives the reference's label to {self.agreement:.4%} of the pixels, "
                f"fewer than {100 * self.gate.min_agreement:g} %"
            )
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
        return [
            (names[row], names[column], int(changed[row, column]))
            for row, column in zip(*np.unravel_index(order, changed.shape), strict=True)
        ]

    def document(self) -> dict[str, Any]:
        """JSON data; scores in 0..1, deltas in percentage points, None where there is no number."""
        truth_pixels = self.matrices[0].counts.sum(axis=1)
        return {
            "parity_version": PARITY_VERSION,
            "verdict": self.verdict,
            "failures": list(self.failures),
            "gate": {"tolerance_points": self.gate.tolerance, "min_agreement": self.gate.min_agreement},
            "interval_position": self.interval_position,
            "scores": {name: score.document()[0] for name, score in self.scores.items()},
            "delta_points": {name: score.document()[1] for name, score in self.scores.items()},
            "classes": [
                {
                    "name": name,
                    "truth_pixels": int(truth),
                    **dict(zip(("iou", "delta_points"), iou.document(), strict=True)),
                }
                for name, truth, iou in zip(self.schema.class_names, truth_pixels, self.class_iou, strict=True)
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
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Parity:
    """Label every image of a dataset with both labellers and compare.

    Args:
        reference, candidate: with tiles of the same side. Batches may differ: tiles are independent.
        dataset: labelled images.
        schema: how masks are read; it must have the classes of both.
        gate: the limits that the candidate must keep.
        options: overlap, bands and stretch, as for a label map.
        maps: folder for both label maps and a picture of their differences, per image. Default: none are written.
        trained_on: training record of the reference; a note tells which of its images are in the dataset.
        resamples, seed: of the bootstrap.
        progress: called with tiles done and tiles in all; every tile counts twice.

    Raises:
        UsageError: the tiles differ.
        DatasetError: an image or mask cannot be read, they differ in size, or no pixel has a label.
        SchemaError: a mask holds something that the schema does not define, or the classes differ.
        EngineError: a labeller failed, or gave a label that is no class.
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
    total, done = 2 * sum(len(image.grid) for image in images), 0
    comparison, hidden = _Comparison(schema), HiddenLabels()
    for image in images:
        truth = read_labels(image.pair.mask, schema, hidden)
        with image.open(options) as reader:
            found: list[Labels] = []
            for side, labeller in zip(SIDES, labellers, strict=True):
                path = None if maps is None else maps / f"{image.pair.name}_{side}.tif"
                found.append(_labels(labeller, reader, image, options, path, offset_progress(progress, done, total)))
                done += len(image.grid)
            for labels, labeller in zip(found, labellers, strict=True):
                require_valid_labels(labels, labeller)
            ours, theirs = found
            comparison.add(image, truth, ours, theirs)
            if maps is not None:
                path = maps / f"{image.pair.name}_difference.png"
                write_differences(path, image.pair, reader, truth, ours, theirs, schema)
    notes = [*hidden.notes(), *reading_notes({image.pair.name: image.notes for image in images})]
    if not comparison.table.matrices[0].pixels:
        raise no_labels(f"the {len(images)} masks of {dataset.folder}", hidden)
    if not len(comparison.table.rows()):
        raise DatasetError(f"no pixel of the {len(images)} images of {dataset.folder} has data")
    notes += [*comparison.notes(), *training_notes(dataset, trained_on or {})]
    return comparison.result(gate, resamples, seed, notes, started)


def _labels(
    labeller: Labeller,
    reader: ImageReader,
    image: CheckedImage,
    options: SegmentOptions,
    path: Path | None,
    progress: Callable[[int, int], None],
) -> Labels:
    """The label map of an image, ``[H, W]``; also written to ``path`` if there is one."""
    labels = np.empty((image.height, image.width), np.uint8)
    done = 0

    def keep(rows: Labels) -> None:
        nonlocal done
        labels[done : done + len(rows)] = rows
        done += len(rows)

    label_image(labeller, reader, image, options, keep, path, progress)
    return labels


class _Comparison:
    """Sums up images; gives the result at the end."""

    def __init__(self, schema: LabelSchema) -> None:
        self.schema = schema
        self.table = TileTable(len(schema))
        self._images: list[ImageParity] = []
        self._ignored = 0

    def add(self, image: CheckedImage, truth: Labels, reference: Labels, candidate: Labels) -> None:
        """Count an image tile by tile."""
        name = image.pair.name
        for row, column in image.grid:
            part = slice(row.first, row.last), slice(column.first, column.last)
            self.table.count(name, truth[part], reference[part], candidate[part])
        self._ignored += int(np.count_nonzero(truth == NO_LABEL))
        sums = self.table.rows(name).sum(axis=0)
        ours, theirs = (number(float(METRICS["mean_iou"].score(side))) for side in self.table.class_counts(sums))
        agreement, _ = self.table.agreement(sums)
        self._images.append(ImageParity(name, len(image.grid), number(float(agreement)), ours, theirs))

    def notes(self) -> list[str]:
        """What limits the scores and their intervals."""
        notes = []
        if absent := absent_classes(self.schema, self.table.matrices[0].counts.sum(axis=1)):
            notes.append(f"no pixel of the truth is {absent}: such a class is in no mean here")
        if self.labelled_tiles < MIN_TILES:
            notes.append(f"{self.labelled_tiles} labelled tiles are too few for an interval")
        elif self.labelled_tiles < FEW_TILES:
            notes.append(f"{self.labelled_tiles} labelled tiles are few: the true intervals may be wider")
        return notes

    @property
    def labelled_tiles(self) -> int:
        """Tiles with data in which some pixel has a truth."""
        return int(np.count_nonzero(self.table.rows()[:, : len(self.schema)].sum(axis=1)))

    def result(self, gate: ParityGate, resamples: int, seed: int, notes: Sequence[str], started: float) -> Parity:
        """Scores of the sums, and intervals by resampling tiles."""
        rows, k = self.table.rows(), len(self.schema)
        total, labelled = rows.sum(axis=0), self.labelled_tiles
        draws = resample(rows, resamples, seed) if labelled >= MIN_TILES else None
        sides = self.table.class_counts(total)
        spread = None if draws is None else self.table.class_counts(draws)
        agreement, labelled_agreement = (float(value) for value in self.table.agreement(total))
        return Parity(
            schema=self.schema,
            gate=gate,
            matrices=self.table.matrices,
            confusion=self.table.confusion,
            images=tuple(self._images),
            ignored_pixels=self._ignored,
            scores={name: _compared(metric, sides, spread) for name, metric in METRICS.items()},
            class_iou=tuple(_compared(CLASS_METRICS["iou"], sides, spread, label) for label in range(k)),
            agreement=agreement,
            agreement_interval=None if draws is None else confidence_interval(self.table.agreement(draws)[0]),
            labelled_agreement=number(labelled_agreement),
            tiles=len(rows),
            labelled_tiles=labelled,
            resamples=resamples,
            seed=seed,
            seconds=time.perf_counter() - started,
            notes=tuple(notes),
        )


def _compared(metric: Metric, sides: Sides, spread: Sides | None, label: int | None = None) -> ComparedScore:
    """A score of the sums and its interval by the resamples; of one class if there is a label."""

    def scores(sides: Sides) -> list[Floats]:
        return [metric.score(side) if label is None else metric.score(side)[..., label] for side in sides]

    reference, candidate = (number(float(score)) for score in scores(sides))
    if spread is None:
        return ComparedScore(reference, candidate, None)
    before, after = scores(spread)
    return ComparedScore(reference, candidate, confidence_interval(100 * (after - before)))
