"""Pixels between the file and the tiles: each block of the file is decoded once, whatever tiles need it.

Files are read in cells, rectangles along the file's own blocks, and tiles are copied out of them. A cell is kept
until the last tile that needs it has been cut, so the overlap of tiles costs copying but no second
reading. (Panels share the blocks at their seam; these are read twice.) GDAL's own cache cannot promise
this: where a row of tiles is larger than the cache, every tile of a file in strips decodes all of its strips again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.raster.grid import Span
from cdkd_edge.raster.read import INVALID_FILL, SceneReader, reflected
from cdkd_edge.segment.plan import Place, Plan

CELL_ROWS, CELL_COLUMNS = 256, 2048
_CELL_PIXELS = CELL_ROWS * CELL_COLUMNS


@dataclass(frozen=True)
class CellLayout:
    """How a scene divides into cells."""

    height: int
    width: int
    rows: int
    """Rows of a cell, px."""
    columns: int | None
    """Columns of a cell, px; None: as wide as the panel, because the file's blocks are as wide."""

    @classmethod
    def of(cls, reader: SceneReader) -> CellLayout:
        """Cells along the blocks of an open scene."""
        block_rows, block_columns = reader.block_shape
        if block_columns > CELL_COLUMNS and block_columns >= reader.width:
            rows = max(1, _CELL_PIXELS // reader.width)
            return cls(reader.height, reader.width, _multiple(block_rows, rows), None)
        columns = _multiple(block_columns, CELL_COLUMNS)
        return cls(reader.height, reader.width, _multiple(block_rows, CELL_ROWS), columns)


def _multiple(block: int, wanted: int) -> int:
    """The largest multiple of a block's side within ``wanted``; ``wanted`` itself where blocks are too large for it."""
    return block * (wanted // block) if block <= wanted else wanted if block > 4 * wanted else block


@dataclass
class Cell:
    """A rectangle of the scene, and how many tiles still need it."""

    top: int
    left: int
    height: int
    width: int
    uses: int
    pixels: npt.NDArray[np.uint8] | None = None
    """``[3, h, w]`` once it is read."""
    valid: npt.NDArray[np.bool_] | None = None
    """``[h, w]``, or None where every pixel is valid."""
    read: bool = False

    def load(self, reader: SceneReader) -> None:
        """Read it. (``read`` is set by the caller, under its lock.)"""
        self.pixels, self.valid = reader.read_window(self.top, self.left, self.height, self.width)


class Cells:
    """The cells of a plan that are in use. Not thread-safe; its methods are called under the caller's lock."""

    def __init__(self, layout: CellLayout, plan: Plan, start: int = 0) -> None:
        self.layout = layout
        self._plan = plan
        self._start = start
        self._cells: dict[tuple[int, int, int], Cell] = {}

    def of(self, place: Place) -> tuple[list[Cell], list[Cell]]:
        """The cells under a tile: all of them, and those that nobody asked for before."""
        cells, new = [], []
        rows = _inside(place.row, self._plan.tile, self.layout.height)
        columns = _inside(place.column, self._plan.tile, self.layout.width)
        for key, top, bottom, left, right in self._divided(place.panel, rows, columns):
            cell = self._cells.get(key)
            if cell is None:
                uses = self._uses(place.panel, range(top, bottom), range(left, right))
                cell = self._cells[key] = Cell(top, left, bottom - top, right - left, uses)
                new.append(cell)
            cells.append(cell)
        return cells, new

    def release(self, cells: list[Cell]) -> None:
        """A tile that needed these cells has been cut."""
        for cell in cells:
            cell.uses -= 1
            if cell.uses == 0:
                cell.pixels = cell.valid = None
        if any(cell.uses == 0 for cell in cells):
            self._cells = {key: cell for key, cell in self._cells.items() if cell.uses}

    def _divided(
        self, panel: int, rows: range, columns: range
    ) -> Iterator[tuple[tuple[int, int, int], int, int, int, int]]:
        extent = self._extent(panel)
        height, width = self.layout.rows, self.layout.columns
        for i in range(rows.start // height, (rows.stop - 1) // height + 1):
            top, bottom = i * height, min((i + 1) * height, self.layout.height)
            if width is None:
                yield (panel, i, 0), top, bottom, extent.start, extent.stop
                continue
            for j in range(columns.start // width, (columns.stop - 1) // width + 1):
                left, right = max(j * width, extent.start), min((j + 1) * width, extent.stop)
                yield (panel, i, j), top, bottom, left, right

    def _extent(self, panel: int) -> range:
        """The columns of pixels under a panel."""
        columns = self._plan.columns(panel)
        first = _inside(columns[0], self._plan.tile, self.layout.width)
        last = _inside(columns[-1], self._plan.tile, self.layout.width)
        return range(first.start, last.stop)

    def _uses(self, panel: int, rows: range, columns: range) -> int:
        tile, layout = self._plan.tile, self.layout
        under = [c for c in self._plan.columns(panel) if _meet(_inside(c, tile, layout.width), columns)]
        count = 0
        for band in self._plan.rows(panel, self._start):
            row = self._plan.grid.rows[band]
            if _meet(_inside(row, tile, layout.height), rows):
                count += sum(self._plan.wanted(row, column) for column in under)
        return count


def cut_tile(
    place: Place, cells: list[Cell], layout: CellLayout, out: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_] | None:
    """Copy a tile out of its cells; what is beyond the scene is reflected.

    Args:
        place: the tile.
        cells: all that lie under it, read.
        layout: of the cells.
        out: uint8 ``[3, T, T]``, written in place.

    Returns:
        Validity ``[T, T]``, or None where every pixel is valid.
    """
    tile = out.shape[1]
    rows, columns = _inside(place.row, tile, layout.height), _inside(place.column, tile, layout.width)
    # Pixels go straight to their place; `down` and `across` say where the scene begins in the tile.
    down, across = rows.start - place.row.start, columns.start - place.column.start
    valid = np.ones((tile, tile), bool) if any(cell.valid is not None for cell in cells) else None
    for cell in cells:
        if cell.pixels is None:
            raise AssertionError("a tile was cut from a cell that is not there")
        top, bottom = max(cell.top, rows.start), min(cell.top + cell.height, rows.stop)
        left, right = max(cell.left, columns.start), min(cell.left + cell.width, columns.stop)
        here = np.s_[
            ...,
            top - rows.start + down : bottom - rows.start + down,
            left - columns.start + across : right - columns.start + across,
        ]
        there = np.s_[..., top - cell.top : bottom - cell.top, left - cell.left : right - cell.left]
        out[here] = cell.pixels[there]
        if valid is not None and cell.valid is not None:
            valid[here] = cell.valid[there]
    y = reflected(place.row.start, tile, layout.height) - place.row.start
    x = reflected(place.column.start, tile, layout.width) - place.column.start
    for array in (out,) if valid is None else (out, valid):
        _reflect(array, y, x, down, across, len(rows), len(columns))
    return None if valid is None or valid.all() else valid


def _reflect(
    array: npt.NDArray[Any],
    y: npt.NDArray[np.intp],
    x: npt.NDArray[np.intp],
    down: int,
    across: int,
    height: int,
    width: int,
) -> None:
    """Fill the margins of a tile, ``[..., T, T]``: first beside the scene, then above and below it."""
    for margin in (slice(0, across), slice(across + width, None)):
        array[..., down : down + height, margin] = array[..., down : down + height, x[margin]]
    for margin in (slice(0, down), slice(down + height, None)):
        array[..., margin, :] = array[..., y[margin], :]


def fill_without_data(out: npt.NDArray[np.uint8]) -> None:
    """What a tile shows that is not computed: nothing that was there before."""
    out[:] = INVALID_FILL


def _inside(span: Span, tile: int, size: int) -> range:
    """The part of a tile that lies on the scene."""
    return range(max(span.start, 0), min(span.start + tile, size))


def _meet(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop
