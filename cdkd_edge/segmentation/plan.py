"""The order in which the tiles of a scene are computed, and the cells in which its file is read for them.

Panels: a row of 1024 px tiles over 100,000 px is 300 MB of pixels. Wide scenes are therefore cut into panels, groups of
neighbouring columns of tiles, and each panel is computed from top to bottom like a scene of its own, so that memory
holds one row of tiles of one panel. Scenes up to some 20,000 px wide are a single panel.

Cells: the file is read in rectangles along its own blocks, and tiles are copied out of these. A cell is kept until the
last tile that needs it has been cut, so each block is decoded once, and overlapping tiles cost copying only. (Panels
share the blocks at their seam; these are read twice.) GDAL's own cache cannot promise this: where a row of tiles is
larger than the cache, every tile of a file in strips decodes all of its strips again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.raster.grid import Span, TileGrid
from cdkd_edge.raster.read import SceneReader, reflected

CELL_ROWS, CELL_COLUMNS = 256, 2048
_CELL_PIXELS = CELL_ROWS * CELL_COLUMNS
PANEL_BYTES = 96 << 20  # bound of the pixels of one row of tiles of a panel, bytes


@dataclass(frozen=True)
class PlannedTile:
    """One tile of the plan."""

    row: Span
    column: Span
    panel: int
    band: int  # index of the row of tiles
    emits: bool  # whether its kept part is written; otherwise it is computed only because it adds to its neighbours
    ends_band: bool  # whether it is the last tile of a row of tiles of its panel
    wanted: bool  # whether any of its kept pixels lies in the area of interest


@dataclass(frozen=True)
class Panel:
    """Columns ``first .. last - 1`` of tiles; ``helpers`` more to their left are computed for what they add to them."""

    first: int
    last: int
    helpers: int


@dataclass(frozen=True)
class TilePlan:
    """All tiles of a scene in the order of computation."""

    grid: TileGrid
    tile: int
    panels: tuple[Panel, ...]
    blends: bool  # whether a tile also adds to pixels that other tiles keep, as in the Hann merge
    wanted: Callable[[Span, Span], bool] = lambda row, column: True  # whether a tile is to be computed

    @classmethod
    def over(
        cls,
        grid: TileGrid,
        tile: int,
        *,
        slack_rows: int = 0,
        blends: bool = False,
        panel_bytes: int | None = PANEL_BYTES,
        pixel_bytes: int = 3,
        wanted: Callable[[Span, Span], bool] = lambda row, column: True,
    ) -> TilePlan:
        """Plan tiles of side ``tile``, px; ``pixel_bytes`` is the memory of a pixel with its validity.

        The pixels held at a time are bounded by ``panel_bytes`` (None: a single panel, so that labels come row by row);
        these are a row of tiles and ``slack_rows`` rows more, because files are read in blocks.
        """
        columns = grid.columns
        count = 1
        if panel_bytes is not None:
            width = columns[-1].start + tile - columns[0].start
            most = max(tile, panel_bytes // (pixel_bytes * (tile + slack_rows)))
            count = min(len(columns), -(-width // most))
        cuts = [round(index * len(columns) / count) for index in range(count + 1)]
        panels = []
        for first, last in pairwise(cuts):
            helpers = 0
            while blends and helpers < first and columns[first - helpers - 1].start + tile > columns[first].start:
                helpers += 1
            panels.append(Panel(first, last, helpers))
        return cls(grid, tile, tuple(panels), blends, wanted)

    @property
    def bands(self) -> int:
        """Rows of tiles, counted in each panel."""
        return len(self.grid.rows) * len(self.panels)

    def tiles_in(self, bands: int) -> int:
        """Tiles that the first ``bands`` rows of tiles keep."""
        whole, rest = divmod(bands, len(self.grid.rows))
        counts = [panel.last - panel.first for panel in self.panels]
        return sum(counts[:whole]) * len(self.grid.rows) + (counts[whole] * rest if rest else 0)

    def rows_done(self, bands: int) -> int:
        """Rows of pixels from the top that are whole when ``bands`` rows of tiles are done; 0 before the last panel."""
        done = bands - (len(self.panels) - 1) * len(self.grid.rows)
        return self.grid.rows[done - 1].last if done > 0 else 0

    def columns(self, panel: int) -> tuple[Span, ...]:
        """Columns of tiles that are computed for a panel."""
        extent = self.panels[panel]
        return self.grid.columns[extent.first - extent.helpers : extent.last]

    def rows(self, panel: int, start: int = 0) -> range:
        """Rows of tiles that are computed for a panel when the first ``start`` bands of the plan are done."""
        done = min(max(start - panel * len(self.grid.rows), 0), len(self.grid.rows))
        first = done
        if self.blends and 0 < done < len(self.grid.rows):
            above = self.grid.rows[done].start
            while first and self.grid.rows[first - 1].start + self.tile > above:
                first -= 1
        return range(first, len(self.grid.rows))

    def places(self, start: int = 0) -> Iterator[PlannedTile]:
        """The tiles that are left when ``start`` bands are done."""
        for index, panel in enumerate(self.panels):
            done = start - index * len(self.grid.rows)
            if done >= len(self.grid.rows):
                continue
            for band in self.rows(index, start):
                row = self.grid.rows[band]
                for number in range(panel.first - panel.helpers, panel.last):
                    column = self.grid.columns[number]
                    yield PlannedTile(
                        row,
                        column,
                        index,
                        band,
                        emits=band >= done and number >= panel.first,
                        ends_band=band >= done and number == panel.last - 1,
                        wanted=self.wanted(row, column),
                    )


@dataclass(frozen=True)
class CellLayout:
    """How a scene divides into cells."""

    height: int
    width: int
    rows: int  # rows of a cell, px
    columns: int | None  # columns of a cell, px; None: as wide as the panel, because the file's blocks are as wide

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
    """The largest multiple of a block's side within ``wanted``; for far larger blocks, ``wanted`` itself."""
    return block * (wanted // block) if block <= wanted else wanted if block > 4 * wanted else block


@dataclass
class Cell:
    """A rectangle of the scene."""

    top: int
    left: int
    height: int
    width: int
    uses: int  # tiles that still need it
    pixels: npt.NDArray[np.uint8] | None = None  # ``[3, h, w]`` once it is read
    valid: npt.NDArray[np.bool_] | None = None  # ``[h, w]``, or None where every pixel is valid
    read: bool = False

    def load(self, reader: SceneReader) -> None:
        """Read its pixels. The caller sets ``read``, under its lock."""
        self.pixels, self.valid = reader.read_window(self.top, self.left, self.height, self.width)


class Cells:
    """The cells of a plan that are in use. Not thread-safe: call its methods under a lock."""

    def __init__(self, layout: CellLayout, plan: TilePlan, start: int = 0) -> None:
        self.layout = layout
        self._plan = plan
        self._start = start
        self._cells: dict[tuple[int, int, int], Cell] = {}

    def of(self, place: PlannedTile) -> tuple[list[Cell], list[Cell]]:
        """The cells under a tile: all of them, and those among them that are new."""
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
        """Give back the cells of a tile that has been cut."""
        for cell in cells:
            cell.uses -= 1
            if cell.uses == 0:
                cell.pixels = cell.valid = None
        if any(cell.uses == 0 for cell in cells):
            self._cells = {key: cell for key, cell in self._cells.items() if cell.uses}

    def _divided(
        self, panel: int, rows: range, columns: range
    ) -> Iterator[tuple[tuple[int, int, int], int, int, int, int]]:
        """Key, top, bottom, left and right of the cells under a rectangle."""
        extent = self._extent(panel)
        height, width = self.layout.rows, self.layout.columns or self.layout.width
        for i in range(rows.start // height, (rows.stop - 1) // height + 1):
            top, bottom = i * height, min((i + 1) * height, self.layout.height)
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
    place: PlannedTile, cells: list[Cell], layout: CellLayout, out: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_] | None:
    """Copy a tile out of its cells, all of them read, and reflect the scene beyond its borders.

    Writes ``out``, uint8 ``[3, T, T]``, in place. Returns validity ``[T, T]``, or None where every pixel is valid.
    """
    tile, row, column = out.shape[1], place.row.start, place.column.start
    rows, columns = _inside(place.row, tile, layout.height), _inside(place.column, tile, layout.width)
    valid = np.ones((tile, tile), bool) if any(cell.valid is not None for cell in cells) else None
    for cell in cells:
        if cell.pixels is None:
            raise AssertionError("a tile was cut from a cell that was not read")
        top, bottom = max(cell.top, rows.start), min(cell.top + cell.height, rows.stop)
        left, right = max(cell.left, columns.start), min(cell.left + cell.width, columns.stop)
        here = np.s_[..., top - row : bottom - row, left - column : right - column]
        there = np.s_[..., top - cell.top : bottom - cell.top, left - cell.left : right - cell.left]
        out[here] = cell.pixels[there]
        if valid is not None and cell.valid is not None:
            valid[here] = cell.valid[there]
    y, x = reflected(row, tile, layout.height) - row, reflected(column, tile, layout.width) - column
    scene = slice(rows.start - row, rows.stop - row)  # of the tile's rows, those that lie on the scene
    arrays: tuple[npt.NDArray[Any], ...] = (out,) if valid is None else (out, valid)
    for array in arrays:  # only margins are copied: beside the scene, then above and below it
        for margin in (slice(0, columns.start - column), slice(columns.stop - column, None)):
            array[..., scene, margin] = array[..., scene, x[margin]]
        for margin in (slice(0, scene.start), slice(scene.stop, None)):
            array[..., margin, :] = array[..., y[margin], :]
    return None if valid is None or valid.all() else valid


def _inside(span: Span, tile: int, size: int) -> range:
    """The part of a tile that lies on the scene."""
    return range(max(span.start, 0), min(span.start + tile, size))


def _meet(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop
