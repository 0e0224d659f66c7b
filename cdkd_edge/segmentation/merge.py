"""How tiles become one map. A new merge is a subclass of :class:`CropMerge` and a row of :mod:`.merge_modes`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.segmentation.plan import PlannedTile, TilePlan
from cdkd_edge.segmentation.spool import Spool

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

# Which pixels of a rectangle (top, left, height, width) lie in the area of interest.
Area = Callable[[int, int, int, int], Mask]
NO_CONFIDENCE = 255  # the value of a confidence raster where there is no label
_FULL = 255  # Hann weight along one axis in the middle of a tile; at its edge it is 1, so that each pixel has a weight


class CropMerge:
    """Writes the kept part of each tile into the spool, without the pixels that get no label.

    A merge that blends tiles derives from it, sets :attr:`blends`, and overrides :meth:`arranged`, :meth:`add` and
    :meth:`values`.

    Args:
        engine, spool, plan: what computed the tiles, where labels go, and the tiles.
        overlap: of neighbouring tiles, px.
        confidence: whether confidence is written too.
        area: the area of interest. Default: all of the scene.
    """

    blends = False  # whether a tile also adds to pixels that other tiles keep, so that all of it counts

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
        self.on_band: Callable[[], None] = lambda: None  # called when a row of tiles is done
        self.engine: Any = engine
        self.spool = spool
        self.with_confidence = confidence
        self._area = area
        self._without_data = 0

    @staticmethod
    def arranged(grid: TileGrid) -> TileGrid:
        """The grid with the parts that this merge lets each tile keep."""
        return grid

    def add(self, place: PlannedTile, slot: int | None, index: int, valid: Mask | None) -> None:
        """Take a tile, see :class:`.flow.Merge`."""
        if place.emits:
            self._emit(place, slot, index, valid)
        if place.ends_band:
            self.spool.finish_band(self._without_data)
            self._without_data = 0
            self.on_band()

    def values(self, place: PlannedTile, slot: int, index: int) -> tuple[Pixels, Pixels | None]:
        """Labels and, if asked for, confidence of the kept part of a tile."""
        kept = (place.row.kept, place.column.kept)
        confidence = self.engine.confidence(slot)[index][kept] if self.with_confidence else None
        return self.engine.output(slot)[index][kept], confidence

    def _emit(self, place: PlannedTile, slot: int | None, index: int, valid: Mask | None) -> None:
        """Write the kept part of a tile."""
        row, column = place.row, place.column
        shown = None if slot is None else self._shown(row, column, valid)
        if slot is None or (shown is not None and not shown.any()):
            self._without_data += slot is None
            shape = row.last - row.first, column.last - column.first
            self.spool.put(LABELS, row.first, column.first, NO_LABEL, shape)
            if self.with_confidence:
                self.spool.put(CONFIDENCE, row.first, column.first, NO_CONFIDENCE, shape)
            return
        labels, confidence = self.values(place, slot, index)
        for kind, values, nothing in ((LABELS, labels, NO_LABEL), (CONFIDENCE, confidence, NO_CONFIDENCE)):
            if values is not None:
                values = values if shown is None else np.where(shown, values, np.uint8(nothing))
                self.spool.put(kind, row.first, column.first, values, values.shape)

    def _shown(self, row: Span, column: Span, valid: Mask | None) -> Mask | None:
        """Which kept pixels get a label; None: all."""
        kept = None if valid is None else valid[row.kept, column.kept]
        if self._area is None:
            return kept
        inside = self._area(row.first, column.first, row.last - row.first, column.last - column.first)
        return inside if kept is None else kept & inside


def _handed_over(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    starts = [spans[0].first, *(span.start for span in spans[1:]), spans[-1].last]
    return tuple(Span(span.start, starts[i], starts[i + 1]) for i, span in enumerate(spans))


def hann_weights(tile: int, overlap: int) -> npt.NDArray[np.uint32]:
    """Weights along one axis of a tile: a Hann (raised cosine) slope over the overlap at both ends, flat between.

    Two tiles that overlap by ``overlap`` px have weights that add up to the same everywhere. Returns integers 1..255,
    ``[tile]``.
    """
    depth = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    slope = np.sin(np.pi / 2 * np.minimum(1.0, depth / max(overlap, 0.5))) ** 2
    weights: npt.NDArray[np.uint32] = np.maximum(1, np.rint(slope * _FULL)).astype(np.uint32)
    return weights


class HannMerge(CropMerge):
    """Blends probabilities; ties go to the lower label.

    Sums to which later tiles still add are carried over: the strip to the right of a tile, and below a row of tiles the
    rows that the next one covers too. All sums are integers, so that the order of tiles does not matter;
    ``255 * 255 * 255`` times the tiles over a pixel (at most 25, as the overlap is at most half a tile) fits 32 bits.
    Arguments as for :class:`CropMerge`; raises UsageError if tiles overlap by more than half.
    """

    blends = True

    def __init__(self, engine: Labeller, spool: Spool, plan: TilePlan, overlap: int, **options: Any) -> None:
        super().__init__(engine, spool, plan, overlap, **options)
        if 2 * overlap > plan.tile:
            most = plan.tile // 2
            raise UsageError(f"--merge hann takes an --overlap of at most half a tile, {most} px, not {overlap}")
        self._plan = plan
        axis = hann_weights(plan.tile, overlap)
        self._weights = np.outer(axis, axis).astype(np.uint32)
        self._classes = len(engine.schema)
        self._panel = self._band = -1
        # Both hold sums of weighted probabilities; their last layer is the sum of the weights.
        self._sums = np.zeros((self._classes + 1, plan.tile, plan.tile), np.uint32)
        self._below = np.zeros((self._classes + 1, 0, 0), np.uint32)
        self._below_rows = self._next_below_rows = self._taken = 0

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


class RowMerge:
    """Hands on whole rows of the scene's labels, for scores. Memory is one row of tiles, whatever the scene's height.

    Tiles must come row by row, in any order within a row. ``sink`` receives finished rows ``[h, width]`` from top to
    bottom; it must not keep the array. ``width`` is the scene's, px; ``columns`` the number of tiles in a row.
    """

    blends = False

    def __init__(self, engine: Labeller, width: int, columns: int, sink: Callable[[Pixels], None]) -> None:
        self._engine = engine
        self._width, self._columns = width, columns
        self._sink = sink
        self._row: Span | None = None
        self._band = np.empty((0, width), np.uint8)
        self._placed = 0

    def add(self, place: PlannedTile, slot: int | None, index: int, valid: Mask | None) -> None:
        """Take a tile, see :class:`.flow.Merge`."""
        self.put(place.row, place.column, None if slot is None else self._engine.output(slot)[index], valid)

    def put(self, row: Span, column: Span, labels: Pixels | None, valid: Mask | None) -> None:
        """Take the kept part of a tile: ``labels`` and ``valid`` are ``[T, T]``, None for no label and all valid."""
        if row != self._row:
            self._row = row
            self._band = np.empty((row.last - row.first, self._width), np.uint8)
        target = self._band[:, column.first : column.last]
        if labels is None:
            target.fill(NO_LABEL)
        else:
            target[:] = labels[row.kept, column.kept]
            if valid is not None:
                target[~valid[row.kept, column.kept]] = NO_LABEL
        self._placed += 1
        if self._placed == self._columns:
            self._placed = 0
            self._sink(self._band)
