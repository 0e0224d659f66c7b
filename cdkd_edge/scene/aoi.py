"""Areas of interest: which pixels of a scene are to be labelled, from a GeoJSON file or a box of coordinates."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.features import geometry_mask
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from cdkd_edge.errors import SceneError
from cdkd_edge.scene.raster import gdal

_LON_LAT = "OGC:CRS84"
_STEPS = 64
"""Points along each side of a box, so that it stays a box of meridians and parallels in another projection."""
_COARSE = 32
"""Pixels a side of what decides whether a tile is computed at all."""
_POLYGONS = ("Polygon", "MultiPolygon")


@dataclass(frozen=True)
class AreaOfInterest:
    """Polygons in some coordinates, not yet on a scene."""

    source: str
    """As it was asked for."""
    polygons: tuple[dict[str, Any], ...]
    """GeoJSON geometries."""
    crs: str | None
    """Of their coordinates; None: longitude and latitude if they can be, else the scene's."""

    @property
    def identity(self) -> str:
        """A digest of the coordinates."""
        document = json.dumps([self.polygons, self.crs], sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()


def read_area(text: str) -> AreaOfInterest:
    """An area from what was typed: ``minx,miny,maxx,maxy`` or the name of a GeoJSON file.

    Coordinates of a file are longitude and latitude (RFC 7946) unless it has the ``crs`` member of GeoJSON 2008. Those
    of a box are longitude and latitude if all of them can be, else in the scene's reference system.

    Raises:
        SceneError: it is neither, or holds no polygon.
    """
    numbers = _numbers(text)
    if numbers is not None:
        return _box(text, numbers)
    try:
        document = json.loads(Path(text).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SceneError(
            f"area of interest {text} is no file and no box of four numbers",
            hint="minx,miny,maxx,maxy or a GeoJSON file",
        ) from None
    except (ValueError, RecursionError) as error:
        raise SceneError(f"area of interest {text} is not GeoJSON: {error}") from None
    polygons: list[dict[str, Any]] = []
    try:
        _collect(document, polygons)
        for polygon in polygons:
            _require_rings(polygon)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        raise SceneError(f"area of interest {text} is damaged GeoJSON") from None
    if not polygons:
        raise SceneError(f"area of interest {text} holds no polygon")
    return AreaOfInterest(text, tuple(polygons), _named_crs(document) or _LON_LAT)


class AreaOnScene:
    """An area of interest in the pixels of a scene: a pixel belongs to it if its centre does.

    Args:
        area: the polygons.
        crs, transform: of the scene.
        height, width: of the scene, px.

    Raises:
        SceneError: the scene has no place on Earth, or the area lies beside it.
    """

    def __init__(self, area: AreaOfInterest, crs: CRS | None, transform: Affine, height: int, width: int) -> None:
        if crs is None or transform.is_identity:
            raise SceneError(
                "an area of interest needs a scene with a reference system and a transform",
                hint="georeference it first, e.g. with gdalwarp",
            )
        self._transform, self._height, self._width = transform, height, width
        source = area.crs if area.crs is not None else (_LON_LAT if _is_lon_lat(area) else None)
        with gdal(f"placing the area of interest {area.source}"):
            self._polygons = list(area.polygons)
            if source is not None:
                try:
                    own = CRS.from_user_input(source)
                except CRSError as error:
                    raise SceneError(f"area of interest {area.source}: {error}") from None
                self._polygons = [transform_geom(own, crs, polygon) for polygon in self._polygons]
            self._coarse = self._masked(
                transform * Affine.scale(_COARSE, _COARSE), -(-height // _COARSE), -(-width // _COARSE), touched=True
            )
        if not self._coarse.any():
            raise SceneError(f"the area of interest {area.source} does not meet the scene")

    def touches(self, top: int, left: int, bottom: int, right: int) -> bool:
        """Whether a rectangle may hold a pixel of the area."""
        rows = slice(max(top, 0) // _COARSE, -(-bottom // _COARSE))
        columns = slice(max(left, 0) // _COARSE, -(-right // _COARSE))
        return bool(self._coarse[rows, columns].any())

    def inside(self, top: int, left: int, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Which pixels of a rectangle belong to the area, ``[h, w]``."""
        if not self.touches(top, left, top + height, left + width):
            return np.zeros((height, width), bool)
        place = self._transform * Affine.translation(left, top)
        with gdal("placing the area of interest"):
            return self._masked(place, height, width, touched=False)

    def _masked(self, transform: Affine, height: int, width: int, *, touched: bool) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = geometry_mask(
            self._polygons, (height, width), transform, all_touched=touched, invert=True
        )
        return mask


def _numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _box(text: str, numbers: list[float]) -> AreaOfInterest:
    left, bottom, right, top = numbers
    if not (left < right and bottom < top):
        raise SceneError(f"the box {text} is empty", hint="the order is minx,miny,maxx,maxy")
    across = [left + (right - left) * step / _STEPS for step in range(_STEPS + 1)]
    up = [bottom + (top - bottom) * step / _STEPS for step in range(_STEPS + 1)]
    ring = [[x, bottom] for x in across] + [[right, y] for y in up] + [[x, top] for x in reversed(across)]
    ring += [[left, y] for y in reversed(up)]
    return AreaOfInterest(text, ({"type": "Polygon", "coordinates": [ring]},), None)


def _is_lon_lat(area: AreaOfInterest) -> bool:
    points = [point for polygon in area.polygons for ring in polygon["coordinates"] for point in ring]
    return all(abs(x) <= 180 and abs(y) <= 90 for x, y in points)


def _collect(item: Any, polygons: list[dict[str, Any]]) -> None:
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
    elif kind in _POLYGONS and item["coordinates"]:
        polygons.append({"type": kind, "coordinates": item["coordinates"]})


def _require_rings(polygon: dict[str, Any]) -> None:
    parts = polygon["coordinates"] if polygon["type"] == "MultiPolygon" else [polygon["coordinates"]]
    for part in parts:
        for ring in part:
            if len(ring) < 4 or not all(math.isfinite(value) for point in ring for value in point[:2]):
                raise ValueError("a ring has at least four finite points")


def _named_crs(document: Any) -> str | None:
    name = document.get("crs") if isinstance(document, dict) else None
    if not name:
        return None
    try:
        return str(name["properties"]["name"])
    except (KeyError, TypeError):
        raise SceneError("the area of interest has a crs member without a name") from None
