"""In which order the tiles of a scene are computed: panels of columns, each from top to bottom.

A row of 1024 px tiles over 100,000 px is 300 MB of pixels. Wide scenes are therefore cut into panels, groups of
neighbouring columns of tiles, and each panel is worked through like a scene of its own; what is in memory is
one row of tiles of one panel. Scenes up to some 20,000 px wide are a single panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from cdkd_edge.raster.grid import Span, TileGrid

PANEL_BYTES = 96 << 20
"""What the pixels of one row of tiles of a panel may take."""


@dataclass(frozen=True)
class Place:
    """One tile of the plan."""

    row: Span
    column: Span
    panel: int
    band: int
    """Index of the row of tiles."""
    emits: bool
    """Whether its kept part is written; else it is computed only for what it adds to its neighbours (Hann merge)."""
    ends_band: bool
    """Whether it is the last tile of a row of tiles of its panel."""
    wanted: bool
    """Whether any of its kept pixels lies in the area of interest."""


@dataclass(frozen=True)
class Panel:
    """Columns ``first .. last - 1`` of tiles, after ``helpers`` more that are computed for their neighbours' sake."""

    first: int
    last: int
    helpers: int


@dataclass(frozen=True)
class Plan:
    """All tiles of a scene in the order of computation."""

    grid: TileGrid
    tile: int
    panels: tuple[Panel, ...]
    blends: bool
    """Whether a tile also adds to pixels that other tiles keep (Hann merge), not only to its own."""
    wanted: Callable[[Span, Span], bool] = lambda row, column: True

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
    ) -> Plan:
        """Plan a grid.

        Args:
            grid: the tiles.
            tile: their side, px.
            slack_rows: rows of pixels held beyond a row of tiles, because files are read in blocks.
            blends: see :attr:`blends`.
            panel_bytes: bound of the pixels held at a time; None: a single panel, so that labels come row by row.
            pixel_bytes: of a pixel that is held, with its validity.
            wanted: whether a tile is to be computed.
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

    def places(self, start: int = 0) -> Iterator[Place]:
        """The tiles that are left when ``start`` bands are done."""
        for index, panel in enumerate(self.panels):
            done = start - index * len(self.grid.rows)
            if done >= len(self.grid.rows):
                continue
            for band in self.rows(index, start):
                row = self.grid.rows[band]
                for number in range(panel.first - panel.helpers, panel.last):
                    column = self.grid.columns[number]
                    yield Place(
                        row,
                        column,
                        index,
                        band,
                        emits=band >= done and number >= panel.first,
                        ends_band=band >= done and number == panel.last - 1,
                        wanted=self.wanted(row, column),
                    )
