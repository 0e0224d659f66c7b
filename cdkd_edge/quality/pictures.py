"""Draws image, truth, predictions and their differences beside each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.quality.datasets import Pair
from cdkd_edge.quality.metrics import ConfusionMatrix
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segmentation.options import SegmentOptions

_PAPER, _INK, _QUIET, _NO_DATA = (255, 255, 255), (28, 32, 38), (110, 118, 128), (235, 235, 235)
_RIGHT, _WRONG, _OTHER, _GAINED = (214, 222, 214), (200, 40, 40), (90, 98, 110), (40, 90, 200)
_MARGIN, _FONT = 16, 17
_LONGEST_SIDE = 520  # of each picture, px

_LegendEntry = tuple[tuple[int, int, int], str, str]  # colour, name and figure


def write_comparison(
    pair: Pair,
    truth: npt.NDArray[np.uint8],
    label_map: Path,
    schema: LabelSchema,
    score: ConfusionMatrix,
    options: SegmentOptions = SegmentOptions(),
) -> None:
    """Draw a PNG beside a label map: image, truth ``[H, W]``, prediction, errors (red), and the IoU of each class."""
    with closing(dataclasses.replace(options, strict=False).open(pair.image)) as reader:
        image = reader.overview(_LONGEST_SIDE)
    height, width = image.shape[:2]
    with gdal(f"reading {label_map}"), open_scene(label_map) as dataset:
        predicted = dataset.read(1, out_shape=(height, width))
    small = _reduced(truth, height, width)
    errors = np.full((height, width, 3), _NO_DATA, np.uint8)
    errors[small != NO_LABEL] = _RIGHT
    errors[(small != NO_LABEL) & (small != predicted)] = _WRONG
    pictures = [image, _colored(small, schema), _colored(predicted, schema), errors]
    mean = "no label" if math.isnan(score.mean_iou) else f"mIoU {score.mean_iou:.1%}"
    share = f", {1 - score.score('overall_accuracy'):.1%}" if score.pixels else ""
    titles = [pair.name, "truth", f"prediction, {mean}", f"errors{share}"]
    scores = zip(schema.classes, score.class_scores("iou"), strict=True)
    entries = [(cls.shown, cls.name, f"IoU {iou:.1%}") for cls, iou in scores if not math.isnan(iou)]
    _write(label_map.with_suffix(".png"), pictures, titles, entries)


def write_differences(
    path: Path,
    pair: Pair,
    reader: SceneReader,
    schema: LabelSchema,
    truth: npt.NDArray[np.uint8],
    reference: npt.NDArray[np.uint8],
    candidate: npt.NDArray[np.uint8],
) -> None:
    """Draw a PNG of two label maps ``[H, W]``: image, reference, candidate, and their differences.

    A pixel of the last picture is coloured if any of the image's pixels under it differs, so that no difference gets
    lost: red where the reference is right, blue where the candidate is, dark grey where neither is or truth is missing.
    """
    image = reader.overview(_LONGEST_SIDE)
    height, width = image.shape[:2]
    kinds = np.where(candidate == truth, np.uint8(2), np.uint8(1))
    kinds[reference == truth] = 3
    kinds[truth == NO_LABEL] = 1
    kinds[reference == candidate] = 0
    pixels = [int(count) for count in np.bincount(kinds.ravel(), minlength=4)]
    rows, columns = (np.arange(n) * size // n for n, size in ((height, kinds.shape[0]), (width, kinds.shape[1])))
    small = np.maximum.reduceat(np.maximum.reduceat(kinds, rows, axis=0), columns, axis=1)
    labels = [_reduced(one, height, width) for one in (reference, candidate)]
    differences = np.array([_RIGHT, _OTHER, _GAINED, _WRONG], np.uint8)[small]
    differences[(small == 0) & (labels[0] == NO_LABEL)] = _NO_DATA
    titles = [pair.name, "reference", "candidate", f"differences, {sum(pixels[1:])} px"]
    entries = [(cls.shown, cls.name, "") for cls in schema.classes]
    entries += [
        (_WRONG, "reference was right", f"{pixels[3]} px"),
        (_GAINED, "candidate is right", f"{pixels[2]} px"),
        (_OTHER, "neither, or no truth", f"{pixels[1]} px"),
    ]
    _write(path, [image, *(_colored(one, schema) for one in labels), differences], titles, entries)


def _reduced(labels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def _colored(labels: npt.NDArray[np.uint8], schema: LabelSchema) -> npt.NDArray[np.uint8]:
    """Labels ``[H, W]`` in the schema's colours, RGB ``[H, W, 3]``; no label is light grey."""
    palette = schema.palette()
    palette[NO_LABEL] = _NO_DATA
    return palette[labels]


def _write(
    path: Path, pictures: Sequence[npt.NDArray[np.uint8]], titles: Sequence[str], entries: Sequence[_LegendEntry]
) -> None:
    """RGB pictures ``[H, W, 3]`` of one size beside each other, each under its title; the legend below."""
    font, swatch, gap, line = ImageFont.load_default(_FONT), _FONT, 8, _FONT + 14
    height, width = pictures[0].shape[:2]
    top, across = _MARGIN + _FONT + 8, len(pictures) * (width + _MARGIN) + _MARGIN
    bottom = top + height + _MARGIN
    places, x, row = [], float(_MARGIN), 0
    for _, name, share in entries:
        needed = swatch + gap + font.getlength(f"{name}  {share}") + 28
        if x + needed > across - _MARGIN and x > _MARGIN:
            x, row = float(_MARGIN), row + 1
        places.append((x, bottom + row * line - 4))
        x += needed
    picture = Image.new("RGB", (across, bottom + ((row + 1) * line + 4 if entries else 0)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (pixels, title) in enumerate(zip(pictures, titles, strict=True)):
        left = _MARGIN + index * (width + _MARGIN)
        picture.paste(Image.fromarray(pixels), (left, top))
        draw.text((left, _MARGIN - 2), title, fill=_INK, font=font)
    for (x, y), (color, name, share) in zip(places, entries, strict=True):
        draw.rectangle((x, y, x + swatch, y + swatch), fill=color, outline=_QUIET)
        draw.text((x + swatch + gap, y - 1), name, fill=_INK, font=font)
        draw.text((x + swatch + gap + font.getlength(f"{name}  "), y - 1), share, fill=_QUIET, font=font)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
