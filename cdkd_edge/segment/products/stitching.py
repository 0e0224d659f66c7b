"""Pieces of regions put together along the borders of tiles, by their edges alone.

Uniting polygons in general means finding where they cross. Pieces of a label map cross nowhere: two of one region meet
in pixel edges on a tile's border, which one of them has in one direction and the other in the opposite one. Those edges
go, and what is left are the outlines of the union, to be read in another order. Every coordinate is one that was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.segment.products.outlines import Outlines

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Piece:
    """A polygon of one tile, in as few bytes as it takes: a row of tiles of a wide map has millions of vertices.

    Rings lie one after the other and are not closed: edge ``i`` goes from point ``i`` to the next one of its ring. The
    outer ring has positive area (in x, y as they are), holes have negative.
    """

    origin: tuple[int, int]
    """Pixel corner that points are relative to."""
    steps: npt.NDArray[np.unsignedinteger]
    """From there to each point ``[P, 2]``."""
    sizes: npt.NDArray[np.int32]
    """Points of each ring."""
    flags: npt.NDArray[np.uint8]
    """Per edge a bit, whether it lies between two tiles; such edges are one pixel long."""

    @classmethod
    def of(cls, points: Ints, sizes: Ints, border: Bools) -> Piece:
        """Pack points, ring sizes, and per edge whether it lies between two tiles."""
        x, y = points.min(0).tolist()
        steps = points - (x, y)
        kind = np.uint16 if steps.max() < 1 << 16 else np.uint32
        return cls((x, y), steps.astype(kind), sizes.astype(np.int32), np.packbits(border))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def points(self) -> npt.NDArray[np.int32]:
        """Pixel corners ``[P, 2]``."""
        return self.steps.astype(np.int32) + np.array(self.origin, np.int32)

    @property
    def border(self) -> Bools:
        """Per edge, whether it lies between two tiles."""
        return np.unpackbits(self.flags, count=len(self)).view(bool)


class CutTile:
    """The polygons of a tile, their edges along its borders with other tiles cut at every pixel.

    Args:
        outlines: the polygons ``[N]``, in pixel corners.
        lines: these borders, as pairs of axis (0: a line x = c, 1: y = c) and c.
    """

    def __init__(self, outlines: Outlines, lines: list[tuple[int, int]]) -> None:
        points, sizes = _oriented(outlines)
        steps = points[_after(sizes)] - points
        border = np.zeros(len(points), bool)
        for axis, at in lines:
            border |= (points[:, axis] == at) & (steps[:, axis] == 0)
        times = np.where(border, np.abs(steps).sum(1), 1)
        source = np.repeat(np.arange(len(points)), times)
        along = np.arange(len(source)) - (np.cumsum(times) - times)[source]
        self._points = points[source] + along[:, None] * np.sign(steps[source])
        self._border = border[source]
        self._sizes = np.add.reduceat(times, np.cumsum(sizes) - sizes) if len(sizes) else sizes
        self._rings = outlines.polygons
        self._firsts = np.append(0, np.cumsum(self._sizes))[self._rings]
        # Of the edges on borders: from where, to where, and whose.
        edges = np.flatnonzero(self._border)
        self._here, self._there = self._points[edges], self._points[_after(self._sizes)[edges]]
        self._owner = np.searchsorted(self._firsts, edges, "right") - 1

    @property
    def touching(self) -> Bools:
        """Which polygons have an edge on one of the lines."""
        touching = np.zeros(len(self._rings) - 1, bool)
        touching[self._owner] = True
        return touching

    def along(self, line: tuple[int, int], start: int, length: int) -> Ints:
        """The polygon at each pixel along a line, ``[length]`` from ``start`` on; N where there is none."""
        axis, at = line
        on_line = (self._here[:, axis] == at) & (self._there[:, axis] == at)
        polygons = np.full(length, len(self._rings) - 1)
        polygons[np.minimum(self._here, self._there)[on_line, 1 - axis] - start] = self._owner[on_line]
        return polygons

    def piece(self, polygon: int) -> Piece:
        """One of the polygons, without the others' memory."""
        points = slice(self._firsts[polygon], self._firsts[polygon + 1])
        rings = slice(self._rings[polygon], self._rings[polygon + 1])
        return Piece.of(self._points[points], self._sizes[rings], self._border[points])


def _oriented(outlines: Outlines) -> tuple[Ints, Ints]:
    """Points of open rings, outer ones of positive area, holes of negative; and how many each ring has."""
    sizes = np.diff(outlines.rings) - 1
    ends = np.cumsum(sizes)
    ring = np.repeat(np.arange(len(sizes)), sizes)
    index = np.arange(len(ring)) + ring  # over the repeated points
    points = outlines.points[index].astype(np.int64)
    wrong = (_areas(points, sizes) > 0) != outlines.outer
    turned = wrong[ring]
    place = np.arange(len(ring))
    place[turned] = ((2 * ends - sizes - 1)[ring] - place)[turned]
    return points[place], sizes


def _after(sizes: Ints) -> Ints:
    """Per point of open rings, the next one of its ring."""
    ends = np.cumsum(sizes)
    after = np.arange(1, int(sizes.sum()) + 1)
    after[ends - 1] = ends - sizes
    return after


def _areas(points: npt.NDArray[np.integer], sizes: Ints) -> Ints:
    """Twice the area of each open ring, with its sign; exact."""
    if not len(sizes):
        return np.empty(0, np.int64)
    x, y = points.T.astype(np.int64)
    after = _after(sizes)
    return np.asarray(np.add.reduceat((x[after] - x) * (y[after] + y), np.cumsum(sizes) - sizes)) * -1


def united(pieces: list[Piece], regions: Ints) -> tuple[Outlines, Ints]:
    """Unite the pieces of regions.

    Args:
        pieces: at least one; no two overlap.
        regions: which region each belongs to.

    Returns:
        Polygons, one for all pieces of a region that are connected by edges, and the region of each.
    """
    points = np.concatenate([piece.points for piece in pieces])
    sizes = np.concatenate([piece.sizes for piece in pieces]).astype(np.int64)
    border = np.concatenate([piece.border for piece in pieces])
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    after = _after(sizes)

    one, other = _met(points, after, np.flatnonzero(border), regions[owner])
    gone = np.zeros(len(points), bool)
    gone[one] = gone[other] = True
    owner = _connected(len(pieces), owner[one], owner[other])[owner]

    # Between points that several edges start from, outlines go on as in their pieces. A removed edge's ends are such
    # points: in both pieces an edge starts there. Where a ring starts is one more, so that no run goes past its end.
    place = points[:, 1].astype(np.int64) * (int(points[:, 0].max()) + 1) + points[:, 0]
    order = np.argsort(place)
    same = place[order[1:]] == place[order[:-1]]
    several = np.zeros(len(points), bool)
    several[order[1:][same]] = several[order[:-1][same]] = True
    several[np.cumsum(sizes) - sizes] = True
    starts, ends = np.flatnonzero(several & ~gone), np.flatnonzero(several[after] & ~gone)
    following = _following(points, after, place, owner, starts, ends)
    runs, firsts = _cycles(following)

    lengths = (ends - starts + 1)[runs]
    sizes = np.add.reduceat(lengths, firsts)
    outline = points[_slices(starts[runs], lengths)]
    owner = owner[starts[runs[firsts]]]
    outer = _areas(outline, sizes) > 0
    rings = np.lexsort((~outer, owner))
    begins = np.cumsum(sizes) - sizes
    sizes, outer = sizes[rings], outer[rings]
    # Closed: the index of each ring's first point once more at its end.
    index = _slices(begins[rings], sizes + 1)
    closes = np.cumsum(sizes + 1)
    index[closes - 1] = begins[rings]
    polygons = np.append(np.flatnonzero(outer), len(rings))
    return Outlines(outline[index].astype(np.float64), np.append(0, closes), polygons), regions[owner[rings][outer]]


def _met(points: npt.NDArray[np.int32], after: Ints, edges: Ints, regions: Ints) -> tuple[Ints, Ints]:
    """Of some edges, those that two pieces of one region have: indices in the one and in the other."""
    here, there = points[edges].astype(np.int64), points[after[edges]].astype(np.int64)
    low = np.minimum(here, there)
    name = (low[:, 1] * (int(points[:, 0].max()) + 1) + low[:, 0]) * 2 + (here[:, 0] == there[:, 0])
    order = np.argsort(name)
    edges, name = edges[order], name[order]
    same = (name[1:] == name[:-1]) & (regions[edges[1:]] == regions[edges[:-1]])
    return edges[:-1][same], edges[1:][same]


def _connected(count: int, one: Ints, other: Ints) -> Ints:
    """For each of ``count`` things the first one that it is connected with by pairs, over any number of them."""
    first = list(range(count))

    def root(thing: int) -> int:
        while first[thing] != thing:
            first[thing] = thing = first[first[thing]]
        return thing

    for pair in np.unique(one * count + other).tolist():
        a, b = sorted((root(pair // count), root(pair % count)))
        first[b] = a
    return np.array([root(thing) for thing in range(count)], np.int64)


def _following(points: npt.NDArray[np.int32], after: Ints, place: Ints, owner: Ints, starts: Ints, ends: Ints) -> Ints:
    """Which run of edges comes after each; run ``i`` goes from edge ``starts[i]`` to edge ``ends[i]``.

    At most two runs of one polygon end at a point: two of its pixels touch there by their corners. An outline that went
    around its pixel would then meet itself, so it goes on to the other pixel, which makes a ring that touches another.
    With the polygon to the left of its edges, that is the next way out counter-clockwise.
    """
    back = points[ends] - points[after[ends]]
    ahead = points[after[starts]] - points[starts]
    came, goes = np.arctan2(back[:, 1], back[:, 0]), np.arctan2(ahead[:, 1], ahead[:, 0])
    into = np.lexsort((came, owner[ends], place[after[ends]]))
    out = np.lexsort((goes, owner[starts], place[starts]))
    edges = starts[out]
    two = np.flatnonzero((place[edges[1:]] == place[edges[:-1]]) & (owner[edges[1:]] == owner[edges[:-1]]))
    two = two[goes[out[two]] < came[into[two]]]
    out[two], out[two + 1] = out[two + 1], out[two]
    following = np.empty(len(starts), np.int64)
    following[into] = out
    return following


def _cycles(following: Ints) -> tuple[Ints, Ints]:
    """Cycles of a permutation: its elements cycle by cycle, and where each cycle begins."""
    steps = following.tolist()
    seen = bytearray(len(steps))
    elements: list[int] = []
    firsts: list[int] = []
    for element in range(len(steps)):
        if not seen[element]:
            firsts.append(len(elements))
            while not seen[element]:
                seen[element] = 1
                elements.append(element)
                element = steps[element]
    return np.array(elements, np.int64), np.array(firsts, np.int64)


def _slices(begins: Ints, lengths: Ints) -> Ints:
    """Indices of slices, one after the other."""
    return np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
