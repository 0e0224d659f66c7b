"""Two labellers on the same images: both label every image once, and are compared tile for tile.

Images go through the reader, tile grid, overlap and stitcher of ``cdkd-edge segment``. Memory is that of the largest
image (its truth and two label maps, 3 bytes a pixel) and about 150 bytes for every tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cdkd_edge.core.errors import DatasetError, UsageError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.quality.bootstrap import FEW_TILES, MIN_TILES, RESAMPLES, TileTable, interval, resampled
from cdkd_edge.quality.datasets import Dataset, Pair
from cdkd_edge.quality.evaluate import (
    Job,
    Rows,
    later,
    look_at,
    require_labels,
    require_same_classes,
    training_notes,
)
from cdkd_edge.quality.masks import ImageReader, Lost, read_labels
from cdkd_edge.quality.metrics import CLASS_METRICS, METRICS, ClassCounts, ConfusionMatrix, Floats, Metric, number
from cdkd_edge.quality.parity import SIDES, Delta, Gate, ImageParity, Parity
from cdkd_edge.quality.picture import write_differences
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segment.geotiff import LabelMapWriter
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.pipeline import label_map_tags, label_rows

Sides = tuple[ClassCounts, ClassCounts]


def compare(
    reference: Labeller,
    candidate: Labeller,
    dataset: Dataset,
    schema: LabelSchema,
    gate: Gate,
    *,
    options: SegmentOptions = SegmentOptions(),
    maps: Path | None = None,
    trained_on: Mapping[str, Any] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Parity:
    """Label every image of a dataset with both and compare.

    Args:
        reference, candidate: with tiles of the same side. Batches may differ: tiles are independent.
        dataset: what to compare on.
        schema: how the masks are to be read; its classes must be those of both.
        gate: what the candidate has to keep.
        options: overlap, bands and stretch, as for a label map.
        maps: folder for both label maps and a picture of where they differ, per image; default: none are written.
        trained_on: the reference's training record; images that it names are pointed out.
        resamples, seed: of the bootstrap.
        progress: called with tiles done and tiles in all; every tile counts twice.

    Raises:
        UsageError: the tiles differ.
        DatasetError: an image or mask cannot be read, they differ in size, or no pixel has a label.
        SchemaError: a mask holds something that the schema does not define, or the classes differ.
        EngineError: a labeller failed, or gave a label that is none.
    """
    started = time.perf_counter()
    if reference.tile != candidate.tile:
        raise UsageError(
            f"{reference.artefact.file} has tiles of {reference.tile} px, {candidate.artefact.file} of "
            f"{candidate.tile} px; compared tile for tile, both need the same",
            hint=f"export again with --tile {candidate.tile} or {reference.tile}",
        )
    for labeller in (reference, candidate):
        require_same_classes(labeller.schema, schema)
    jobs = [look_at(pair, reference.tile, options) for pair in dataset]
    if not jobs:
        raise DatasetError(f"{dataset.folder}: there is no image to compare on")
    total, before = 2 * sum(len(job.grid) for job in jobs), 0
    run = _Comparison(schema)
    for job in jobs:
        truth = read_labels(job.pair.mask, schema, run.lost)
        reader = ImageReader(job.pair, options)
        try:
            labels: list[Rows] = []
            for side, labeller in zip(SIDES, (reference, candidate), strict=True):
                place = None if maps is None else difference_path(maps, job.pair, side)
                labels.append(_label(labeller, reader, job, options, place, later(progress, before, total)))
                before += len(job.grid)
            for found, labeller in zip(labels, (reference, candidate), strict=True):
                require_labels(found, labeller)
            ours, theirs = labels
            run.add(job, truth, ours, theirs)
            if maps is not None:
                place = difference_path(maps, job.pair, "difference")
                write_differences(place, job.pair, reader, truth, ours, theirs, schema)
        finally:
            job.notes = tuple(dict.fromkeys((*job.notes, *reader.notes)))
            reader.close()
    run.notes = reading_notes({job.pair.name: job.notes for job in jobs})
    return run.result(dataset, gate, resamples, seed, trained_on or {}, time.perf_counter() - started)


def difference_path(folder: Path, pair: Pair, what: str) -> Path:
    """Where a label map (``reference``, ``candidate``) or the picture (``difference``) of an image goes."""
    return folder / f"{pair.name}_{what}.{'png' if what == 'difference' else 'tif'}"


def _label(
    labeller: Labeller,
    reader: ImageReader,
    job: Job,
    options: SegmentOptions,
    place: Path | None,
    progress: Callable[[int, int], None],
) -> Rows:
    """The label map of an image; written to ``place`` as well if there is one."""
    labels = np.empty((job.height, job.width), np.uint8)
    done = 0

    def keep(rows: Rows) -> None:
        nonlocal done
        labels[done : done + len(rows)] = rows
        done += len(rows)

    if place is None:
        label_rows(labeller, reader, job.grid, keep, progress)
        return labels
    tags = label_map_tags(labeller, reader, options)
    with LabelMapWriter(place, job.height, job.width, labeller.schema, reader.georeference, tags) as writer:

        def keep_and_write(rows: Rows) -> None:
            keep(rows)
            writer.write_rows(rows)

        label_rows(labeller, reader, job.grid, keep_and_write, progress)
    return labels


class _Comparison:
    """Counts while images come, numbers at the end."""

    def __init__(self, schema: LabelSchema) -> None:
        self.schema, self.lost = schema, Lost()
        self.notes: list[str] = []
        self.table = TileTable(len(schema))
        self.matrices = (ConfusionMatrix(len(schema)), ConfusionMatrix(len(schema)))
        self.confusion = np.zeros((len(schema) + 1,) * 2, np.int64)
        self.images: list[ImageParity] = []
        self.ignored = 0

    def add(self, job: Job, truth: Rows, reference: Rows, candidate: Rows) -> None:
        for row, column in job.grid:
            piece = slice(row.first, row.last), slice(column.first, column.last)
            self._add_tile(job.pair.name, truth[piece], reference[piece], candidate[piece])
        self.ignored += int(np.count_nonzero(truth == NO_LABEL))
        rows = self.table.rows(job.pair.name).sum(axis=0)
        ours, theirs = (number(float(METRICS["mean_iou"].score(side))) for side in self.table.class_counts(rows))
        agreement, _ = self.table.agreement(rows)
        self.images.append(
            ImageParity(
                job.pair.name,
                len(job.grid),
                number(float(agreement)),
                ours,
                theirs,
            )
        )

    def _add_tile(self, image: str, truth: Rows, reference: Rows, candidate: Rows) -> None:
        own = []
        for total, labels in zip(self.matrices, (reference, candidate), strict=True):
            matrix = ConfusionMatrix(len(self.schema))
            matrix.update(truth, labels)
            total += matrix
            own.append(matrix)
        # Without data both maps have no label: the stitcher has taken it. If only one has none, they differ.
        valid = (reference != NO_LABEL) | (candidate != NO_LABEL)
        same, known = valid & (reference == candidate), valid & (truth != NO_LABEL)
        counts = [int(np.count_nonzero(where)) for where in (valid, same, known, known & same)]
        self.table.add(image, own[0], own[1], (counts[0], counts[1], counts[2], counts[3]))
        k = len(self.schema)
        pairs = np.minimum(reference[valid], k).astype(np.int64) * (k + 1) + np.minimum(candidate[valid], k)
        self.confusion += np.bincount(pairs, minlength=(k + 1) ** 2).reshape(k + 1, k + 1)

    def result(
        self,
        dataset: Dataset,
        gate: Gate,
        resamples: int,
        seed: int,
        trained_on: Mapping[str, Any],
        seconds: float,
    ) -> Parity:
        if not self.matrices[0].pixels:
            raise DatasetError(
                f"no pixel of the {len(self.images)} masks of {dataset.folder} has a label",
                hint="; ".join(self.lost.notes()) or None,
            )
        rows = self.table.rows()
        if not len(rows):
            raise DatasetError(f"no pixel of the {len(self.images)} images of {dataset.folder} has data")
        k = len(self.schema)
        total, labelled = rows.sum(axis=0), int(np.count_nonzero(rows[:, :k].sum(axis=1)))
        draws = resampled(rows, resamples, seed) if labelled >= MIN_TILES else None
        sides = self.table.class_counts(total)
        spread = None if draws is None else self.table.class_counts(draws)
        ious = [CLASS_METRICS["iou"].score(side) for side in sides]
        agreement, labelled_agreement = (float(value) for value in self.table.agreement(total))
        return Parity(
            schema=self.schema,
            gate=gate,
            matrices=self.matrices,
            confusion=self.confusion,
            images=tuple(self.images),
            ignored_pixels=self.ignored,
            deltas={name: _delta(metric, sides, spread) for name, metric in METRICS.items()},
            class_deltas=tuple(_delta(CLASS_METRICS["iou"], sides, spread, label) for label in range(k)),
            scores={
                name: (float(metric.score(sides[0])), float(metric.score(sides[1]))) for name, metric in METRICS.items()
            },
            class_iou=tuple((number(float(a)), number(float(b))) for a, b in zip(*ious, strict=True)),
            agreement=agreement,
            agreement_interval=None if draws is None else interval(self.table.agreement(draws)[0]),
            labelled_agreement=number(labelled_agreement),
            tiles=len(rows),
            labelled_tiles=labelled,
            resamples=resamples,
            seed=seed,
            seconds=seconds,
            notes=tuple(self._notes(dataset, labelled, trained_on)),
        )

    def _notes(self, dataset: Dataset, labelled: int, trained_on: Mapping[str, Any]) -> list[str]:
        notes = [*self.lost.notes(), *self.notes]
        truth = self.matrices[0].counts.sum(axis=1)
        if not truth.all():
            names = ", ".join(name for name, count in zip(self.schema.class_names, truth, strict=True) if not count)
            notes.append(f"no pixel of the truth is {names}: such a class is in no mean here")
        if labelled < MIN_TILES:
            notes.append(f"{labelled} labelled tiles are too few for an interval")
        elif labelled < FEW_TILES:
            notes.append(f"{labelled} labelled tiles are few: read the intervals as lower bounds of their width")
        return notes + training_notes(dataset, trained_on)


def _delta(metric: Metric, sides: Sides, spread: Sides | None, label: int | None = None) -> Delta:
    """Candidate minus reference, in points, and the interval of the resamples; of one class if there is a label."""

    def difference(sides: Sides) -> Floats:
        values = metric.score(sides[1]) - metric.score(sides[0])
        return 100 * (values if label is None else values[..., label])

    return Delta(number(float(difference(sides))), None if spread is None else interval(difference(spread)))
