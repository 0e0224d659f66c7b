"""Polygons as flat arrays: straight vertices out, small holes closed, areas, coordinates of the map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.raster.areas import Ground

Floats = npt.NDArray[np.float64]


@dataclass
class Outlines:
    """Polygons as Shapely's ragged arrays: points of rings of polygons; every ring ends where it began.

    Ring ``i`` has the points ``rings[i]:rings[i + 1]``; polygon ``j`` the rings ``polygons[j]:polygons[j + 1]``,
    its outer ring first.
    """

    points: Floats
    rings: npt.NDArray[np.int64]
    polygons: npt.NDArray[np.int64]

    @classmethod
    def of(cls, shapely: Any, polygons: npt.NDArray[np.object_]) -> Outlines:
        """From Shapely polygons ``[N]``."""
        _, points, (rings, ends) = shapely.to_ragged_array(polygons)
        return cls(points, np.asarray(rings, np.int64), np.asarray(ends, np.int64))

    def to_shapely(self, shapely: Any) -> npt.NDArray[np.object_]:
        """Shapely polygons ``[N]``."""
        if len(self) == 0:
            return np.empty(0, object)
        kind = shapely.GeometryType.POLYGON
        return np.asarray(shapely.from_ragged_array(kind, self.points, (self.rings, self.polygons)))

    def __len__(self) -> int:
        return len(self.polygons) - 1

    @property
    def outer(self) -> npt.NDArray[np.bool_]:
        """Per ring, whether it is the outer one of its polygon."""
        outer = np.zeros(len(self.rings) - 1, bool)
        outer[self.polygons[:-1]] = True
        return outer

    @property
    def vertices(self) -> npt.NDArray[np.int64]:
        """Points of each polygon, with those that close its rings."""
        return np.diff(self.rings[self.polygons])

    def only(self, polygons: npt.NDArray[np.bool_]) -> Outlines:
        """Some polygons, with all their rings."""
        return self.select(np.ones(len(self.rings) - 1, bool), polygons)

    def without_straight_vertices(self) -> Outlines:
        """The same shapes without vertices between two edges of one direction (exact for integer coordinates)."""
        starts, ends = self.rings[:-1], self.rings[1:]
        counts = ends - starts - 1  # without the repeated one
        is_end = np.zeros(len(self.points), bool)
        is_end[ends - 1] = True
        points = self.points[~is_end]
        firsts = np.concatenate([[0], np.cumsum(counts)])
        before, after = np.arange(len(points)) - 1, np.arange(len(points)) + 1
        before[firsts[:-1]] = firsts[1:] - 1
        after[firsts[1:] - 1] = firsts[:-1]
        into, out = points - points[before], points[after] - points
        kept = into[:, 0] * out[:, 1] != into[:, 1] * out[:, 0]
        ring = np.repeat(np.arange(len(counts)), counts)[kept]
        left = np.bincount(ring, minlength=len(counts))
        return Outlines(*_closed(points[kept], left), self.polygons)

    def ring_areas(self, plane: Floats) -> Floats:
        """Area inside every ring; ``plane`` are its points ``[P, 2]`` in a plane that keeps areas."""
        origin = np.repeat(plane[self.rings[:-1]], np.diff(self.rings), axis=0)
        x, y = (plane - origin).T  # near zero, for the digits
        products = np.zeros(len(plane))
        products[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
        products[self.rings[1:] - 1] = 0  # from one ring to the next there is no edge
        return np.asarray(np.abs(np.add.reduceat(products, self.rings[:-1])) / 2)

    def select(self, rings: npt.NDArray[np.bool_], polygons: npt.NDArray[np.bool_]) -> Outlines:
        """Only some polygons, and of these only some rings."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.polygons))
        rings = rings & polygons[owner]
        sizes = np.diff(self.rings)
        points = self.points[np.repeat(rings, sizes)]
        per_polygon = np.bincount(owner[rings], minlength=len(self))[polygons]
        return Outlines(
            points,
            np.concatenate([[0], np.cumsum(sizes[rings])]),
            np.concatenate([[0], np.cumsum(per_polygon)]),
        )


def _closed(points: Floats, counts: npt.NDArray[np.int64]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Rings of ``counts`` points each, with the first of each repeated at its end."""
    rings = np.concatenate([[0], np.cumsum(counts + 1)])
    firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    closed = np.empty((int(rings[-1]), 2))
    is_end = np.zeros(len(closed), bool)
    is_end[rings[1:] - 1] = True
    closed[~is_end] = points
    closed[is_end] = points[firsts]
    return closed, rings


def large_enough(
    outlines: Outlines, ground: Ground, minimum_m2: float = 0.0, minimum_px: float = 0.0
) -> tuple[Outlines, Floats, npt.NDArray[np.bool_]]:
    """Polygons of at least a certain area, with smaller holes closed.

    Args:
        outlines: in pixel corners.
        ground: what a pixel covers.
        minimum_m2, minimum_px: the area, in one of the two units; 0 keeps everything.

    Returns:
        The polygons that are left; the area of each, m2 (pixels, where the ground is not known); and for each polygon
        given whether it is left.
    """
    outer = outlines.outer
    owner = np.repeat(np.arange(len(outlines)), np.diff(outlines.polygons))
    areas = outlines.ring_areas(_plane(outlines.points, ground))
    measure, smallest = (outlines.ring_areas(outlines.points), minimum_px) if minimum_px else (areas, minimum_m2)
    rings = outer | (measure >= smallest)
    sign = np.where(outer, 1.0, -1.0) * rings
    # By what it covers itself: the shore around a lake is as small as its land.
    left = np.bincount(owner, measure * sign, len(outlines)) >= smallest
    own = np.bincount(owner, areas * sign, len(outlines)).astype(np.float64)
    return outlines.select(rings, left), own[left], left


def _plane(points: Floats, ground: Ground) -> Floats:
    """Points in a plane whose areas are those of the ground, m2 (or pixels, if nothing is known)."""
    if ground.ellipsoid is None:
        return np.asarray(points * np.sqrt(ground.pixel_m2 or 1.0))
    # Cylindrical equal area: an area under a parallel, per radian, times radians.
    longitude, latitude = mapped(points, ground.transform).T * ground.radians
    scale = ground.ellipsoid.semi_major
    return np.stack([longitude * scale, ground.ellipsoid.area_to_parallel(latitude) / scale], axis=1)


def mapped(points: Floats, transform: Any) -> Floats:
    """Pixel corners ``[P, 2]`` (x right, y down) in the coordinates of the map."""
    x, y = points.T
    t = transform
    return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f], axis=1)
