"""Areas of interest: which pixels of a scene are to be labelled, from a file of polygons or a box of coordinates."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import geometry_mask
from rasterio.transform import Affine
from rasterio.warp import transform as warp_points

from cdkd_edge.core.errors import MissingExtraError, SceneError
from cdkd_edge.core.files import read_json
from cdkd_edge.raster.areas import mapped
from cdkd_edge.raster.open import gdal

_LON_LAT = "OGC:CRS84"
_STEPS = 64
"""Points along each side of a box in a projection, so that it stays straight there."""
_COARSE, _COARSE_CELLS = 32, 1 << 24
"""Pixels a side of what decides whether a tile is computed at all; more where there would be more than so many."""
_MOST_BYTES = 64 << 20
"""Of a GeoJSON file."""
_MOST_FEATURES = 100_000
_SAMPLES = 9
"""Points a side at which it is looked where on Earth a scene lies."""
_MARGIN = 0.05
"""Around a scene, of its extent: its edges are curves in longitude and latitude."""
_INWARDS = 1e-9
"""Of a scene's extent, less than any pixel: what lies where a map is cut may come out at its other end."""
_HALF_WAY_ROUND = 180 - 1e-7
"""Degrees, by a centimetre less than what may come out at the other end of a map."""
_SEAM_M = 1e7
"""A degree of a meridian or parallel is never as long on a map, unless the map is cut there."""

Ring = list[tuple[float, float]]
Polygon = list[Ring]
"""Its outline and its holes."""


@dataclass(frozen=True)
class AreaOfInterest:
    """Polygons in some coordinates, not yet on a scene."""

    source: str
    """As it was asked for."""
    polygons: tuple[Polygon, ...]
    crs: str | None
    """Of their coordinates; None: the scene's."""

    @property
    def identity(self) -> str:
        """A digest of the coordinates."""
        document = json.dumps([self.polygons, self.crs], sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()


def read_area(text: str) -> AreaOfInterest:
    """An area from what was typed: ``minx,miny,maxx,maxy`` or the name of a file.

    Coordinates of GeoJSON are longitude and latitude (RFC 7946) unless it has the ``crs`` member of GeoJSON 2008;
    other files (GeoPackage, Shapefile: what pyogrio reads) say what theirs are. Those of a box are longitude and
    latitude if all of them can be, else in the scene's reference system; with minx > maxx it crosses the antimeridian.

    Raises:
        SceneError: it is neither, or holds no polygon.
        MissingExtraError: reading the file needs pyogrio.
    """
    numbers = _numbers(text)
    if numbers is not None:
        return _box(text, numbers)
    path = Path(text)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist, and is no box of four numbers"
        raise SceneError(
            f"area of interest {text} {what}",
            hint="give minx,miny,maxx,maxy, or a GeoJSON file, a GeoPackage or a Shapefile",
        )
    with open(path, "rb") as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins and begins not in b'{["':
        geometries, crs = _vector_file(path)
    else:
        try:
            document = read_json(path, _MOST_BYTES)
        except ValueError as error:
            raise SceneError(f"area of interest {text} is not GeoJSON: {error}") from None
        geometries, crs = [document], _named_crs(document) or _LON_LAT
    polygons: list[Polygon] = []
    try:
        for geometry in geometries:
            _collect(geometry, polygons)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        raise SceneError(f"area of interest {text} is damaged GeoJSON") from None
    if not polygons:
        raise SceneError(f"area of interest {text} holds no polygon")
    return AreaOfInterest(text, tuple(polygons), crs)


class AreaOnScene:
    """An area of interest in the pixels of a scene: a pixel belongs to it if its centre does.

    Args:
        area: the polygons.
        crs, transform: of the scene.
        height, width: of the scene, px.

    Raises:
        SceneError: the scene has no place on Earth, or the area holds no pixel of it.
    """

    def __init__(self, area: AreaOfInterest, crs: CRS | None, transform: Affine, height: int, width: int) -> None:
        if crs is None or transform.is_identity:
            raise SceneError(
                "an area of interest needs a scene with a reference system and a transform",
                hint="georeference it first, e.g. with gdalwarp",
            )
        self._transform, self._height, self._width = transform, height, width
        with gdal(f"placing the area of interest {area.source}"):
            try:
                own = crs if area.crs is None else CRS.from_user_input(area.crs)
            except CRSError as error:
                raise SceneError(f"area of interest {area.source}: {error}") from None
            self._polygons = [
                {"type": "Polygon", "coordinates": polygon}
                for polygon in _on_scene(area, own, crs, _sampled(transform, height, width))
            ]
            self._step = max(_COARSE, math.ceil(math.sqrt(height * width / _COARSE_CELLS)))
            self._coarse = np.zeros((-(-height // self._step), -(-width // self._step)), bool)
            if self._polygons:
                coarse = transform * Affine.scale(self._step, self._step)
                self._coarse = self._masked(coarse, *self._coarse.shape, touched=True)
            if not self._holds_a_pixel():
                what = "longitude and latitude" if area.crs == _LON_LAT else area.crs or "the scene's reference system"
                raise SceneError(
                    f"the area of interest {area.source} does not meet the scene"
                    if not self._coarse.any()
                    else f"the area of interest {area.source} holds no pixel's centre",
                    hint=f"its coordinates are taken as {what}",
                )

    def touches(self, top: int, left: int, bottom: int, right: int) -> bool:
        """Whether a rectangle may hold a pixel of the area."""
        rows = slice(max(top, 0) // self._step, -(-bottom // self._step))
        columns = slice(max(left, 0) // self._step, -(-right // self._step))
        return bool(self._coarse[rows, columns].any())

    def inside(self, top: int, left: int, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Which pixels of a rectangle belong to the area, ``[h, w]``."""
        if not self.touches(top, left, top + height, left + width):
            return np.zeros((height, width), bool)
        place = self._transform * Affine.translation(left, top)
        with gdal("placing the area of interest"):
            return self._masked(place, height, width, touched=False)

    def _holds_a_pixel(self) -> bool:
        step = self._step
        corners = (np.argwhere(self._coarse) * step).tolist()
        return any(
            self.inside(row, column, min(step, self._height - row), min(step, self._width - column)).any()
            for row, column in corners
        )

    def _masked(self, transform: Affine, height: int, width: int, *, touched: bool) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = geometry_mask(
            self._polygons, (height, width), transform, all_touched=touched, invert=True
        )
        return mask


# --- from a file or a box to polygons ---------------------------------------------------------------


def _numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _box(text: str, numbers: list[float]) -> AreaOfInterest:
    left, bottom, right, top = numbers
    on_globe = max(abs(left), abs(right)) <= 180 and max(abs(bottom), abs(top)) <= 90
    if on_globe and right < left and left - right > 180:
        right += 360  # as in RFC 7946: across the antimeridian
    if not (left < right and bottom < top):
        raise SceneError(
            f"the box {text} is empty",
            hint="the order is minx,miny,maxx,maxy; minx may be larger only in longitudes across the antimeridian",
        )
    across = [left + (right - left) * step / _STEPS for step in range(_STEPS + 1)]
    up = [bottom + (top - bottom) * step / _STEPS for step in range(_STEPS + 1)]
    ring = [(x, bottom) for x in across] + [(right, y) for y in up] + [(x, top) for x in reversed(across)]
    ring += [(left, y) for y in reversed(up)]
    return AreaOfInterest(text, ([ring],), _LON_LAT if on_globe else None)


def _vector_file(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Geometries of a file that is no GeoJSON, and the reference system of their coordinates."""
    try:
        import pyogrio
        import shapely
    except ImportError:
        raise MissingExtraError("pyogrio", "vector", f"an area of interest that is no GeoJSON ({path.name})") from None
    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
        if len(layers) != 1:
            raise SceneError(
                f"area of interest {path} has {len(layers)} layers with geometry: {', '.join(layers[:8])}",
                hint=f"take one out of it: ogr2ogr area.geojson {path} LAYER" if layers else None,
            )
        count = pyogrio.read_info(path, layer=layers[0])["features"]
        if count > _MOST_FEATURES:
            raise SceneError(f"area of interest {path} has {count} features; at most {_MOST_FEATURES} are taken")
        meta, _, found, _ = pyogrio.raw.read(path, layer=layers[0], columns=[], force_2d=True)
        geometries = [shapely.geometry.mapping(one) for one in shapely.from_wkb(found) if one is not None]
    except SceneError:
        raise
    except (RuntimeError, ValueError, shapely.errors.ShapelyError) as error:
        raise SceneError(f"area of interest {path} is neither GeoJSON nor a file that pyogrio reads: {error}") from None
    if not meta["crs"]:
        raise SceneError(f"area of interest {path} does not say what its coordinates are (a Shapefile does in a .prj)")
    return geometries, str(meta["crs"])


def _collect(item: Any, polygons: list[Polygon]) -> None:
    """Polygons of any GeoJSON object; points and lines have no pixels."""
    if item is None:  # a feature without geometry
        return
    kind = item.get("type")
    if kind == "FeatureCollection":
        for feature in item["features"]:
            _collect(feature, polygons)
    elif kind == "Feature":
        _collect(item["geometry"], polygons)
    elif kind == "GeometryCollection":
        for geometry in item["geometries"]:
            _collect(geometry, polygons)
    elif kind in ("Polygon", "MultiPolygon"):
        # One by one: where parts of a multipolygon overlap, they would cut holes into each other.
        parts = item["coordinates"] if kind == "MultiPolygon" else [item["coordinates"]]
        polygons += [[_ring(ring) for ring in part] for part in parts if part]


def _ring(points: Any) -> Ring:
    ring = [(float(point[0]), float(point[1])) for point in points]
    if len(ring) < 4 or not all(map(math.isfinite, (value for point in ring for value in point))):
        raise ValueError("a ring has at least four finite points")
    return ring


def _named_crs(document: Any) -> str | None:
    name = document.get("crs") if isinstance(document, dict) else None
    if not name:
        return None
    try:
        return str(name["properties"]["name"])
    except (KeyError, TypeError):
        raise SceneError("the area of interest has a crs member without a name") from None


# --- from polygons to a scene -------------------------------------------------------------------------


def _sampled(transform: Affine, height: int, width: int) -> tuple[list[float], list[float]]:
    """Points spread over a scene, the first one in its middle, in its coordinates."""
    places = [
        (i / (_SAMPLES - 1) * width, j / (_SAMPLES - 1) * height) for i in range(_SAMPLES) for j in range(_SAMPLES)
    ]
    columns, rows = zip((width / 2, height / 2), *places, strict=True)
    return mapped(transform, columns, rows)


class _SeamError(SceneError):
    """A map is cut where an area goes on."""


def _on_scene(area: AreaOfInterest, own: CRS, crs: CRS, sampled: tuple[list[float], list[float]]) -> list[Polygon]:
    """An area in a scene's coordinates. Longitudes go round: of each polygon all that lies near the scene is taken,
    on either side of the antimeridian; what lies far away is left out, so that no map needs to show it."""
    found = area.polygons
    if not own.is_geographic:
        found = tuple(_transformed(polygon, own, crs, area) for polygon in found)
        if not crs.is_geographic:
            return list(found)
        own = crs
    polygons = [_whole(polygon, area) for polygon in found]

    def placed(margin: float) -> list[Polygon]:
        near = _near(own, crs, sampled, margin)
        pieces = (piece for polygon in polygons for piece in _pieces(polygon, near))
        return [_transformed(piece, own, crs, area) for piece in pieces]

    try:
        return placed(_MARGIN)
    except _SeamError:  # a scene may end where its map does
        return placed(-_INWARDS)


def _transformed(polygon: Polygon, own: CRS, crs: CRS, area: AreaOfInterest) -> Polygon:
    if own == crs:
        return polygon
    rings = []
    for ring in polygon:
        x, y = warp_points(own, crs, *map(list, zip(*ring, strict=True)))
        if not all(map(math.isfinite, [*x, *y])):
            raise SceneError(f"the area of interest {area.source} reaches beyond the scene's projection")
        if crs.is_geographic:  # longitudes come back within 180
            near = [point[0] for point in ring] if own.is_geographic else None
            for i in range(len(x)):
                beside = near[i] if near else x[max(i - 1, 0)]
                x[i] += 360 * round((beside - x[i]) / 360)
        elif own.is_geographic and crs.is_projected:
            limit = _SEAM_M / crs.linear_units_factor[1]
            if max(np.hypot(np.diff(x), np.diff(y)), default=0) > limit:
                raise _SeamError(
                    f"the area of interest {area.source} crosses the line at which the scene's projection is cut",
                    hint="give it in the scene's own coordinates",
                )
        rings.append(list(zip(x, y, strict=True)))
    return rings


@dataclass(frozen=True)
class _Near:
    """The surroundings of a scene, degrees; west and east may be beyond 180."""

    west: float
    south: float
    east: float
    north: float


def _near(own: CRS, crs: CRS, sampled: tuple[list[float], list[float]], margin: float) -> _Near:
    # Longitudes of a scene that has them go on beyond 180.
    longitudes, latitudes = sampled if crs.is_geographic else warp_points(crs, own, *sampled)
    placed = [point for point in zip(longitudes, latitudes, strict=True) if all(map(math.isfinite, point))]
    if not placed:
        return _Near(-180, -90, 180, 90)
    middle = placed[0][0]
    aside = [x - middle if crs.is_geographic else (x - middle + 180) % 360 - 180 for x, _ in placed]
    south, north = min(y for _, y in placed), max(y for _, y in placed)
    high = margin * (north - south)
    if not crs.is_geographic and min(aside) < -_HALF_WAY_ROUND:  # a map of the world: its other end, too
        aside.append(180)
    west, east = ((1 + 2 * margin) * end(aside) for end in (min, max))
    if not crs.is_geographic:
        west, east = max(west, -_HALF_WAY_ROUND), min(east, _HALF_WAY_ROUND)
    return _Near(middle + west, max(south - high, -90), middle + east, min(north + high, 90))


def _whole(polygon: Polygon, area: AreaOfInterest) -> Polygon:
    """A polygon of longitudes and latitudes as it lies in their plane; around a pole, with the pole."""
    rings = []
    for ring in polygon:
        if any(abs(x) > 360.001 or abs(y) > 90.001 for x, y in ring):
            x, y = max(ring, key=lambda point: max(abs(point[0]) / 360, abs(point[1]) / 90))
            raise SceneError(
                f"{x:.10g}, {y:.10g} in the area of interest {area.source} is no longitude and latitude, which "
                "GeoJSON has unless its crs member says otherwise",
                hint="convert it: ogr2ogr -t_srs OGC:CRS84 OUT.geojson IN",
            )
        steps = [after[0] - before[0] for before, after in pairwise(ring)]
        turns = [(step + 180) % 360 - 180 for step in steps]
        if abs(sum(turns)) > 180:
            longitudes = np.cumsum([ring[0][0], *turns]).tolist()
            pole = math.copysign(90, sum(y for _, y in ring))
            ring = [(x, y) for x, (_, y) in zip(longitudes, ring, strict=True)]
            ring = [*ring, (longitudes[-1], pole), (longitudes[0], pole), ring[0]]
        elif jump := next((step for step in steps if 180 < abs(step) < 359.999), None):
            raise SceneError(
                f"the area of interest {area.source} has an edge over {abs(jump):.6g} degrees of longitude",
                hint="where it crosses the antimeridian, split it there as GeoJSON demands, or go on beyond 180",
            )
        rings.append(ring)
    return rings


def _pieces(polygon: Polygon, near: _Near) -> Iterator[Polygon]:
    """What lies near a scene of a polygon, turned by any number of times, with a point each degree."""
    west, east = min(x for x, _ in polygon[0]), max(x for x, _ in polygon[0])
    for turn in range(math.ceil((near.west - east) / 360), math.floor((near.east - west) / 360) + 1):
        turned = [[(x + 360 * turn, y) for x, y in ring] for ring in polygon]
        rings = [_dense(_clipped(ring, near)) for ring in turned]
        if rings[0]:
            yield [ring for ring in rings if ring]


def _clipped(ring: Ring, near: _Near) -> Ring:
    """A ring within a rectangle (Sutherland and Hodgman, 1974); empty where nothing is left."""
    for axis, limit, sign in ((0, near.west, 1), (0, near.east, -1), (1, near.south, 1), (1, near.north, -1)):
        kept: Ring = []
        before = ring[-1] if ring else (0.0, 0.0)
        for point in ring:
            inside, was = sign * (point[axis] - limit) >= 0, sign * (before[axis] - limit) >= 0
            if inside != was:
                share = (limit - before[axis]) / (point[axis] - before[axis])
                other = before[1 - axis] + share * (point[1 - axis] - before[1 - axis])
                kept.append((limit, other) if axis == 0 else (other, limit))
            if inside:
                kept.append(point)
            before = point
        ring = kept
    return [*ring, ring[0]] if ring else []


def _dense(ring: Ring) -> Ring:
    """The ring with points between those that are more than a degree apart."""
    dense = ring[:1]
    for (x0, y0), (x1, y1) in pairwise(ring):
        count = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        dense += [(x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count) for step in range(1, count + 1)]
    return dense
