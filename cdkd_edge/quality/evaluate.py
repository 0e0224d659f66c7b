"""Scores of anything that labels tiles, on a labelled dataset, made as its label maps are made.

Every image goes through the same reader, tile grid, overlap and stitcher as ``cdkd-edge segment``, whatever
does the labelling: a checkpoint in PyTorch, a graph, an engine. Two scores differ only by what was judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, EngineError, SchemaError
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, NO_LABEL, LabelSchema, load_schema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.quality.datasets import SCHEMA_FILE, Dataset, Pair
from cdkd_edge.quality.masks import ImageReader, Lost, read_labels
from cdkd_edge.quality.metrics import CLASS_METRICS, ConfusionMatrix, number
from cdkd_edge.quality.picture import write_comparison
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segment.geotiff import LabelMapWriter
from cdkd_edge.segment.options import SegmentOptions
from cdkd_edge.segment.pipeline import label_map_tags, label_rows

Rows = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageScore:
    """One image."""

    name: str
    width: int
    height: int
    labelled_pixels: int
    mean_iou: float | None
    """Over the classes that occur in it, 0..1; None where no pixel has a label."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a labeller on a dataset."""

    schema: LabelSchema
    matrix: ConfusionMatrix
    """Over all pixels of all images: every labelled pixel counts once."""
    images: tuple[ImageScore, ...]
    ignored_pixels: int
    """Without truth; they count nowhere."""
    tiles: int
    seconds: float
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON data; scores in 0..1, None for a class that occurs neither in truth nor in prediction."""
        matrix = self.matrix
        scores = {metric: matrix.class_scores(metric) for metric in CLASS_METRICS}
        classes = [
            {
                "name": name,
                **{metric: number(values[label]) for metric, values in scores.items()},
                "truth_pixels": int(matrix.counts[label].sum()),
                "predicted_pixels": int(matrix.counts[:, label].sum()),
            }
            for label, name in enumerate(self.schema.class_names)
        ]
        return {
            **matrix.scores(),
            "classes": classes,
            "labelled_pixels": matrix.pixels,
            "ignored_pixels": self.ignored_pixels,
            "pixels_without_prediction": int(matrix.counts[:, -1].sum()),
            "confusion": matrix.counts.tolist(),
            "images": [vars(image) for image in self.images],
            "tiles": self.tiles,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


@dataclass
class Job:
    """One pair, looked at before anything is computed."""

    pair: Pair
    grid: TileGrid
    height: int
    width: int
    notes: tuple[str, ...]
    """On how the image and its mask were read."""


@dataclass
class _Sink:
    """Takes rows of a label map as they come: into the matrix, and to the writer if there is one."""

    labeller: Labeller
    truth: Rows
    matrix: ConfusionMatrix
    writer: LabelMapWriter | None
    done: int = field(default=0)

    def __call__(self, rows: Rows) -> None:
        require_labels(rows, self.labeller)
        self.matrix.update(self.truth[self.done : self.done + len(rows)], rows)
        self.done += len(rows)
        if self.writer:
            self.writer.write_rows(rows)


def evaluate(
    labeller: Labeller,
    dataset: Dataset,
    schema: LabelSchema,
    *,
    options: SegmentOptions = SegmentOptions(),
    maps: Path | None = None,
    trained_on: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Label every image of a dataset and count.

    Args:
        labeller: checkpoint, graph or engine.
        dataset: what to judge on.
        schema: how the masks are to be read; its classes must be the labeller's.
        options: overlap, bands and stretch, as for a label map.
        maps: folder for label maps and pictures, one of each per image; default: none are written.
        trained_on: the artefact's training record; images that it names are pointed out.
        progress: called with tiles done and tiles in all.

    Raises:
        DatasetError: an image or mask cannot be read, they differ in size, or no pixel has a label.
        SchemaError: a mask holds something that the schema does not define, or the classes are not the labeller's.
        EngineError: the labeller failed.
    """
    started = time.perf_counter()
    notes: list[str] = []
    require_same_classes(labeller.schema, schema)
    jobs = [look_at(pair, labeller.tile, options) for pair in dataset]
    if not jobs:
        raise DatasetError(f"{dataset.folder}: there is no image to judge on")
    total = sum(len(job.grid) for job in jobs)
    matrix, images, ignored, before, lost = ConfusionMatrix(len(schema)), [], 0, 0, Lost()
    for job in jobs:
        truth = read_labels(job.pair.mask, schema, lost)
        own = ConfusionMatrix(len(schema))
        _judge(labeller, job, truth, own, options, maps, later(progress, before, total))
        if maps is not None:
            write_comparison(job.pair, truth, map_path(maps, job.pair), schema, own, options)
        matrix += own
        ignored += int(np.count_nonzero(truth == NO_LABEL))
        images.append(ImageScore(job.pair.name, job.width, job.height, own.pixels, number(own.mean_iou)))
        before += len(job.grid)
    notes += [*lost.notes(), *reading_notes({job.pair.name: job.notes for job in jobs})]
    if not matrix.pixels:
        raise DatasetError(
            f"no pixel of the {len(jobs)} masks of {dataset.folder} has a label", hint="; ".join(lost.notes()) or None
        )
    notes += _notes(dataset, schema, matrix, trained_on or {})
    return Evaluation(
        schema, matrix, tuple(images), ignored, total, time.perf_counter() - started, tuple(dict.fromkeys(notes))
    )


def map_path(folder: Path, pair: Pair) -> Path:
    """Where the label map of an image goes."""
    return folder / f"{pair.name}_labels.tif"


def require_readable(dataset: Dataset, tile: int, options: SegmentOptions) -> list[str]:
    """Look at every image and mask of a dataset, as :func:`evaluate` does before it computes anything.

    Returns:
        Notes on how they are read.

    Raises:
        DatasetError: an image or mask cannot be read, or they differ in size or place.
    """
    return reading_notes({pair.name: look_at(pair, tile, options).notes for pair in dataset})


def require_labels(labels: Rows, labeller: Labeller) -> None:
    """Make sure that every label is one: what comes out of a broken engine may be any number.

    Raises:
        EngineError: it gave another.
    """
    wrong = labels[(labels >= len(labeller.schema)) & (labels != NO_LABEL)]
    if wrong.size:
        raise EngineError(
            f"{labeller.artefact.file} gave the label {wrong[0]}; there are {len(labeller.schema)} classes",
            hint="build the engine again",
        )


def require_same_classes(ours: LabelSchema, data: LabelSchema) -> None:
    """Make sure that a label means the same to a labeller and to its data.

    Raises:
        SchemaError: other classes, or another order. (Numbered classes are nameless and match any.)
    """
    if len(ours) != len(data):
        raise SchemaError(
            f"the network has {len(ours)} classes ({', '.join(ours.class_names)}), "
            f"schema {data.name!r} has {len(data)}",
            hint="give the schema that the network was trained with (--schema)",
        )
    if ours.class_names != data.class_names and not ours.numbered and not data.numbered:
        raise SchemaError(
            f"the network has the classes {', '.join(ours.class_names)}, schema {data.name!r} has "
            f"{', '.join(data.class_names)}",
            hint="labels are positions: both need the same classes in the same order",
        )


def data_schema(dataset: Dataset, named: str | None, fallback: LabelSchema | None) -> LabelSchema:
    """How to read a dataset's masks: as named, as the data says, or as the labeller has it.

    Raises:
        SchemaError: none of them says.
    """
    if name := named or dataset.schema_name:
        return load_schema(name)
    if fallback is None or fallback.numbered:
        raise SchemaError(
            f"nothing says how the masks of {dataset.folder} encode classes",
            hint=f"name a schema: --schema {', '.join(BUILTIN_SCHEMAS)} or a .toml file; "
            f"or put {SCHEMA_FILE} into the folder",
        )
    return fallback


def later(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Progress of one image as progress of all of them."""
    return lambda done, _: progress(before + done, total)


def look_at(pair: Pair, tile: int, options: SegmentOptions) -> Job:
    """The tiles of an image whose mask fits.

    Raises:
        DatasetError: image or mask cannot be read, or they differ in size or place.
    """
    reader = ImageReader(pair, options)
    try:
        reader.require_fitting_mask()
        return Job(pair, options.grid_over(reader, tile), reader.height, reader.width, tuple(reader.notes))
    finally:
        reader.close()


def _judge(
    labeller: Labeller,
    job: Job,
    truth: Rows,
    matrix: ConfusionMatrix,
    options: SegmentOptions,
    maps: Path | None,
    progress: Callable[[int, int], None],
) -> None:
    reader = ImageReader(job.pair, options)
    try:
        if maps is None:
            label_rows(labeller, reader, job.grid, _Sink(labeller, truth, matrix, None), progress)
            return
        tags = label_map_tags(labeller, reader, options)
        place = map_path(maps, job.pair)
        with LabelMapWriter(place, job.height, job.width, labeller.schema, reader.georeference, tags) as writer:
            label_rows(labeller, reader, job.grid, _Sink(labeller, truth, matrix, writer), progress)
    finally:
        job.notes = tuple(dict.fromkeys((*job.notes, *reader.notes)))
        reader.close()


def _notes(dataset: Dataset, schema: LabelSchema, matrix: ConfusionMatrix, trained_on: Mapping[str, Any]) -> list[str]:
    notes = []
    absent = [name for name, count in zip(schema.class_names, matrix.counts.sum(axis=1), strict=True) if not count]
    if absent:
        notes.append(
            f"no pixel of the truth is {', '.join(absent)}: such a class has no IoU where it is not predicted either, "
            "and 0 where it is"
        )
    return notes + training_notes(dataset, trained_on)


def training_notes(dataset: Dataset, trained_on: Mapping[str, Any]) -> list[str]:
    """What there is to say of images that a training record names, in this folder layout or in another."""
    known = trained_on.get("training_images")
    if not isinstance(known, list):
        return []
    known = [name for name in known if isinstance(name, str)]
    whole, ends = set(known), {end for name in known for end in _ends(name)}
    if seen := [pair for pair in dataset if pair.name in ends or not whole.isdisjoint(_ends(pair.name))]:
        return [
            f"{len(seen)} of the {len(dataset)} images have the names of images that the network was trained on "
            f"({seen[0].name}, ...)"
        ]
    return []


def _ends(name: str) -> list[str]:
    """``Train/Urban/1``, ``Urban/1``, ``1``: a name as folders further up or down have it."""
    parts = name.rsplit("/", 4)  # no more: names in a manifest may be of any length
    return ["/".join(parts[first:]) for first in range(len(parts))]
