"""Tiles to rows: collects the kept part of each tile until a row of tiles is complete."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cdkd_edge.labels import NO_LABEL
from cdkd_edge.scene.grid import Span


class RowStitcher:
    """Assembles one row of tiles at a time; memory is one row of tiles, whatever the scene's height.

    Tiles must come row by row, in any order within a row.

    Args:
        width: of the scene, px.
        columns: tiles in a row.
        sink: receives finished rows ``[h, width]``, top to bottom; it must not keep the array.
    """

    def __init__(self, width: int, columns: int, sink: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        self._width = width
        self._columns = columns
        self._sink = sink
        self._row: Span | None = None
        self._band = np.empty((0, width), np.uint8)
        self._placed = 0

    def place(
        self, row: Span, column: Span, labels: npt.NDArray[np.uint8] | None, valid: npt.NDArray[np.bool_] | None
    ) -> None:
        """Take the kept part of a tile.

        Args:
            row, column: where the tile lies.
            labels: ``[T, T]``, or None for a tile without a valid pixel.
            valid: ``[T, T]``; invalid pixels get no label. None: all valid.
        """
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
