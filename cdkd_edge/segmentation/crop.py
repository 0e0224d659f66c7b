"""The crop merge: of each tile the kept part, without the pixels that get no label. Other merges build on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.segmentation.plan import PlannedTile, TilePlan
from cdkd_edge.segmentation.spool import Spool

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

NO_CONFIDENCE = 255  # the value of a confidence raster where there is no label

Area = Callable[[int, int, int, int], Mask]
"""Which pixels of a rectangle (top, left, height, width) lie in the area of interest."""


class CropMerge:
    """Writes the kept part of each tile into the spool.

    A merge that blends tiles derives from it, sets :attr:`blends`, and overrides :meth:`arranged`, :meth:`add` and
    :meth:`values`.

    Args:
        engine: what computed the tiles.
        spool: where labels go.
        plan: the tiles.
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
        self.on_band: Callable[[], None] = lambda: None
        """Called when a row of tiles is done."""
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
            self._put_nothing(row, column)
            return
        labels, confidence = self.values(place, slot, index)
        self._put(LABELS, row, column, labels, shown, NO_LABEL)
        if confidence is not None:
            self._put(CONFIDENCE, row, column, confidence, shown, NO_CONFIDENCE)

    def _shown(self, row: Span, column: Span, valid: Mask | None) -> Mask | None:
        """Which kept pixels get a label; None: all."""
        kept = None if valid is None else valid[row.kept, column.kept]
        if self._area is None:
            return kept
        inside = self._area(row.first, column.first, row.last - row.first, column.last - column.first)
        return inside if kept is None else kept & inside

    def _put_nothing(self, row: Span, column: Span) -> None:
        """Write no label into the kept part of a tile."""
        shape = row.last - row.first, column.last - column.first
        self.spool.put(LABELS, row.first, column.first, NO_LABEL, shape)
        if self.with_confidence:
            self.spool.put(CONFIDENCE, row.first, column.first, NO_CONFIDENCE, shape)

    def _put(self, kind: str, row: Span, column: Span, values: Pixels, shown: Mask | None, nothing: int) -> None:
        if shown is not None:
            values = np.where(shown, values, np.uint8(nothing))
        self.spool.put(kind, row.first, column.first, values, values.shape)


class RowMerge:
    """Hands on whole rows of the scene's labels, for scores. Memory is one row of tiles, whatever the scene's height.

    Tiles must come row by row, in any order within a row.

    Args:
        engine: what computed the tiles.
        width: of the scene, px.
        columns: tiles in a row.
        sink: receives finished rows ``[h, width]`` from top to bottom; it must not keep the array.
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
