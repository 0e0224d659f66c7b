"""Scores of rules that see only a pixel's colour: a network must beat them to have learned anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.quality.datasets import Dataset, Pair
from cdkd_edge.quality.masks import ImageReader, read_labels
from cdkd_edge.quality.metrics import ConfusionMatrix
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.segmentation.options import SegmentOptions

UInt8Array = npt.NDArray[np.uint8]

_BITS = 5  # histograms have 2**5 = 32 bins a channel
_TILE = 512


def score_color_rules(
    training: Dataset,
    validation: Dataset,
    schema: LabelSchema,
    *,
    options: SegmentOptions = SegmentOptions(),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, ConfusionMatrix]:
    """Learn both rules of :func:`_rules` from one dataset and score them on another."""
    counts = np.zeros((len(schema), 1 << 3 * _BITS), np.int64)  # how often each class was seen in each colour
    sums = np.zeros((len(schema), 3), np.int64)
    for index, pair in enumerate(training, 1):
        note(f"counting the colours of {pair.name} ({index} of {len(training)})")
        for image, truth, valid in _tiles(pair, schema, options):
            codes = _codes(image)
            for label in range(len(schema)):
                here = valid & (truth == label)
                counts[label] += np.bincount(codes[here], minlength=counts.shape[1])
                sums[label] += image[:, here].sum(axis=1, dtype=np.int64)
    rules = _rules(counts, sums)
    scores = {name: ConfusionMatrix(len(schema)) for name in rules}
    note("scoring rules on colour alone")
    for pair in validation:
        for image, truth, valid in _tiles(pair, schema, options):
            for name, table in rules.items():
                scores[name].update(truth, np.where(valid, table[_codes(image)], np.uint8(NO_LABEL)))
    return scores


def _rules(counts: npt.NDArray[np.int64], sums: npt.NDArray[np.int64]) -> dict[str, UInt8Array]:
    """Tables of labels by colour, by the name of the rule; of pixels by class and colour, and sums of their RGB.

    "nearest mean": the class whose mean colour is nearest. "colour histogram": the class seen most often with that
    colour, to which the best rule on colour alone converges; colours never seen get the nearest mean.
    """
    pixels = counts.sum(axis=1)
    means = sums / np.maximum(pixels, 1)[:, None]
    bins = np.stack(np.unravel_index(np.arange(1 << 3 * _BITS), (1 << _BITS,) * 3), axis=-1)
    centers = (bins + 0.5) * (1 << 8 - _BITS)  # the colour in the middle of every bin
    distance = ((centers[:, None, :] - means) ** 2).sum(axis=-1)  # [colours, K]
    distance[:, pixels == 0] = np.inf
    nearest = distance.argmin(axis=1).astype(np.uint8)
    frequent = np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), nearest).astype(np.uint8)
    return {"nearest mean": nearest, "colour histogram": frequent}


def _tiles(
    pair: Pair, schema: LabelSchema, options: SegmentOptions
) -> Iterator[tuple[UInt8Array, UInt8Array, npt.NDArray[np.bool_]]]:
    """An image in pieces that do not overlap: RGB ``[3, H, W]``, labels, and where it has data ``[H, W]``."""
    labels, tile = read_labels(pair.mask, schema), np.empty((3, _TILE, _TILE), np.uint8)
    with closing(ImageReader(pair, options)) as reader:
        reader.require_fitting_mask()
        for row, column in TileGrid.over(reader.height, reader.width, _TILE, 0):
            valid = reader.read_tile(row, column, tile)
            valid = np.ones((_TILE, _TILE), bool) if valid is None else valid
            truth = labels[row.first : row.last, column.first : column.last]
            yield tile[:, row.kept, column.kept], truth, valid[row.kept, column.kept]


def _codes(image: UInt8Array) -> npt.NDArray[np.int32]:
    """Colour bin of every pixel of RGB ``[3, H, W]``, int32 ``[H, W]``."""
    bins = (image >> (8 - _BITS)).astype(np.int32)
    codes: npt.NDArray[np.int32] = bins[0] << 2 * _BITS | bins[1] << _BITS | bins[2]
    return codes
