"""Traces the regions of a label map as polygons, tile by tile, in memory that does not grow with the map.

A region is a set of pixels of one label, connected by their edges. GDAL's polygonizer traces one tile at a time. Pieces
of one region on both sides of a tile border are found by their labels along the border, and joined when the region
is complete. All coordinates are integers (pixel corners, x to the right, y down), so that joining is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.features import shapes
from rasterio.windows import Window

from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.machine import hand_memory_back
from cdkd_edge.segmentation.outlines import Bools, Ints, Outlines, Piece, TilePieces, root_of, unite

TILE = 1024  # side of a tile, px: a multiple of the label map's blocks
MAX_VERTICES = 200_000  # a region with more vertices comes in parts: joining its pieces takes about 90 bytes per vertex
# Pixel edges between labels in one tile. Simplified, each takes up to 1.5 kB; tiles with more are made smaller.
MAX_BORDERS = 100_000
_SMALLEST_TILE = 64
_ROW_PIXELS = 1 << 25  # pixels in a row of tiles: all pieces that touch the row's borders are in memory
_NONE = -1


@dataclass
class RegionBatch:
    """Some finished regions."""

    outlines: Outlines  # their polygons ``[N]`` in pixel corners
    labels: npt.NDArray[np.uint8]
    parts: Bools  # whether each polygon is only a part of its region (:data:`MAX_VERTICES`)


@dataclass(slots=True)
class _OpenRegion:
    """A region whose pieces are not joined yet, or that reaches into tiles not seen yet."""

    label: int
    pieces: list[Piece] = field(default_factory=list)
    vertices: int = 0
    in_parts: bool = False  # some of it has been handed out


def trace_regions(
    dataset: Any, *, simplify: float = 0.0, tile: int = TILE, max_vertices: int = MAX_VERTICES
) -> Iterator[RegionBatch]:
    """Yield the regions of an open label map in batches; pixels without label belong to none.

    Args:
        dataset: a uint8 raster with one band; 255 is no label.
        simplify: tolerance in px; 0 keeps outlines along pixel edges. Each border is simplified once for both its
            sides, so that neighbours stay neighbours (Visvalingam-Whyatt: a bend goes if its triangle is smaller than
            the tolerance squared). Points on tile borders and on the map's border stay.
        tile: side of the tiles, px; smaller ones are taken where labels look like noise.
        max_vertices: see :data:`MAX_VERTICES`.
    """
    joiner = _Joiner(dataset.width, max_vertices)
    for strip in range(0, dataset.height, tile):
        end = min(strip + tile, dataset.height)
        side = _tile_side(dataset, strip, end, tile)
        for top in range(strip, end, side):
            height = min(side, end - top)
            joiner.start_row(top, height)
            for left in range(0, dataset.width, side):
                width = min(side, dataset.width - left)
                labels = dataset.read(1, window=Window(left, top, width, height))
                outlines, values = _polygonized(labels, left, top, unlabelled=simplify > 0)
                if simplify > 0:
                    outlines = _simplified(outlines, simplify)
                neighbours = (top > 0, left > 0, top + height < dataset.height, left + width < dataset.width)
                yield from joiner.add(outlines, values, left, width, neighbours)
            yield from joiner.finish_row(last=top + height == dataset.height)
            hand_memory_back()


def _tile_side(dataset: Any, start: int, end: int, tile: int) -> int:
    """Side of the tiles in some rows: smaller on wide maps and in noise, since memory grows with both."""
    densest = 0
    for left in range(0, dataset.width, tile):
        labels = dataset.read(1, window=Window(left, start, min(tile, dataset.width - left), end - start))
        densest = max(densest, int((labels[1:] != labels[:-1]).sum() + (labels[:, 1:] != labels[:, :-1]).sum()))
    side = tile
    while (side * dataset.width > _ROW_PIXELS or densest > MAX_BORDERS) and side > _SMALLEST_TILE:
        side, densest = side // 2, densest // 4
    return side


def _polygonized(
    labels: npt.NDArray[np.uint8], left: int, top: int, *, unlabelled: bool
) -> tuple[Outlines, npt.NDArray[np.uint8]]:
    """Trace the regions of one tile; ``unlabelled``: also those without label, as neighbours of the others."""
    mask = None if unlabelled else labels != NO_LABEL
    rings: list[list[tuple[float, float]]] = []
    counts, values = [], []
    for shape, value in shapes(labels, mask=mask, connectivity=4):
        rings += shape["coordinates"]
        counts.append(len(shape["coordinates"]))
        values.append(int(value))
    sizes = np.array([len(ring) for ring in rings], np.int64)
    numbers = chain.from_iterable(chain.from_iterable(rings))
    points = np.fromiter(numbers, np.float64, 2 * int(sizes.sum())).reshape(-1, 2) + np.array([left, top])
    ends = np.cumsum(np.array(counts, np.int64))
    return Outlines(points, np.append(0, np.cumsum(sizes)), np.append(0, ends)), np.array(values, np.uint8)


def _simplified(outlines: Outlines, tolerance: float) -> Outlines:
    import shapely

    # GDAL leaves out vertices on straight edges even where another border meets them; simplifying needs those.
    dense = shapely.segmentize(outlines.to_shapely(), 1.0)
    dense = shapely.set_coordinates(dense, np.rint(shapely.get_coordinates(dense)))
    return Outlines.from_shapely(shapely.coverage_simplify(dense, tolerance, simplify_boundary=False))


class _Joiner:
    """Joins the pieces of regions across tile borders (union-find over pieces)."""

    def __init__(self, width: int, max_vertices: int) -> None:
        self._max_vertices = max_vertices
        self._parents: dict[int, int] = {}
        self._open: dict[int, _OpenRegion] = {}
        self._large: set[int] = set()
        self._next_id = 0
        # The piece at each pixel of the border above the row, below it, and on the left of the next tile.
        self._above = np.full(width, _NONE, np.int64)
        self._below = np.full(width, _NONE, np.int64)
        self._beside = np.empty(0, np.int64)
        self._top = self._height = 0

    def start_row(self, top: int, height: int) -> None:
        self._top, self._height = top, height
        self._beside = np.full(height, _NONE, np.int64)

    def add(
        self,
        outlines: Outlines,
        labels: npt.NDArray[np.uint8],
        left: int,
        width: int,
        neighbours: tuple[bool, bool, bool, bool],
    ) -> Iterator[RegionBatch]:
        """Take a tile's polygons; ``neighbours``: whether there is a tile above, left, below, right."""
        top, height = self._top, self._height
        lines = ((1, top), (0, left), (1, top + height), (0, left + width))
        tile = TilePieces(outlines, [line for line, there in zip(lines, neighbours, strict=True) if there])
        labelled = labels != NO_LABEL
        touching = tile.touching & labelled
        ids = np.full(len(labels) + 1, _NONE, np.int64)  # the last entry stands for "no polygon"
        vertices = np.diff(outlines.rings[outlines.polygons])
        for index in np.flatnonzero(touching).tolist():
            ids[index] = self._open_region(tile.piece(index), int(labels[index]), int(vertices[index]))
        above, beside, below, right = (
            ids[tile.along(line, *((left, width) if line[0] else (top, height)))] if there else None
            for line, there in zip(lines, neighbours, strict=True)
        )
        if above is not None:
            self._join(self._above[left : left + width], above)
        if beside is not None:
            self._join(self._beside, beside)
        if below is not None:
            self._below[left : left + width] = below
        if right is not None:
            self._beside = right
        inside = ~touching & labelled
        if inside.any():
            yield RegionBatch(outlines.select(inside), labels[inside], np.zeros(int(inside.sum()), bool))
        if self._large:  # one row of a wide map may hold millions of vertices
            yield self._united([self._open[root] for root in sorted(self._large)], complete=False)
            self._large.clear()

    def finish_row(self, *, last: bool) -> Iterator[RegionBatch]:
        """Hand out the regions that no later tile can touch."""
        below = [] if last else np.unique(self._below[self._below != _NONE]).tolist()
        waiting = {root_of(self._parents, piece) for piece in below}
        done = {root: region for root, region in self._open.items() if root not in waiting}
        for root in done:
            del self._open[root]
        self._above, self._below = self._below, np.full_like(self._below, _NONE)
        # Only pieces on the border are looked up again; forget the others.
        self._parents = {piece: root_of(self._parents, piece) for piece in below} | {root: root for root in self._open}
        batch: list[_OpenRegion] = []  # small, because whoever takes it copies it into other forms
        vertices = 0
        for region in done.values():
            batch.append(region)
            vertices += region.vertices
            if vertices > self._max_vertices // 4:
                yield self._united(batch, complete=True)
                batch, vertices = [], 0
        if any(region.pieces for region in batch):
            yield self._united(batch, complete=True)

    def _united(self, regions: list[_OpenRegion], *, complete: bool) -> RegionBatch:
        """Join the pieces that the regions have; if they are not complete, more pieces will follow."""
        pieces: list[Piece] = []
        owners: list[int] = []
        for index, region in enumerate(regions):
            region.in_parts |= not complete
            pieces += region.pieces
            owners += [index] * len(region.pieces)
            region.pieces, region.vertices = [], 0
        outlines, owner = unite(pieces, np.array(owners))
        labels = np.array([region.label for region in regions], np.uint8)
        return RegionBatch(outlines, labels[owner], np.array([region.in_parts for region in regions])[owner])

    def _open_region(self, piece: Piece, label: int, vertices: int) -> int:
        new, self._next_id = self._next_id, self._next_id + 1
        self._parents[new] = new
        self._open[new] = _OpenRegion(label, [piece], vertices)
        if vertices > self._max_vertices:
            self._large.add(new)
        return new

    def _join(self, one: Ints, other: Ints) -> None:
        """Merge the regions of pieces that face each other across a border and have the same label."""
        both = (one != _NONE) & (other != _NONE)
        for first, second in np.unique(np.stack([one[both], other[both]]), axis=1).T.tolist():
            a, b = sorted((root_of(self._parents, first), root_of(self._parents, second)))
            if a == b or self._open[a].label != self._open[b].label:
                continue
            self._parents[b] = a
            merged, kept = self._open.pop(b), self._open[a]
            kept.pieces += merged.pieces
            kept.vertices += merged.vertices
            kept.in_parts |= merged.in_parts
            self._large.discard(b)
            if kept.vertices > self._max_vertices:
                self._large.add(a)
