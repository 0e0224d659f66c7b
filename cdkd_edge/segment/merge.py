"""From the labels of tiles to the labels of the scene: the kept part of each tile, with what is not valid taken out.

Tiles to rows: collects the kept part of each tile until a row of tiles is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.engines.protocol import Labeller
from cdkd_edge.raster.grid import Span
from cdkd_edge.segment.plan import Place
from cdkd_edge.segment.spool import CONFIDENCE, LABELS, Spool


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


Mask = npt.NDArray[np.bool_]

NO_CONFIDENCE = 255
"""In a confidence raster, where there is no label."""

Area = Callable[[int, int, int, int], "Mask | None"]
"""Which pixels of a rectangle (top, left, height, width) are in the area of interest; None: all of them."""


class Outputs(Protocol):
    """What an engine with more than labels offers besides :class:`cdkd_edge.engines.protocol.Labeller`."""

    def confidence(self, slot: int) -> npt.NDArray[np.uint8]:
        """``[N, T, T]``, per cent."""

    def probabilities(self, slot: int) -> npt.NDArray[np.uint8]:
        """``[N, K, T, T]``, 255 being certain."""


def engine_output(engine: Labeller) -> str:
    """What an engine gives: ``labels``, ``confidence`` (and labels) or ``probabilities`` (and both)."""
    return engine.output_kind


def require_output(engine: Labeller, *, merge: str, confidence: bool) -> None:
    """Make sure that an engine gives what a merge needs.

    Raises:
        UsageError: there is no such merge.
        SceneError: it does not.
    """
    if merge not in ("crop", "hann"):
        raise UsageError(f"there is no merge {merge!r}", hint="crop keeps the middle of each tile, hann blends tiles")
    given = engine_output(engine)
    if merge == "hann" and given != "probabilities":
        raise SceneError(
            f"{engine.artefact.file} gives {given}; --merge hann blends probabilities",
            hint="build an engine that gives them: cdkd-edge build --probabilities",
        )
    if confidence and given not in ("confidence", "probabilities"):
        raise SceneError(
            f"{engine.artefact.file} gives labels alone; --confidence needs more",
            hint="build an engine that does: cdkd-edge build --confidence",
        )


class RowMerge:
    """Kept parts of tiles as rows of the scene, for who wants rows (scores, small label maps)."""

    whole_tile = False

    def __init__(self, engine: Labeller, stitcher: RowStitcher) -> None:
        self._engine, self._stitcher = engine, stitcher

    def add(self, place: Place, slot: int | None, index: int, valid: Mask | None) -> None:
        """See :class:`.flow.Merge`."""
        labels = None if slot is None else self._engine.output(slot)[index]
        self._stitcher.place(place.row, place.column, labels, valid)


class SpoolMerge:
    """Kept parts of tiles into the spool: the base of both merges."""

    whole_tile = False

    def __init__(self, engine: Labeller, spool: Spool, *, confidence: bool, area: Area | None = None) -> None:
        self.on_band: Callable[[], None] = lambda: None
        """Called when a row of tiles is done."""
        self.engine: Any = engine
        self.spool = spool
        self.with_confidence = confidence
        self._area = area
        self._without_data = 0

    def add(self, place: Place, slot: int | None, index: int, valid: Mask | None) -> None:
        """See :class:`.flow.Merge`."""
        if place.emits:
            self.emit(place, slot, index, valid)
        if place.ends_band:
            self.spool.finish_band(self._without_data)
            self._without_data = 0
            self.on_band()

    def emit(self, place: Place, slot: int | None, index: int, valid: Mask | None) -> None:
        """Write the kept part of a tile."""
        row, column = place.row, place.column
        shown = None if slot is None else self.shown(row, column, valid)
        if slot is None or (shown is not None and not shown.any()):
            self._without_data += slot is None
            self.put_nothing(row, column)
            return
        labels, confidence = self.values(place, slot, index)
        self._put(LABELS, row, column, labels, shown, NO_LABEL)
        if confidence is not None:
            self._put(CONFIDENCE, row, column, confidence, shown, NO_CONFIDENCE)

    def values(self, place: Place, slot: int, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
        """Labels and, if asked for, confidence of the kept part of a tile."""
        kept = (place.row.kept, place.column.kept)
        confidence = self.engine.confidence(slot)[index][kept] if self.with_confidence else None
        return self.engine.output(slot)[index][kept], confidence

    def shown(self, row: Span, column: Span, valid: Mask | None) -> Mask | None:
        """Which kept pixels get a label; None: all."""
        kept = None if valid is None else valid[row.kept, column.kept]
        inside = None
        if self._area is not None:
            inside = self._area(row.first, column.first, row.last - row.first, column.last - column.first)
        if kept is None or inside is None:
            return inside if kept is None else kept
        return kept & inside

    def put_nothing(self, row: Span, column: Span) -> None:
        """No label in the kept part of a tile."""
        shape = row.last - row.first, column.last - column.first
        self.spool.put(LABELS, row.first, column.first, NO_LABEL, shape)
        if self.with_confidence:
            self.spool.put(CONFIDENCE, row.first, column.first, NO_CONFIDENCE, shape)

    def _put(
        self, kind: int, row: Span, column: Span, values: npt.NDArray[np.uint8], shown: Mask | None, nothing: int
    ) -> None:
        if shown is not None:
            values = np.where(shown, values, np.uint8(nothing))
        self.spool.put(kind, row.first, column.first, values, values.shape)
