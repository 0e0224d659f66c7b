"""Scores of a labeller on a labelled dataset.

Every image goes through the reader, tile grid, overlap and stitcher of ``cdkd-edge segment``, whether a checkpoint in
PyTorch, a graph or an engine labels it. So two scores differ only by what was judged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import DatasetError, EngineError, SchemaError
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, NO_LABEL, LabelSchema, load_schema
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.quality.datasets import SCHEMA_FILE, Dataset, Pair
from cdkd_edge.quality.masks import HiddenLabels, ImageReader, read_labels
from cdkd_edge.quality.metrics import CLASS_METRICS, ConfusionMatrix, number
from cdkd_edge.quality.pictures import write_comparison
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.raster.read import reading_notes
from cdkd_edge.segmentation.geotiff import LabelMapWriter
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import label_map_tags, label_rows

Labels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageScore:
    """Score of one image."""

    name: str
    width: int
    height: int
    labelled_pixels: int
    mean_iou: float | None  # over the classes that occur in the image, 0..1; None where no pixel has a label


@dataclass(frozen=True)
class Evaluation:
    """Scores of a labeller on a dataset."""

    schema: LabelSchema
    matrix: ConfusionMatrix  # over all pixels of all images: every labelled pixel counts once
    images: tuple[ImageScore, ...]
    ignored_pixels: int  # pixels without truth; no score counts them
    tiles: int
    seconds: float
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """JSON data; scores in 0..1, None for a class that occurs neither in truth nor in prediction."""
        matrix = self.matrix
        scores = {metric: matrix.class_scores(metric) for metric in CLASS_METRICS}
        return {
            **matrix.scores(),
            "classes": [
                {
                    "name": name,
                    **{metric: number(values[label]) for metric, values in scores.items()},
                    "truth_pixels": int(matrix.counts[label].sum()),
                    "predicted_pixels": int(matrix.counts[:, label].sum()),
                }
                for label, name in enumerate(self.schema.class_names)
            ],
            "labelled_pixels": matrix.pixels,
            "ignored_pixels": self.ignored_pixels,
            "pixels_without_prediction": int(matrix.counts[:, -1].sum()),
            "confusion": matrix.counts.tolist(),
            "images": [vars(image) for image in self.images],
            "tiles": self.tiles,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def evaluate(
    labeller: Labeller,
    dataset: Dataset,
    schema: LabelSchema,
    *,
    options: SegmentOptions = SegmentOptions(),
    maps: Path | None = None,
    trained_on: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Label every image of a dataset and score the labels.

    Args:
        labeller, dataset: what is judged, and on what.
        schema: how masks are read; it must have the classes of the labeller.
        options: overlap, bands and stretch, as for a label map.
        maps: folder for a label map and a picture of each image. Default: none are written.
        trained_on: training record of the labeller; a note tells which of its images are in the dataset.
        progress: called with tiles done and tiles in all.

    Raises:
        DatasetError: an image or mask cannot be read, they differ in size, or no pixel has a label.
        SchemaError: a mask holds something that the schema does not define, or the labeller has other classes.
        EngineError: the labeller failed, or gave a label that is no class.
    """
    started = time.perf_counter()
    require_same_classes(labeller.schema, schema)
    images = [check_image(pair, labeller.tile, options) for pair in dataset]
    if not images:
        raise DatasetError(f"{dataset.folder}: there is no image to judge on")
    total, done, ignored = sum(len(image.grid) for image in images), 0, 0
    matrix, scores, hidden = ConfusionMatrix(len(schema)), [], HiddenLabels()
    for image in images:
        truth = read_labels(image.pair.mask, schema, hidden)
        label_map = None if maps is None else maps / f"{image.pair.name}_labels.tif"
        own = ConfusionMatrix(len(schema))

        def count(first: int, rows: Labels, truth: Labels = truth, own: ConfusionMatrix = own) -> None:
            own.update(truth[first : first + len(rows)], rows)  # so only the truth is in memory as a whole

        with image.open(options) as reader:
            label_image(labeller, reader, image, options, count, label_map, offset_progress(progress, done, total))
        if label_map is not None:
            write_comparison(image.pair, truth, label_map, schema, own, options)
        matrix += own
        ignored += int(np.count_nonzero(truth == NO_LABEL))
        scores.append(ImageScore(image.pair.name, image.width, image.height, own.pixels, number(own.mean_iou)))
        done += len(image.grid)
    if not matrix.pixels:
        raise no_labels(f"the {len(images)} masks of {dataset.folder}", hidden)
    notes = [*hidden.notes(), *reading_notes({image.pair.name: image.notes for image in images})]
    if absent := absent_classes(schema, matrix.counts.sum(axis=1)):
        notes.append(
            f"no pixel of the truth is {absent}: such a class has no IoU where it is not predicted either, "
            "and 0 where it is"
        )
    notes += training_notes(dataset, trained_on or {})
    seconds = time.perf_counter() - started
    return Evaluation(schema, matrix, tuple(scores), ignored, total, seconds, tuple(dict.fromkeys(notes)))


# --- shared with parity ---------------------------------------------------------------------------


@dataclass
class CheckedImage:
    """An image whose mask fits, and its tiles."""

    pair: Pair
    grid: TileGrid
    height: int
    width: int
    notes: tuple[str, ...]  # how the image and its mask were read

    @contextlib.contextmanager
    def open(self, options: SegmentOptions) -> Iterator[ImageReader]:
        """Open the image to be read; the reader's notes are added to these notes."""
        reader = ImageReader(self.pair, options)
        try:
            yield reader
        finally:
            self.notes = tuple(dict.fromkeys((*self.notes, *reader.notes)))
            reader.close()


def check_image(pair: Pair, tile: int, options: SegmentOptions) -> CheckedImage:
    """Check that image and mask can be read and fit (else DatasetError), before anything is computed."""
    with contextlib.closing(ImageReader(pair, options)) as reader:
        reader.require_fitting_mask()
        return CheckedImage(pair, options.grid_over(reader, tile), reader.height, reader.width, tuple(reader.notes))


def check_dataset(dataset: Dataset, tile: int, options: SegmentOptions) -> list[str]:
    """Check every image and mask as :func:`evaluate` does before it computes; returns notes on how they are read."""
    return reading_notes({pair.name: check_image(pair, tile, options).notes for pair in dataset})


def label_image(
    labeller: Labeller,
    reader: ImageReader,
    image: CheckedImage,
    options: SegmentOptions,
    take: Callable[[int, Labels], None],
    label_map: Path | None,
    progress: Progress,
) -> None:
    """Label an image tile by tile; ``take`` gets a row's number and the rows from it on, from top to bottom.

    ``label_map`` is written if given. A label that is no class is an EngineError: a broken engine may give any number.
    """
    done, classes = 0, len(labeller.schema)
    with contextlib.ExitStack() as stack:
        writer = None
        if label_map is not None:
            tags, size = label_map_tags(labeller, reader, options), (image.height, image.width)
            writer = LabelMapWriter(label_map, *size, labeller.schema, reader.georeference, tags)
            stack.enter_context(writer)

        def check_and_take(rows: Labels) -> None:
            nonlocal done
            wrong = rows[(rows >= classes) & (rows != NO_LABEL)]
            if wrong.size:
                problem = f"{labeller.artefact.file} gave the label {wrong[0]}; there are {classes} classes"
                raise EngineError(problem, hint="build the engine again")
            take(done, rows)
            done += len(rows)
            if writer is not None:
                writer.write_rows(rows)

        label_rows(labeller, reader, image.grid, check_and_take, progress)


def require_same_classes(ours: LabelSchema, data: LabelSchema) -> None:
    """Make sure that a label means the same to a labeller and to its data, else SchemaError; numbers match any name."""
    names, theirs = ", ".join(ours.class_names), f"schema {data.name!r} has"
    if len(ours) != len(data):
        hint = "give the schema that the network was trained with (--schema)"
        raise SchemaError(f"the network has {len(ours)} classes ({names}), {theirs} {len(data)}", hint=hint)
    if ours.class_names != data.class_names and not ours.numbered and not data.numbered:
        hint = "labels are positions: both need the same classes in the same order"
        raise SchemaError(f"the network has the classes {names}, {theirs} {', '.join(data.class_names)}", hint=hint)


def data_schema(dataset: Dataset, named: str | None, fallback: LabelSchema | None) -> LabelSchema:
    """The schema of a dataset's masks: the one named, else the data's own, else the labeller's, else SchemaError."""
    if name := named or dataset.schema_name:
        return load_schema(name)
    if fallback is None or fallback.numbered:
        ways = f"name a schema: --schema {', '.join(BUILTIN_SCHEMAS)} or a .toml file"
        hint = f"{ways}; or put {SCHEMA_FILE} into the folder"
        raise SchemaError(f"nothing says how the masks of {dataset.folder} encode classes", hint=hint)
    return fallback


def no_labels(masks: str, hidden: HiddenLabels) -> DatasetError:
    """The error for masks of which no pixel has a label."""
    return DatasetError(f"no pixel of {masks} has a label", hint="; ".join(hidden.notes()) or None)


def absent_classes(schema: LabelSchema, pixels: npt.NDArray[np.int64]) -> str:
    """Names of the classes that have none of the pixels ``[K]``, with commas."""
    return ", ".join(name for name, count in zip(schema.class_names, pixels, strict=True) if not count)


def offset_progress(progress: Progress, before: int, total: int) -> Progress:
    """Report the progress of one image as progress over all of them."""
    return lambda done, _: progress(before + done, total)


def training_notes(dataset: Dataset, trained_on: Mapping[str, Any]) -> list[str]:
    """A note if a training record names images of the dataset, in this folder layout or in another."""
    known = trained_on.get("training_images")
    whole = {name for name in known if isinstance(name, str)} if isinstance(known, list) else set()
    ends = {end for name in whole for end in _ends(name)}
    seen = [pair.name for pair in dataset if pair.name in ends or not whole.isdisjoint(_ends(pair.name))]
    how_many = f"{len(seen)} of the {len(dataset)} images have the names of images that the network was trained on"
    return [f"{how_many} ({seen[0]}, ...)"] if seen else []


def _ends(name: str) -> list[str]:
    """``Train/Urban/1``, ``Urban/1``, ``1``: the name without folders above the image."""
    parts = name.rsplit("/", 4)  # no more: names in a manifest may be of any length
    return ["/".join(parts[first:]) for first in range(len(parts))]
