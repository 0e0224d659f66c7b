"""Labels from a pixel's colour alone: the score that a network must beat to have learned anything else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.engines.protocol import LabelsOnly, UInt8Array
from cdkd_edge.quality.datasets import Dataset
from cdkd_edge.quality.evaluate import Evaluation, evaluate
from cdkd_edge.quality.masks import ImageReader, read_labels
from cdkd_edge.raster.grid import TileGrid
from cdkd_edge.segment.options import SegmentOptions

_BITS = 5
"""Histograms have 2**5 = 32 bins a channel."""
_TILE = 512


class ColorCounts:
    """How often each class was seen in each of 32 x 32 x 32 colours."""

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, 1 << 3 * _BITS), np.int64)
        self.sums = np.zeros((classes, 3), np.int64)

    def update(self, image: UInt8Array, labels: UInt8Array) -> None:
        """Count pixels: RGB ``[3, H, W]`` and labels ``[H, W]``."""
        codes = _codes(image)
        for label in range(len(self.counts)):
            here = labels == label
            self.counts[label] += np.bincount(codes[here], minlength=self.counts.shape[1])
            self.sums[label] += image[:, here].sum(axis=1, dtype=np.int64)

    def rules(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Tables of labels by colour, by the name of the rule.

        "nearest mean": the class whose mean colour is nearest. "colour histogram": the class seen most often with that
        colour, to which the best rule on colour alone converges; colours never seen get the nearest mean.
        """
        pixels = self.counts.sum(axis=1)
        means = self.sums / np.maximum(pixels, 1)[:, None]
        distance = ((_centers()[:, None, :] - means) ** 2).sum(axis=-1)  # [colours, K]
        distance[:, pixels == 0] = np.inf
        nearest = distance.argmin(axis=1).astype(np.uint8)
        frequent = np.where(self.counts.sum(axis=0) > 0, self.counts.argmax(axis=0), nearest).astype(np.uint8)
        return {"nearest mean": nearest, "colour histogram": frequent}


class ColorLabeller(LabelsOnly):
    """Labels tiles by a table of labels by colour. See :class:`cdkd_edge.engines.protocol.Labeller`."""

    def __init__(self, table: npt.NDArray[np.uint8], schema: LabelSchema, name: str) -> None:
        self.schema, self.artefact = schema, FileRecord(name, "", 0)
        self.tile, self.batch, self.slots = _TILE, 1, 2
        self._table = table
        self._inputs: UInt8Array = np.zeros((self.slots, 1, 3, _TILE, _TILE), np.uint8)
        self._outputs: UInt8Array = np.full((self.slots, 1, _TILE, _TILE), NO_LABEL, np.uint8)

    def input(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.input`."""
        buffer: UInt8Array = self._inputs[slot]
        return buffer

    def output(self, slot: int) -> UInt8Array:
        """See :meth:`cdkd_edge.engines.protocol.Labeller.output`."""
        buffer: UInt8Array = self._outputs[slot]
        return buffer

    def launch(self, slot: int) -> None:
        """Look up every pixel."""
        self._outputs[slot, 0] = self._table[_codes(self._inputs[slot, 0])]

    def wait(self, slot: int) -> None:
        """Do nothing: :meth:`launch` has waited."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def evaluate_color_rules(
    training: Dataset,
    validation: Dataset,
    schema: LabelSchema,
    *,
    options: SegmentOptions = SegmentOptions(),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Evaluation]:
    """Learn both rules from one dataset and evaluate them on another, by the same path as networks.

    Raises:
        DatasetError, SchemaError: as :func:`cdkd_edge.quality.evaluate.evaluate` does.
    """
    seen = ColorCounts(len(schema))
    for index, pair in enumerate(training, 1):
        note(f"counting the colours of {pair.name} ({index} of {len(training)})")
        labels = read_labels(pair.mask, schema)
        reader = ImageReader(pair, options)
        try:
            reader.require_fitting_mask()
            tile = np.empty((3, _TILE, _TILE), np.uint8)
            for row, column in TileGrid.over(reader.height, reader.width, _TILE, 0):
                valid = reader.read_tile(row, column, tile)
                truth = labels[row.first : row.last, column.first : column.last]
                if valid is not None:
                    truth = np.where(valid[row.kept, column.kept], truth, np.uint8(NO_LABEL))
                seen.update(tile[:, row.kept, column.kept], truth)
        finally:
            reader.close()
    scores = {}
    for name, table in seen.rules().items():
        note(f"evaluating the rule {name}")
        scores[name] = evaluate(ColorLabeller(table, schema, name), validation, schema, options=options)
    return scores


def _codes(image: UInt8Array) -> npt.NDArray[np.int32]:
    """Colour bin of every pixel of RGB ``[3, H, W]``, int32 ``[H, W]``."""
    bins = (image >> (8 - _BITS)).astype(np.int32)
    codes: npt.NDArray[np.int32] = bins[0] << 2 * _BITS | bins[1] << _BITS | bins[2]
    return codes


def _centers() -> npt.NDArray[np.float64]:
    """The colour in the middle of every bin, ``[colours, 3]``."""
    codes = np.arange(1 << 3 * _BITS)
    mask = (1 << _BITS) - 1
    bins = np.stack([codes >> 2 * _BITS, codes >> _BITS & mask, codes & mask], axis=-1)
    return (bins + 0.5) * (1 << 8 - _BITS)
