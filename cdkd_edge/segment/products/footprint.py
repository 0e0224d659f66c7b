"""Where a raster lies on Earth, as GeoJSON (RFC 7946): longitude and latitude on WGS 84, cut at the antimeridian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rasterio.transform import from_gcps

from cdkd_edge.raster.areas import mapped, to_wgs84

_POINTS_PER_SIDE = 16
"""Straight edges of a map grid are curves in longitude and latitude."""

_DIGITS = 7
"""Of a degree: a centimetre."""

_FULL_TURN = 1e-6
"""Degrees that a scene around the Earth may lack."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Footprint:
    """A raster's outline; without geometry there is a reason."""

    geometry: dict[str, Any] | None
    bbox: list[float] | None
    """West, south, east, north, degrees; west > east where it crosses the antimeridian."""
    note: str | None = None


def footprint_of(dataset: Any) -> Footprint:
    """The outline of an open raster; approximate, and said so, where only ground control points place it."""
    crs, transform, note = dataset.crs, dataset.transform, None
    if crs is None and dataset.gcps[0]:
        crs, transform = dataset.gcps[1], from_gcps(dataset.gcps[0])
        note = "the footprint is approximate, from ground control points"
    if crs is None or transform.is_identity:
        return Footprint(None, None, "the scene has no place on Earth that is known")
    corners = [(0, 0), (0, dataset.height), (dataset.width, dataset.height), (dataset.width, 0)]
    # Straight in longitude and latitude already; wide ones need points between for the way round to be seen.
    plain = crs.is_geographic and dataset.width * math.hypot(transform.a, transform.d) * crs.units_factor[1] < 1
    steps = [0.0] if plain else [step / _POINTS_PER_SIDE for step in range(_POINTS_PER_SIDE)]
    pixels = [
        (x0 + (x1 - x0) * step, y0 + (y1 - y0) * step)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True)
        for step in steps
    ]
    placed = to_wgs84(crs, *mapped(transform, *zip(*pixels, strict=True)))
    if placed is None:
        return Footprint(None, None, "the scene's coordinates have no longitude and latitude on WGS 84")
    return _geojson(list(zip(*placed, strict=True)), note)


def _geojson(ring: list[Point], note: str | None) -> Footprint:
    """A ring of longitudes and latitudes, not closed, as a polygon or as several."""
    latitudes = [max(-90.0, min(90.0, latitude)) for _, latitude in ring]
    longitudes = _unwrapped([longitude for longitude, _ in ring])
    turn = longitudes[-1] + _step(longitudes[-1], longitudes[0]) - longitudes[0]
    if abs(turn) > 180:
        south, north = (-90.0, max(latitudes)) if sum(latitudes) < 0 else (min(latitudes), 90.0)
        return _all_round(south, north, "the scene lies around a pole; its footprint is the cap that holds it")
    # Move by whole turns until the middle lies in -180..180.
    middle = (min(longitudes) + max(longitudes)) / 2
    shift = -360.0 * math.floor((middle + 180) / 360)
    points = [(longitude + shift, latitude) for longitude, latitude in zip(longitudes, latitudes, strict=True)]
    west, east = min(x for x, _ in points), max(x for x, _ in points)
    south, north = min(latitudes), max(latitudes)
    if east - west > 360 - _FULL_TURN:
        return _all_round(south, north, note)
    parts = []
    for offset in (0.0, 360.0, -360.0):
        moved = [(x + offset, y) for x, y in points]
        clipped = _clipped(_clipped(moved, -180.0, keep_above=True), 180.0, keep_above=False)
        if len(clipped) >= 3 and abs(_area(clipped)) > 0:
            parts.append([_oriented(clipped)])
    if len(parts) == 1:
        geometry: dict[str, Any] = {"type": "Polygon", "coordinates": parts[0]}
    else:
        geometry = {"type": "MultiPolygon", "coordinates": parts}
    box = [west + 360 if west < -180 else west, south, east - 360 if east > 180 else east, north]
    return Footprint(geometry, [round(value, _DIGITS) for value in box], note)


def _all_round(south: float, north: float, note: str | None) -> Footprint:
    south, north = round(south, _DIGITS), round(north, _DIGITS)
    ring = [[-180.0, south], [180.0, south], [180.0, north], [-180.0, north], [-180.0, south]]
    return Footprint({"type": "Polygon", "coordinates": [ring]}, [-180.0, south, 180.0, north], note)


def _step(start: float, end: float) -> float:
    """The shorter way from one longitude to another."""
    return (end - start + 180) % 360 - 180


def _unwrapped(longitudes: list[float]) -> list[float]:
    """Longitudes without jumps from one to the next."""
    continuous = [longitudes[0]]
    for longitude in longitudes[1:]:
        continuous.append(continuous[-1] + _step(continuous[-1], longitude))
    return continuous


def _clipped(ring: list[Point], at: float, *, keep_above: bool) -> list[Point]:
    """The part of a ring on one side of a meridian (Sutherland and Hodgman, 1974)."""
    kept: list[Point] = []
    for (x0, y0), (x1, y1) in zip([ring[-1], *ring[:-1]] if ring else [], ring, strict=True):
        inside0, inside1 = ((x >= at) == keep_above or x == at for x in (x0, x1))
        if inside0 != inside1:
            kept.append((at, y0 + (y1 - y0) * (at - x0) / (x1 - x0)))
        if inside1:
            kept.append((x1, y1))
    return kept


def _area(ring: list[Point]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True)) / 2


def _oriented(ring: list[Point]) -> list[list[float]]:
    """Anticlockwise, closed, rounded, without repetitions."""
    points = [[round(x, _DIGITS), round(y, _DIGITS)] for x, y in (ring if _area(ring) > 0 else ring[::-1])]
    points = [point for index, point in enumerate(points) if point != points[index - 1]]
    return [*points, points[0]]
