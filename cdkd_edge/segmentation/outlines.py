"""Polygons as flat arrays, and how pieces of a region that were found tile by tile are joined.

A general union of polygons computes where they cross. Pieces of a label map never cross: two pieces of one region meet
in pixel edges on the border between two tiles, and each such edge is in both pieces, in opposite directions. Removing
these pairs and following the edges that are left gives the outline of the union, without any new coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class Outlines:
    """Polygons in Shapely's ragged arrays: points of rings of polygons. Every ring ends with its first point.

    Ring ``i`` has the points ``rings[i]:rings[i + 1]``. Polygon ``j`` has the rings ``polygons[j]:polygons[j + 1]``,
    the outer one first.
    """

    points: Floats
    rings: Ints
    polygons: Ints

    @classmethod
    def from_shapely(cls, polygons: npt.NDArray[np.object_]) -> Outlines:
        """Convert Shapely polygons ``[N]``."""
        import shapely

        _, points, (rings, ends) = shapely.to_ragged_array(polygons)
        return cls(points, np.asarray(rings, np.int64), np.asarray(ends, np.int64))

    def to_shapely(self) -> npt.NDArray[np.object_]:
        """Convert to Shapely polygons ``[N]``."""
        import shapely

        if len(self) == 0:
            return np.empty(0, object)
        kind = shapely.GeometryType.POLYGON
        return np.asarray(shapely.from_ragged_array(kind, self.points, (self.rings, self.polygons)))

    def __len__(self) -> int:
        return len(self.polygons) - 1

    @property
    def outer(self) -> Bools:
        """Whether each ring is the outer one of its polygon."""
        outer = np.zeros(len(self.rings) - 1, bool)
        outer[self.polygons[:-1]] = True
        return outer

    @property
    def owners(self) -> Ints:
        """The polygon of each ring."""
        return np.repeat(np.arange(len(self)), np.diff(self.polygons))

    def select(self, polygons: Bools, rings: Bools | None = None) -> Outlines:
        """Keep the chosen polygons, and of their rings the chosen ones (default: all)."""
        owners = self.owners
        chosen = polygons[owners] if rings is None else rings & polygons[owners]
        sizes = np.diff(self.rings)
        counts = np.bincount(owners[chosen], minlength=len(self))[polygons]
        return Outlines(self.points[np.repeat(chosen, sizes)], _offsets(sizes[chosen]), _offsets(counts))

    def without_straight_vertices(self) -> Outlines:
        """Drop vertices between two edges of one direction; exact for integer coordinates."""
        sizes = np.diff(self.rings) - 1
        repeated = np.zeros(len(self.points), bool)
        repeated[self.rings[1:] - 1] = True
        points = self.points[~repeated]
        after = _next_points(sizes)
        before = np.empty_like(after)
        before[after] = np.arange(len(after))
        into, out = points - points[before], points[after] - points
        bends = into[:, 0] * out[:, 1] != into[:, 1] * out[:, 0]
        left = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[bends], minlength=len(sizes))
        index, rings = _closed(_offsets(left)[:-1], left)
        return Outlines(points[bends][index], rings, self.polygons)

    def ring_areas(self, plane: Floats) -> Floats:
        """Area inside every ring; ``plane`` holds the points ``[P, 2]`` in an equal-area plane."""
        import shapely

        ring = np.repeat(np.arange(len(self.rings) - 1), np.diff(self.rings))
        return np.asarray(shapely.area(shapely.polygons(shapely.linearrings(plane, indices=ring))))


@dataclass(slots=True)
class Piece:
    """A polygon of one tile, packed: a row of tiles of a wide map holds millions of vertices.

    Rings follow each other and are not closed: edge ``i`` leads from point ``i`` to the next point of its ring. The
    outer ring has positive area in (x, y), holes negative.
    """

    origin: tuple[int, int]  # pixel corner to which the points are relative
    offsets: npt.NDArray[np.unsignedinteger]  # points ``[P, 2]`` relative to the origin
    sizes: npt.NDArray[np.int32]  # points in each ring
    border_bits: npt.NDArray[np.uint8]  # one per edge: whether it lies between two tiles (then it is one pixel long)

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def points(self) -> npt.NDArray[np.int32]:
        """Pixel corners ``[P, 2]``."""
        return self.offsets.astype(np.int32) + np.array(self.origin, np.int32)

    @property
    def border(self) -> Bools:
        """Whether each edge lies between two tiles."""
        return np.unpackbits(self.border_bits, count=len(self)).view(bool)


class TilePieces:
    """The polygons ``[N]`` of one tile, with their edges on borders to other tiles split at every pixel.

    ``lines`` are the borders as (axis, c): axis 0 is the line x = c, axis 1 the line y = c.
    """

    def __init__(self, outlines: Outlines, lines: list[tuple[int, int]]) -> None:
        points, sizes = _oriented(outlines)
        steps = points[_next_points(sizes)] - points
        border = np.zeros(len(points), bool)
        for axis, at in lines:
            border |= (points[:, axis] == at) & (steps[:, axis] == 0)
        # An edge of n pixels on a border becomes n edges.
        times = np.where(border, np.abs(steps).sum(1), 1)
        source = np.repeat(np.arange(len(points)), times)
        along = np.arange(len(source)) - (np.cumsum(times) - times)[source]
        self._points = points[source] + along[:, None] * np.sign(steps[source])
        self._border = border[source]
        self._sizes = np.add.reduceat(times, np.cumsum(sizes) - sizes) if len(sizes) else sizes
        self._rings = outlines.polygons
        self._firsts = _offsets(self._sizes)[self._rings]
        # Both ends and the polygon of each edge on a border.
        edges = np.flatnonzero(self._border)
        self._here, self._there = self._points[edges], self._points[_next_points(self._sizes)[edges]]
        self._owners = np.searchsorted(self._firsts, edges, "right") - 1

    @property
    def touching(self) -> Bools:
        """Whether each polygon has an edge on one of the borders."""
        touching = np.zeros(len(self._rings) - 1, bool)
        touching[self._owners] = True
        return touching

    def along(self, line: tuple[int, int], start: int, length: int) -> Ints:
        """The polygon at each pixel along a border, ``[length]`` from ``start`` on; N where there is none."""
        axis, at = line
        on_line = (self._here[:, axis] == at) & (self._there[:, axis] == at)
        polygons = np.full(length, len(self._rings) - 1)
        polygons[np.minimum(self._here, self._there)[on_line, 1 - axis] - start] = self._owners[on_line]
        return polygons

    def piece(self, polygon: int) -> Piece:
        """Pack one polygon, so that the memory of the others can be freed."""
        inside = slice(self._firsts[polygon], self._firsts[polygon + 1])
        rings = slice(self._rings[polygon], self._rings[polygon + 1])
        x, y = self._points[inside].min(0).tolist()
        offsets = self._points[inside] - (x, y)
        kind = np.uint16 if offsets.max() < 1 << 16 else np.uint32
        sizes = self._sizes[rings].astype(np.int32)
        return Piece((x, y), offsets.astype(kind), sizes, np.packbits(self._border[inside]))


def unite(pieces: list[Piece], regions: Ints) -> tuple[Outlines, Ints]:
    """Join at least one piece, none of which overlap; ``regions`` is the region of each.

    Returns one polygon for all pieces of a region that share edges, and the region of each polygon.
    """
    points = np.concatenate([piece.points for piece in pieces])
    sizes = np.concatenate([piece.sizes for piece in pieces]).astype(np.int64)
    border = np.concatenate([piece.border for piece in pieces])
    owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    after = _next_points(sizes)

    one, other = _shared_edges(points, after, np.flatnonzero(border), regions[owners])
    removed = np.zeros(len(points), bool)
    removed[one] = removed[other] = True
    owners = _components(len(pieces), owners[one], owners[other])[owners]

    # Cut the outlines into runs of edges at the points where several edges start, such as both ends of a removed edge;
    # elsewhere an outline goes on as in its piece. Runs also begin where rings begin, so that none passes a ring's end.
    place = _numbered(points)
    order = np.argsort(place)
    same = place[order[1:]] == place[order[:-1]]
    cut = np.zeros(len(points), bool)
    cut[order[1:][same]] = cut[order[:-1][same]] = True
    cut[np.cumsum(sizes) - sizes] = True
    starts, ends = np.flatnonzero(cut & ~removed), np.flatnonzero(cut[after] & ~removed)
    runs, firsts = _cycles(_next_runs(points, after, place, owners, starts, ends))

    lengths = (ends - starts + 1)[runs]
    sizes = np.add.reduceat(lengths, firsts)
    outline = points[_ranges(starts[runs], lengths)]
    owners = owners[starts[runs[firsts]]]
    outer = _doubled_areas(outline, sizes) > 0
    rings = np.lexsort((~outer, owners))  # by polygon, the outer ring first
    index, offsets = _closed((np.cumsum(sizes) - sizes)[rings], sizes[rings])
    outer = outer[rings]
    polygons = np.append(np.flatnonzero(outer), len(rings))
    return Outlines(outline[index].astype(np.float64), offsets, polygons), regions[owners[rings][outer]]


def _shared_edges(points: npt.NDArray[np.int32], after: Ints, edges: Ints, regions: Ints) -> tuple[Ints, Ints]:
    """Pairs of the given edges that coincide and belong to one region."""
    here, there = points[edges].astype(np.int64), points[after[edges]].astype(np.int64)
    name = _numbered(np.minimum(here, there), int(points[:, 0].max())) * 2 + (here[:, 0] == there[:, 0])
    order = np.argsort(name)
    edges, name = edges[order], name[order]
    same = (name[1:] == name[:-1]) & (regions[edges[1:]] == regions[edges[:-1]])
    return edges[:-1][same], edges[1:][same]


def root_of(parents: dict[int, int] | list[int], node: int) -> int:
    """The representative of a node's set in a union-find forest, whose paths are halved on the way."""
    while parents[node] != node:
        parents[node] = node = parents[parents[node]]
    return node


def _components(count: int, one: Ints, other: Ints) -> Ints:
    """The smallest index in the connected component of each of ``count`` nodes; ``one[i]``-``other[i]`` are edges."""
    parents = list(range(count))
    for pair in np.unique(one * count + other).tolist():
        a, b = sorted((root_of(parents, pair // count), root_of(parents, pair % count)))
        parents[b] = a
    return np.array([root_of(parents, node) for node in range(count)], np.int64)


def _next_runs(points: npt.NDArray[np.int32], after: Ints, place: Ints, owners: Ints, starts: Ints, ends: Ints) -> Ints:
    """The run that follows each run of edges; run ``i`` leads from edge ``starts[i]`` to edge ``ends[i]``.

    At most two runs of one polygon end at a point, where two of its pixels touch by their corners. Turning around the
    same pixel would let the outline meet itself there. So it goes on to the other pixel, and the polygon gets a ring
    that touches another ring: with the polygon on the left, that is the next way out counter-clockwise.
    """
    back = points[ends] - points[after[ends]]
    ahead = points[after[starts]] - points[starts]
    came, goes = np.arctan2(back[:, 1], back[:, 0]), np.arctan2(ahead[:, 1], ahead[:, 0])
    into = np.lexsort((came, owners[ends], place[after[ends]]))
    out = np.lexsort((goes, owners[starts], place[starts]))
    edges = starts[out]
    two = np.flatnonzero((place[edges[1:]] == place[edges[:-1]]) & (owners[edges[1:]] == owners[edges[:-1]]))
    two = two[goes[out[two]] < came[into[two]]]
    out[two], out[two + 1] = out[two + 1], out[two]
    following = np.empty(len(starts), np.int64)
    following[into] = out
    return following


def _cycles(following: Ints) -> tuple[Ints, Ints]:
    """The elements of a permutation cycle by cycle, and where each cycle begins."""
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


def _oriented(outlines: Outlines) -> tuple[Ints, Ints]:
    """Points of open rings, outer rings with positive and holes with negative area; and the size of each ring."""
    sizes = np.diff(outlines.rings) - 1
    ends = np.cumsum(sizes)
    ring = np.repeat(np.arange(len(sizes)), sizes)
    points = outlines.points[np.arange(len(ring)) + ring].astype(np.int64)  # without each ring's repeated point
    turned = ((_doubled_areas(points, sizes) > 0) != outlines.outer)[ring]
    place = np.arange(len(ring))
    place[turned] = ((2 * ends - sizes - 1)[ring] - place)[turned]
    return points[place], sizes


def _doubled_areas(points: npt.NDArray[np.integer], sizes: Ints) -> Ints:
    """Twice the signed area of each open ring; exact."""
    if not len(sizes):
        return np.empty(0, np.int64)
    x, y = points.T.astype(np.int64)
    after = _next_points(sizes)
    return np.asarray(np.add.reduceat((x[after] - x) * (y[after] + y), np.cumsum(sizes) - sizes)) * -1


def _numbered(points: npt.NDArray[np.integer], width: int | None = None) -> Ints:
    """One number for each pixel corner, the same for equal ones; ``width``: the largest x (default: of these)."""
    width = int(points[:, 0].max()) if width is None else width
    return points[:, 1].astype(np.int64) * (width + 1) + points[:, 0]


def _next_points(sizes: Ints) -> Ints:
    """For each point of open rings, the next point of its ring."""
    ends = np.cumsum(sizes)
    after = np.arange(1, int(sizes.sum()) + 1)
    after[ends - 1] = ends - sizes
    return after


def _closed(begins: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """Point indices of rings, the first point repeated at the end; and the offset of each ring among them."""
    index, offsets = _ranges(begins, sizes + 1), _offsets(sizes + 1)
    index[offsets[1:] - 1] = begins
    return index, offsets


def _offsets(counts: Ints) -> Ints:
    """Where each group of so many elements begins, and where the last one ends."""
    return np.append(0, np.cumsum(counts))


def _ranges(begins: Ints, lengths: Ints) -> Ints:
    """``begin, begin + 1, ...`` for each begin and length, one range after the other."""
    return np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
