"""Regions of a label map as polygons, tile by tile, so that a map of any size takes a bounded amount of memory.

A region is a set of pixels of one label connected by their edges. GDAL's polygonizer takes a tile at a time; pieces of
one region on both sides of a tile's border are found by the labels along it and united when the region is
complete. Coordinates are integers throughout (pixel corners: x to the right, y down), so unions are exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.features import shapes
from rasterio.windows import Window

from cdkd_edge.core.errors import MissingExtraError
from cdkd_edge.core.labels import NO_LABEL
from cdkd_edge.core.machine import hand_memory_back
from cdkd_edge.segment.products.outlines import Outlines
from cdkd_edge.segment.products.stitching import CutTile, Piece, united

TILE = 1024
"""Side of a tile, px: a multiple of the label map's blocks."""

MAX_VERTICES = 200_000
"""A region with more vertices than this is handed out in parts: uniting its pieces takes some 90 bytes for each."""

MAX_BORDERS = 100_000
"""Pixel edges between labels in one tile; simplified, they take up to 1.5 kB each. Tiles with more are cut smaller."""

_SMALLEST_TILE = 64

_ROW_PIXELS = 1 << 25
"""Of a row of tiles: all pieces that touch their borders are held."""

_NONE = -1


@dataclass
class Regions:
    """Some finished regions."""

    outlines: Outlines
    """Their polygons ``[N]`` in pixel corners."""
    labels: npt.NDArray[np.uint8]
    parts: npt.NDArray[np.bool_]
    """Whether it is only a part of its region (:data:`MAX_VERTICES`)."""

    @property
    def polygons(self) -> npt.NDArray[np.object_]:
        """The outlines as Shapely polygons."""
        return self.outlines.to_shapely(shapely_module())


@dataclass(slots=True)
class _Open:
    """A region that reaches tiles not seen yet, or has not been united."""

    label: int
    pieces: list[Piece] = field(default_factory=list)
    vertices: int = 0
    cut: bool = False


def shapely_module() -> Any:
    """Shapely, which is an optional package.

    Raises:
        MissingExtraError: it is not installed, or too old.
    """
    try:
        import shapely
    except ImportError:
        raise MissingExtraError("shapely", "vector", "drawing polygons of a label map") from None
    if not hasattr(shapely, "coverage_simplify"):
        raise MissingExtraError("shapely 2.1 or newer", "vector", "drawing polygons of a label map")
    return shapely


def regions(
    dataset: Any,
    *,
    simplify: float = 0.0,
    tile: int = TILE,
    max_vertices: int = MAX_VERTICES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Regions]:
    """The regions of an open label map that have a label, in portions.

    Args:
        dataset: a uint8 raster of one band; 255 has no region.
        simplify: tolerance in px, or 0 for outlines along the pixels' edges. Borders are simplified once for both their
            sides (Visvalingam-Whyatt on the coverage: a bend goes if its triangle is smaller than the
            tolerance squared), so that neighbours stay neighbours. Where a border crosses a tile's border, and at the
            map's, it stays as it is.
        tile: side of the tiles, px; where labels are like noise, smaller ones are taken.
        max_vertices: see :data:`MAX_VERTICES`.
        progress: called with tiles done and tiles in all.

    Raises:
        MissingExtraError: Shapely is not installed.
    """
    shapely = shapely_module()
    merger = _Merger(dataset.width, max_vertices)
    tiles = -(-dataset.height // tile) * -(-dataset.width // tile)
    done = 0
    for strip in range(0, dataset.height, tile):
        end = min(strip + tile, dataset.height)
        side = _side(dataset, strip, end, tile)
        for top in range(strip, end, side):
            height = min(side, end - top)
            merger.start_row(top, height)
            for left in range(0, dataset.width, side):
                width = min(side, dataset.width - left)
                labels = dataset.read(1, window=Window(left, top, width, height))
                outlines, values = _polygonized(labels, left, top, everything=simplify > 0)
                if simplify > 0:
                    outlines = _simplified(shapely, outlines, simplify)
                inner = (top > 0, left > 0, top + height < dataset.height, left + width < dataset.width)
                yield from merger.add(outlines, values, left, width, inner)
                done += height * width
                progress(tiles * done // (dataset.height * dataset.width), tiles)
            yield from merger.finish_row(last=top + height == dataset.height)
            hand_memory_back()


def _side(dataset: Any, start: int, end: int, tile: int) -> int:
    """Side of the tiles of some rows: smaller on wide maps and where labels are like noise; memory grows with both."""
    densest = 0
    for left in range(0, dataset.width, tile):
        labels = dataset.read(1, window=Window(left, start, min(tile, dataset.width - left), end - start))
        densest = max(densest, int((labels[1:] != labels[:-1]).sum() + (labels[:, 1:] != labels[:, :-1]).sum()))
    side = tile
    while side * dataset.width > _ROW_PIXELS and side > _SMALLEST_TILE:
        side, densest = side // 2, densest // 4
    while densest > MAX_BORDERS and side > _SMALLEST_TILE:
        side, densest = side // 2, densest // 4
    return side


def _polygonized(
    labels: npt.NDArray[np.uint8], left: int, top: int, *, everything: bool
) -> tuple[Outlines, npt.NDArray[np.uint8]]:
    """Regions of one tile; with ``everything`` also those without a label, as neighbours of the others."""
    mask = None if everything else labels != NO_LABEL
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


def _simplified(shapely: Any, outlines: Outlines, tolerance: float) -> Outlines:
    # GDAL leaves out vertices on straight edges, also where another border meets them; a coverage needs those.
    dense = shapely.segmentize(outlines.to_shapely(shapely), 1.0)
    dense = shapely.set_coordinates(dense, np.rint(shapely.get_coordinates(dense)))
    return Outlines.of(shapely, shapely.coverage_simplify(dense, tolerance, simplify_boundary=False))


class _Merger:
    """Puts the pieces of a region together across the borders of tiles (union-find over pieces)."""

    def __init__(self, width: int, max_vertices: int) -> None:
        self._max_vertices = max_vertices
        self._parent: dict[int, int] = {}
        self._open: dict[int, _Open] = {}
        self._large: set[int] = set()
        self._next = 0
        # Piece at each pixel of the border above, of that below, and of the one to the left.
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
        inner: tuple[bool, bool, bool, bool],
    ) -> Iterator[Regions]:
        """A tile's polygons; ``inner`` says on which sides (top, left, bottom, right) there is another tile."""
        top, height = self._top, self._height
        lines = ((1, top), (0, left), (1, top + height), (0, left + width))
        tile = CutTile(outlines, [line for line, there in zip(lines, inner, strict=True) if there])
        labelled = labels != NO_LABEL
        touching = tile.touching & labelled
        names = np.full(len(labels) + 1, _NONE, np.int64)  # the last stands for "none"
        for index in np.flatnonzero(touching).tolist():
            names[index] = self._new(tile.piece(index), int(labels[index]), int(outlines.vertices[index]))
        above, beside, below, right = (
            names[tile.along(line, *((left, width) if line[0] else (top, height)))] if there else None
            for line, there in zip(lines, inner, strict=True)
        )
        if above is not None:
            self._join(self._above[left : left + width], above)
        if beside is not None:
            self._join(self._beside, beside)
        if below is not None:
            self._below[left : left + width] = below
        if right is not None:
            self._beside = right
        alone = ~touching & labelled
        if alone.any():
            yield Regions(outlines.only(alone), labels[alone], np.zeros(int(alone.sum()), bool))
        if self._large:  # on a wide map one row of tiles may hold millions
            yield self._united([self._open[name] for name in sorted(self._large)], whole=False)
            self._large.clear()

    def finish_row(self, *, last: bool) -> Iterator[Regions]:
        """Hand out what no later tile can add to."""
        held = set() if last else {self._root(int(piece)) for piece in np.unique(self._below) if piece != _NONE}
        done = {root: region for root, region in self._open.items() if root not in held}
        for root in done:
            del self._open[root]
        self._above, self._below = self._below, np.full_like(self._below, _NONE)
        # Only the border's pieces are asked for again; the rest of the forest can go.
        self._parent = {int(p): self._root(int(p)) for p in np.unique(self._above) if p != _NONE}
        self._parent.update({root: root for root in self._open})
        portion: list[_Open] = []  # whoever takes them holds all of it in other forms, too
        vertices = 0
        for region in done.values():
            portion.append(region)
            vertices += region.vertices
            if vertices > self._max_vertices // 4:
                yield self._united(portion, whole=True)
                portion, vertices = [], 0
        if any(region.pieces for region in portion):
            yield self._united(portion, whole=True)

    def _united(self, regions: list[_Open], *, whole: bool) -> Regions:
        """Unite the pieces of regions; of those that are not whole, more will come."""
        pieces: list[Piece] = []
        owners: list[int] = []
        for index, region in enumerate(regions):
            region.cut |= not whole
            pieces += region.pieces
            owners += [index] * len(region.pieces)
            region.pieces, region.vertices = [], 0
        outlines, owner = united(pieces, np.array(owners))
        labels = np.array([region.label for region in regions], np.uint8)
        return Regions(outlines, labels[owner], np.array([region.cut for region in regions])[owner])

    def _new(self, piece: Piece, label: int, vertices: int) -> int:
        name, self._next = self._next, self._next + 1
        self._parent[name] = name
        self._open[name] = _Open(label, [piece], vertices)
        if vertices > self._max_vertices:
            self._large.add(name)
        return name

    def _join(self, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> None:
        both = (one != _NONE) & (other != _NONE)
        pairs: dict[int, set[int]] = defaultdict(set)
        for first, second in np.unique(np.stack([one[both], other[both]]), axis=1).T.tolist():
            pairs[first].add(second)
        for first, seconds in pairs.items():
            for second in sorted(seconds):
                a, b = sorted((self._root(first), self._root(second)))
                if a == b or self._open[a].label != self._open[b].label:
                    continue
                self._parent[b] = a
                gone, kept = self._open.pop(b), self._open[a]
                kept.pieces += gone.pieces
                kept.vertices += gone.vertices
                kept.cut |= gone.cut
                self._large.discard(b)
                if kept.vertices > self._max_vertices:
                    self._large.add(a)

    def _root(self, name: int) -> int:
        root = name
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[name] != root:
            self._parent[name], name = root, self._parent[name]
        return root
