"""The Hann merge: probabilities of overlapping tiles are blended under a Hann window.

All sums are integers, so that the order of tiles does not matter.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import UsageError
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.segmentation.crop import Area, CropMerge, Mask, Pixels
from cdkd_edge.segmentation.plan import PlannedTile, TilePlan
from cdkd_edge.segmentation.spool import Spool

_FULL = 255  # weight along one axis in the middle of a tile; at its edge it is 1, so that every pixel has a weight


def _handed_over(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    starts = [spans[0].first, *(span.start for span in spans[1:]), spans[-1].last]
    return tuple(Span(span.start, starts[i], starts[i + 1]) for i, span in enumerate(spans))


def hann_weights(tile: int, overlap: int) -> npt.NDArray[np.uint32]:
    """Weights along one axis of a tile: a Hann (raised cosine) slope over the overlap at both ends, flat between.

    Two tiles that overlap by ``overlap`` px have weights that add up to the same everywhere.

    Returns:
        Integers 1..255, ``[tile]``.
    """
    depth = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    slope = np.sin(np.pi / 2 * np.minimum(1.0, depth / max(overlap, 0.5))) ** 2
    weights: npt.NDArray[np.uint32] = np.maximum(1, np.rint(slope * _FULL)).astype(np.uint32)
    return weights


class HannMerge(CropMerge):
    """Blends probabilities; ties go to the lower label.

    Sums to which later tiles still add are carried over: the strip to the right of a tile, and below a row of tiles the
    rows that the next one covers too. ``255 * 255 * 255`` times the tiles over a pixel (at most 25, as the overlap is
    at most half a tile) fits 32 bits.

    Args:
        engine: gives probabilities.
        spool: where labels go.
        plan: over an arranged grid, with ``blends``.
        overlap: of neighbouring tiles, px.
        confidence: also write the confidence of the blended probabilities.
        area: the area of interest.

    Raises:
        UsageError: tiles overlap by more than half.
    """

    blends = True

    def __init__(
        self,
        engine: Labeller,
        spool: Spool,
        plan: TilePlan,
        overlap: int,
        *,
        confidence: bool,
        area: Area | None = None,
    ) -> None:
        super().__init__(engine, spool, plan, overlap, confidence=confidence, area=area)
        if 2 * overlap > plan.tile:
            raise UsageError(
                f"--merge hann takes an --overlap of at most half a tile, {plan.tile // 2} px, not {overlap}"
            )
        self._plan = plan
        axis = hann_weights(plan.tile, overlap)
        self._weights = np.outer(axis, axis).astype(np.uint32)
        self._classes = len(engine.schema)
        self._panel = -1
        self._band = -1
        # Both hold sums of weighted probabilities; their last layer is the sum of the weights.
        self._sums = np.zeros((self._classes + 1, plan.tile, plan.tile), np.uint32)
        self._below = np.zeros((self._classes + 1, 0, 0), np.uint32)
        self._below_rows = 0
        self._next_below_rows = 0
        self._taken = 0

    @staticmethod
    def arranged(grid: TileGrid) -> TileGrid:
        """The same tiles; each keeps what no later tile adds to: from its own beginning to that of the next."""
        return TileGrid(_handed_over(grid.rows), _handed_over(grid.columns))

    def add(self, place: PlannedTile, slot: int | None, index: int, valid: Mask | None) -> None:
        """Take a tile, see :class:`.flow.Merge`."""
        self._move_to(place)
        if slot is not None:
            probabilities = self.engine.probabilities(slot)[index]
            for label in range(self._classes):
                self._sums[label] += self._weights * probabilities[label]
            self._sums[-1] += self._weights
        super().add(place, slot, index, valid)
        self._hand_on(place)

    def values(self, place: PlannedTile, slot: int, index: int) -> tuple[Pixels, Pixels | None]:
        """Labels and confidence of the blended probabilities."""
        sums = self._sums[:, place.row.kept, place.column.kept]
        labels = sums[:-1].argmax(axis=0).astype(np.uint8)
        if not self.with_confidence:
            return labels, None
        best, weight = sums[:-1].max(axis=0).astype(np.uint64), sums[-1].astype(np.uint64) * 255
        return labels, ((100 * best + weight // 2) // np.maximum(weight, 1)).astype(np.uint8)

    def _move_to(self, place: PlannedTile) -> None:
        """Begin a tile with what earlier tiles have added to its pixels."""
        tile, columns = self._plan.tile, self._plan.columns(place.panel)
        if place.panel != self._panel:
            self._panel, self._band = place.panel, -1
            rows = self._plan.grid.rows
            deepest = max([a.start + tile - b.start for a, b in pairwise(rows)], default=0)
            width = columns[-1].start + tile - columns[0].start
            self._below = np.zeros((self._classes + 1, deepest, width), np.uint32)
            self._below_rows = 0
        if place.band != self._band:
            self._below_rows = self._next_below_rows if self._band == place.band - 1 >= 0 else 0
            self._band = place.band
            self._sums.fill(0)
            self._taken = 0
        left = place.column.start - columns[0].start
        begin = max(self._taken, left)
        if self._below_rows:
            rows_below = np.s_[:, : self._below_rows]
            self._sums[rows_below][:, :, begin - left :] += self._below[rows_below][:, :, begin : left + tile]
        self._taken = left + tile

    def _hand_on(self, place: PlannedTile) -> None:
        """Carry over the sums to which tiles on the right and below will add."""
        tile, columns, rows = self._plan.tile, self._plan.columns(place.panel), self._plan.grid.rows
        number = columns.index(place.column)
        step = columns[number + 1].start - place.column.start if number + 1 < len(columns) else tile
        if place.band + 1 < len(rows):
            down = rows[place.band + 1].start - place.row.start
            left = place.column.start - columns[0].start
            self._below[:, : tile - down, left : left + step] = self._sums[:, down:, :step]
            self._next_below_rows = tile - down
        else:
            self._next_below_rows = 0
        self._sums[:, :, : tile - step] = self._sums[:, :, step:].copy()
        self._sums[:, :, tile - step :] = 0
