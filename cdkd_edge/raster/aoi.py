"""Areas of interest: a file of polygons or a box says which pixels of a scene are labelled."""

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
_STEPS = 64  # points along each side of a box, so that its sides follow a projection's curves
_COARSE, _COARSE_CELLS = 32, 1 << 24  # px a side of cells that decide if a tile is computed; larger beyond so many
_MOST_BYTES, _MOST_FEATURES = 64 << 20, 100_000  # largest GeoJSON file, and largest number of features of another file
_SAMPLES = 9  # points along each side of a scene that are placed on Earth
_MARGIN = 0.05  # margin around a scene, relative to its extent: its edges are curves in longitude and latitude
_INWARDS = 1e-9  # of a scene's extent, less than a pixel: a point on the edge of a map may come out at its other end
_HALF_WAY_ROUND = 180 - 1e-7  # degrees, a centimetre less than what may come out at the other end of a map
_SEAM_M = 1e7  # metres; a degree of a meridian or parallel is only longer on a map where the map is cut

Ring = list[tuple[float, float]]
Polygon = list[Ring]  # the outline and the holes
Bounds = tuple[float, float, float, float]  # west, south, east, north


@dataclass(frozen=True)
class AreaOfInterest:
    """Polygons, not yet placed on a scene."""

    source: str  # the text of ``--aoi``
    polygons: tuple[Polygon, ...]
    crs: str | None  # the reference system of the coordinates; None: the scene's

    @property
    def identity(self) -> str:
        """SHA-256 of the coordinates."""
        return hashlib.sha256(json.dumps([self.polygons, self.crs], sort_keys=True).encode()).hexdigest()


def read_area(text: str) -> AreaOfInterest:
    """Read an area of interest: ``minx,miny,maxx,maxy`` or the name of a file.

    Coordinates of GeoJSON are longitude and latitude (RFC 7946) unless it has the ``crs`` member of GeoJSON 2008; other
    files that pyogrio reads (GeoPackage, Shapefile) name their reference system. Coordinates of a box are longitude and
    latitude if all of them can be, otherwise the scene's; a box with minx > maxx crosses the antimeridian.

    Raises:
        SceneError, MissingExtraError: it is neither, or holds no polygon; reading the file needs pyogrio.
    """
    if box := _box(text):
        return box
    path = Path(text)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist, and is not a box of four numbers"
        hint = "give minx,miny,maxx,maxy, or a GeoJSON file, a GeoPackage or a Shapefile"
        raise SceneError(f"area of interest {text} {what}", hint=hint)
    with open(path, "rb") as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begins and begins not in b'{["':
        geometries, crs = _vector_file(path)
    else:
        geometries, crs = _geojson_file(path)
    try:
        polygons = [polygon for geometry in geometries for polygon in _polygons_of(geometry)]
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        raise SceneError(f"area of interest {text} is damaged GeoJSON") from None
    if not polygons:
        raise SceneError(f"area of interest {text} holds no polygon")
    return AreaOfInterest(text, tuple(polygons), crs)


class AreaOnScene:
    """An area of interest on a scene of ``height x width`` px; a pixel belongs to it if its centre does.

    Raises:
        SceneError: the scene has no place on Earth, or the area holds no pixel of it.
    """

    def __init__(self, area: AreaOfInterest, crs: CRS | None, transform: Affine, height: int, width: int) -> None:
        if crs is None or transform.is_identity:
            raise SceneError(
                "an area of interest needs a scene with a reference system and a transform",
                hint="georeference it first, e.g. with gdalwarp",
            )
        self._transform = transform
        self._step = step = max(_COARSE, math.ceil(math.sqrt(height * width / _COARSE_CELLS)))
        self._coarse = np.zeros((-(-height // step), -(-width // step)), bool)
        columns, rows = np.meshgrid(np.linspace(0, width, _SAMPLES), np.linspace(0, height, _SAMPLES))
        sampled = mapped(transform, [width / 2, *columns.flat], [height / 2, *rows.flat])  # the first is the middle
        with gdal(f"placing the area of interest {area.source}"):
            try:
                own = crs if area.crs is None else CRS.from_user_input(area.crs)
            except CRSError as error:
                raise SceneError(f"area of interest {area.source}: {error}") from None
            placed = _on_scene(area, own, crs, sampled)
            self._polygons = [{"type": "Polygon", "coordinates": polygon} for polygon in placed]
            if placed:
                self._coarse = self._masked(transform * Affine.scale(step, step), *self._coarse.shape, touched=True)
            if not any(
                self.inside(row, column, min(step, height - row), min(step, width - column)).any()
                for row, column in (np.argwhere(self._coarse) * step).tolist()
            ):
                what = "longitude and latitude" if area.crs == _LON_LAT else area.crs or "the scene's reference system"
                how = "holds no pixel's centre" if self._coarse.any() else "does not meet the scene"
                hint = f"its coordinates are taken as {what}"
                raise SceneError(f"the area of interest {area.source} {how}", hint=hint)

    def touches(self, top: int, left: int, bottom: int, right: int) -> bool:
        """Whether a rectangle may hold a pixel of the area."""
        rows = slice(max(top, 0) // self._step, -(-bottom // self._step))
        columns = slice(max(left, 0) // self._step, -(-right // self._step))
        return bool(self._coarse[rows, columns].any())

    def inside(self, top: int, left: int, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Which pixels of a rectangle belong to the area, ``[h, w]``."""
        if not self.touches(top, left, top + height, left + width):
            return np.zeros((height, width), bool)
        with gdal("placing the area of interest"):
            return self._masked(self._transform * Affine.translation(left, top), height, width, touched=False)

    def _masked(self, transform: Affine, height: int, width: int, *, touched: bool) -> npt.NDArray[np.bool_]:
        return np.asarray(geometry_mask(self._polygons, (height, width), transform, all_touched=touched, invert=True))


def _box(text: str) -> AreaOfInterest | None:
    """The box that four numbers describe; None where the text is something else."""
    try:
        left, bottom, right, top = numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if not all(map(math.isfinite, numbers)):
        return None
    on_globe = max(abs(left), abs(right)) <= 180 and max(abs(bottom), abs(top)) <= 90
    if on_globe and right < left and left - right > 180:
        right += 360  # as in RFC 7946: across the antimeridian
    if not (left < right and bottom < top):
        raise SceneError(
            f"the box {text} is empty",
            hint="the order is minx,miny,maxx,maxy; minx may be larger only in longitudes across the antimeridian",
        )
    sides, steps = ((left, right), (bottom, top)), range(_STEPS + 1)
    across, up = ([low + (high - low) * step / _STEPS for step in steps] for low, high in sides)
    ring = [(x, bottom) for x in across] + [(right, y) for y in up] + [(x, top) for x in reversed(across)]
    ring += [(left, y) for y in reversed(up)]
    return AreaOfInterest(text, ([ring],), _LON_LAT if on_globe else None)


def _geojson_file(path: Path) -> tuple[list[Any], str]:
    """The content of a GeoJSON file, and its reference system."""
    try:
        document = read_json(path, _MOST_BYTES)
    except ValueError as error:
        raise SceneError(f"area of interest {path} is not GeoJSON: {error}") from None
    named = document.get("crs") if isinstance(document, dict) else None
    try:
        return [document], str(named["properties"]["name"]) if named else _LON_LAT
    except (KeyError, TypeError):
        raise SceneError("the area of interest has a crs member without a name") from None


def _vector_file(path: Path) -> tuple[list[Any], str]:
    """The geometries of a file that is not GeoJSON, and their reference system."""
    try:
        import pyogrio
        import shapely
    except ImportError:
        raise MissingExtraError("pyogrio", "vector", f"an area of interest that is not GeoJSON ({path.name})") from None
    try:
        layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
        if len(layers) != 1:
            hint = f"extract one: ogr2ogr area.geojson {path} LAYER" if layers else None
            problem = f"has {len(layers)} layers with geometry: {', '.join(layers[:8])}"
            raise SceneError(f"area of interest {path} {problem}", hint=hint)
        count = pyogrio.read_info(path, layer=layers[0])["features"]
        if count > _MOST_FEATURES:
            raise SceneError(f"area of interest {path} has {count} features; at most {_MOST_FEATURES} are possible")
        meta, _, found, _ = pyogrio.raw.read(path, layer=layers[0], columns=[], force_2d=True)
        geometries = [shapely.geometry.mapping(one) for one in shapely.from_wkb(found) if one is not None]
    except SceneError:
        raise
    except (RuntimeError, ValueError, shapely.errors.ShapelyError) as error:
        raise SceneError(f"area of interest {path} is neither GeoJSON nor a file that pyogrio reads: {error}") from None
    if not meta["crs"]:
        raise SceneError(f"area of interest {path} names no reference system (a Shapefile does in its .prj)")
    return geometries, str(meta["crs"])


def _polygons_of(item: Any) -> Iterator[Polygon]:
    """The polygons of any GeoJSON object; points and lines have no pixels."""
    kind = None if item is None else item.get("type")  # a feature may have no geometry
    if kind == "Feature":
        yield from _polygons_of(item["geometry"])
    elif kind in ("FeatureCollection", "GeometryCollection"):
        for part in item["features" if kind == "FeatureCollection" else "geometries"]:
            yield from _polygons_of(part)
    elif kind in ("Polygon", "MultiPolygon"):
        # One by one: where parts of a multipolygon overlap, they would cut holes into each other.
        parts = item["coordinates"] if kind == "MultiPolygon" else [item["coordinates"]]
        yield from ([_ring(ring) for ring in part] for part in parts if part)


def _ring(points: Any) -> Ring:
    ring = [(float(point[0]), float(point[1])) for point in points]
    if len(ring) < 4 or not all(map(math.isfinite, (value for point in ring for value in point))):
        raise ValueError("a ring has at least four finite points")
    return ring


class _SeamError(SceneError):
    """An area crosses the line at which a map is cut."""


def _on_scene(area: AreaOfInterest, own: CRS, crs: CRS, sampled: tuple[list[float], list[float]]) -> list[Polygon]:
    """The polygons of an area in a scene's coordinates, on either side of the antimeridian.

    Longitude-latitude polygons are cut off far from the scene, where its projection may not be able to show them.
    """
    found = area.polygons
    if not own.is_geographic:
        found = tuple(_transformed(polygon, own, crs, area) for polygon in found)
        if not crs.is_geographic:
            return list(found)
        own = crs
    polygons = [_whole(polygon, area) for polygon in found]

    def placed(margin: float) -> list[Polygon]:
        near = _near(own, crs, sampled, margin)
        return [_transformed(piece, own, crs, area) for polygon in polygons for piece in _pieces(polygon, near)]

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
        if crs.is_geographic:  # PROJ gives longitudes within 180 degrees
            for i in range(len(x)):
                beside = ring[i][0] if own.is_geographic else x[max(i - 1, 0)]
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


def _near(own: CRS, crs: CRS, sampled: tuple[list[float], list[float]], margin: float) -> Bounds:
    """The surroundings of a scene, degrees; west and east may be beyond 180."""
    # A scene in longitudes may go on beyond 180.
    longitudes, latitudes = sampled if crs.is_geographic else warp_points(crs, own, *sampled)
    placed = [point for point in zip(longitudes, latitudes, strict=True) if all(map(math.isfinite, point))]
    if not placed:
        return -180, -90, 180, 90
    middle = placed[0][0]
    aside = [x - middle if crs.is_geographic else (x - middle + 180) % 360 - 180 for x, _ in placed]
    south, north = min(y for _, y in placed), max(y for _, y in placed)
    high = margin * (north - south)
    if not crs.is_geographic and min(aside) < -_HALF_WAY_ROUND:  # a map of the world: also its other end
        aside.append(180)
    west, east = ((1 + 2 * margin) * end(aside) for end in (min, max))
    if not crs.is_geographic:
        west, east = max(west, -_HALF_WAY_ROUND), min(east, _HALF_WAY_ROUND)
    return middle + west, max(south - high, -90), middle + east, min(north + high, 90)


def _whole(polygon: Polygon, area: AreaOfInterest) -> Polygon:
    """A polygon in the plane of longitudes and latitudes; one around a pole includes the pole."""
    rings = []
    for ring in polygon:
        if any(abs(x) > 360.001 or abs(y) > 90.001 for x, y in ring):
            x, y = max(ring, key=lambda point: max(abs(point[0]) / 360, abs(point[1]) / 90))
            raise SceneError(
                f"{x:.10g}, {y:.10g} in the area of interest {area.source} is not a longitude and latitude, which "
                "GeoJSON needs unless its crs member says otherwise",
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
                hint="if it crosses the antimeridian, split it there as GeoJSON demands, or use longitudes beyond 180",
            )
        rings.append(ring)
    return rings


def _pieces(polygon: Polygon, near: Bounds) -> Iterator[Polygon]:
    """The parts of a polygon near a scene, after any number of turns around the Earth, with a point each degree."""
    west, east = min(polygon[0])[0], max(polygon[0])[0]
    for turn in range(math.ceil((near[0] - east) / 360), math.floor((near[2] - west) / 360) + 1):
        rings = [_dense(_clipped([(x + 360 * turn, y) for x, y in ring], near)) for ring in polygon]
        if rings[0]:
            yield [ring for ring in rings if ring]


def _clipped(ring: Ring, near: Bounds) -> Ring:
    """A ring clipped to a rectangle (Sutherland and Hodgman, 1974); empty if nothing is left."""
    for axis, limit, sign in zip((0, 1, 0, 1), near, (1, 1, -1, -1), strict=True):
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
    """The ring with extra points, so that none are more than a degree apart."""
    dense = ring[:1]
    for (x0, y0), (x1, y1) in pairwise(ring):
        count = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        dense += [(x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count) for step in range(1, count + 1)]
    return dense
