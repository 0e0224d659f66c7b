"""Measures how much of the ground each class covers, in hectares.

Pixels of a geographic grid are cells between meridians and parallels on the ellipsoid of the CRS (Snyder, Map
Projections - A Working Manual, USGS Professional Paper 1395, 1987, equation 3-12); if it is rotated or sheared, the
determinant of the transform times the area per square radian at the pixel's centre. Pixels of a projected grid count as
units squared; a note says how much the projection stretches areas at the scene's centre.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.warp import transform as warp_points
from rasterio.windows import Window

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.styles import ClassArea

_M2_PER_HA = 10_000.0
_STRETCH_WORTH_A_NOTE = 0.001  # relative; a UTM zone stays within it over most of its width
_WINDOW_PX = 4 << 20  # pixels read at once


@dataclass(frozen=True)
class Areas:
    """Pixels and hectares of every class, and of pixels without data."""

    classes: tuple[ClassArea, ...]
    no_data: ClassArea
    method: str | None  # ``projected`` or ``ellipsoidal``; None if hectares are unknown
    reason: str | None  # why hectares are unknown, if they are
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ellipsoid:
    """The shape of the Earth."""

    semi_major: float  # m
    flattening: float  # 0 for a sphere

    @property
    def eccentricity2(self) -> float:
        """First eccentricity squared."""
        return self.flattening * (2 - self.flattening)

    def area_to_parallel(self, latitude: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Area from the equator to a latitude (radians, clipped at the poles), m2 per radian; negative in the south."""
        sine = np.sin(np.clip(np.asarray(latitude, np.float64), -math.pi / 2, math.pi / 2))
        squared = self.eccentricity2
        if squared <= 0:
            return self.semi_major**2 * sine
        eccentricity = math.sqrt(squared)
        # arctanh(e sin) / e is Snyder's logarithm, without its loss of digits near the equator.
        q = (1 - squared) * (sine / (1 - squared * sine**2) + np.arctanh(eccentricity * sine) / eccentricity)
        return np.asarray(self.semi_major**2 * q / 2, np.float64)

    def positions(self, longitude: npt.ArrayLike, latitude: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points ``[N, 3]``, m from the centre, of longitudes and latitudes in degrees."""
        turn, angle = np.radians(longitude), np.radians(latitude)
        normal = self.semi_major / np.sqrt(1 - self.eccentricity2 * np.sin(angle) ** 2)
        across, up = normal * np.cos(angle), normal * (1 - self.eccentricity2) * np.sin(angle)
        return np.stack([across * np.cos(turn), across * np.sin(turn), up], axis=-1)


WGS84 = Ellipsoid(6_378_137.0, 1 / 298.257223563)

_ELLIPSOID = re.compile(r'(?:SPHEROID|ELLIPSOID)\["[^"]*",\s*([-+\d.eE]+),\s*([-+\d.eE]+)')


def ellipsoid_of(crs: Any) -> Ellipsoid:
    """The ellipsoid of a CRS, from its WKT; SceneError if it names none."""
    found = _ELLIPSOID.search(crs.to_wkt())
    if found is None:
        raise SceneError("the coordinate reference system names no ellipsoid")
    semi_major, inverse = map(float, found.groups())
    return Ellipsoid(semi_major, 1 / inverse if inverse else 0.0)


@dataclass(frozen=True)
class Ground:
    """The area of a raster's pixels on the ground; known is ``pixel_m2``, or ``ellipsoid``, or neither."""

    transform: Any
    pixel_m2: float | None = None  # of a projected CRS: the same for all pixels
    ellipsoid: Ellipsoid | None = None  # of a geographic CRS
    radians: float = 0.0  # radians in a unit of a geographic CRS
    reason: str | None = None  # why neither is known
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether areas are known."""
        return self.reason is None

    @property
    def same_in_a_row(self) -> bool:
        """Whether all pixels of a row cover the same area."""
        return self.ellipsoid is None or self.transform.d == 0

    def row_areas(self, height: int) -> npt.NDArray[np.float64]:
        """Area of a pixel of each row, m2 ``[height]``; only if :attr:`same_in_a_row`."""
        if self.ellipsoid is None:
            return np.full(height, self.pixel_m2 or 0.0)
        edges = self.transform.f + self.transform.e * np.arange(height + 1)
        width = abs(self.transform.a) * self.radians
        return np.asarray(np.abs(np.diff(self.ellipsoid.area_to_parallel(edges * self.radians))) * width)

    def pixel_areas(self, row: int, left: int, count: int) -> npt.NDArray[np.float64]:
        """Areas of ``count`` pixels of a row of a geographic raster, from a column on, m2 ``[count]``."""
        assert self.ellipsoid is not None
        column = left + np.arange(count) + 0.5
        latitude = (self.transform.f + self.transform.d * column + self.transform.e * (row + 0.5)) * self.radians
        squared = self.ellipsoid.eccentricity2
        density = self.ellipsoid.semi_major**2 * (1 - squared) * np.cos(latitude)
        density /= (1 - squared * np.sin(latitude) ** 2) ** 2
        return np.asarray(np.clip(density, 0, None) * abs(self.transform.determinant) * self.radians**2)


def ground_of(dataset: Any) -> Ground:
    """The ground that the pixels of an open raster cover."""
    crs, transform = dataset.crs, dataset.transform
    if crs is None:
        has = "rational polynomials, no map grid" if dataset.tags(ns="RPC") else "no coordinate reference system"
        has = "ground control points, no map grid" if dataset.gcps[0] else has
        return Ground(transform, reason=f"the scene has {has}")
    if transform.is_identity:
        return Ground(transform, reason="the scene has no geotransform")
    if transform.determinant == 0:
        return Ground(transform, reason="the scene's geotransform is degenerate")
    if crs.is_geographic:
        try:
            return Ground(transform, ellipsoid=ellipsoid_of(crs), radians=float(crs.units_factor[1]))
        except SceneError as error:
            return Ground(transform, reason=error.message)
    if not crs.is_projected:
        return Ground(transform, reason="the coordinate reference system is neither projected nor geographic")
    ground = Ground(transform, pixel_m2=abs(transform.determinant) * float(crs.linear_units_factor[1]) ** 2)
    stretch = areal_stretch(dataset, ground)
    if stretch is None or abs(stretch - 1) < _STRETCH_WORTH_A_NOTE:
        return ground
    more = f"{abs(stretch - 1):.2%} {'more' if stretch > 1 else 'less'}"
    note = f"areas are those of the map grid; at the scene's centre it shows {more} than there is on the ground"
    return replace(ground, notes=(note,))


def areal_stretch(dataset: Any, ground: Ground) -> float | None:
    """Grid area over ground area at the centre of a projected raster; None if PROJ cannot place it."""
    placed = to_wgs84(dataset.crs, *centre_corners(dataset))
    if placed is None or ground.pixel_m2 is None:
        return None
    corner, right, below = WGS84.positions(*placed)
    area = float(np.linalg.norm(np.cross(right - corner, below - corner)))
    return float(ground.pixel_m2 / area) if area > 0 else None


def centre_corners(dataset: Any) -> tuple[list[float], list[float]]:
    """A corner near the centre, and its neighbours one pixel to the right and below, in the CRS."""
    row, column = dataset.height / 2, dataset.width / 2
    return mapped(dataset.transform, [column, column + 1, column], [row, row, row + 1])


def mapped(transform: Any, columns: Sequence[float], rows: Sequence[float]) -> tuple[list[float], list[float]]:
    """Map coordinates x and y of pixel corners."""
    t, pixels = transform, list(zip(columns, rows, strict=True))
    return [t.a * c + t.b * r + t.c for c, r in pixels], [t.d * c + t.e * r + t.f for c, r in pixels]


def to_wgs84(crs: Any, x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]] | None:
    """Longitudes and latitudes of points, degrees; None if PROJ cannot place one of them."""
    try:
        with gdal("transforming to WGS 84"):
            longitude, latitude = warp_points(crs, "EPSG:4326", list(x), list(y))
    except SceneError:
        return None
    return (longitude, latitude) if all(map(math.isfinite, [*longitude, *latitude])) else None


def class_areas(label_map: Path, schema: LabelSchema, row_counts: npt.NDArray[np.integer[Any]] | None = None) -> Areas:
    """Pixels and hectares per class of a label map, a uint8 raster of one band.

    Args:
        label_map, schema: the map and its classes.
        row_counts: pixels of each of the K classes, and of no class, in each row, ``[height, K + 1]``. Saves reading
            the map, unless pixels of one row differ in size.

    Raises:
        SceneError: the map cannot be read or holds labels that are not in the schema, or the counts do not fit it.
    """
    with open_scene(label_map) as dataset, gdal(f"reading {label_map}"):
        ground = ground_of(dataset)
        if row_counts is not None:
            _require_fit(row_counts, dataset, schema, label_map)
        if row_counts is None or not ground.same_in_a_row:
            pixels, m2 = _summed(dataset, ground, schema, label_map)
        else:
            pixels = row_counts.sum(axis=0, dtype=np.int64)
            m2 = ground.row_areas(len(row_counts)) @ row_counts.astype(np.float64)
    names = [*enumerate(schema.class_names), (NO_LABEL, "no data")]
    found = [
        ClassArea(label, name, int(count), float(area) / _M2_PER_HA if ground.known else None)
        for (label, name), count, area in zip(names, pixels, m2, strict=True)
    ]
    method = "projected" if ground.ellipsoid is None else "ellipsoidal"
    return Areas(tuple(found[:-1]), found[-1], method if ground.known else None, ground.reason, ground.notes)


def _require_fit(counts: npt.NDArray[Any], dataset: Any, schema: LabelSchema, path: Path) -> None:
    if counts.shape != (dataset.height, len(schema) + 1):
        raise SceneError(
            f"row counts of shape {counts.shape} do not fit {path}: {dataset.height} rows, {len(schema)} classes"
        )
    if (counts.sum(axis=1, dtype=np.int64) != dataset.width).any():
        raise SceneError(f"row counts do not add up to the {dataset.width} pixels of a row of {path}")


def _summed(
    dataset: Any, ground: Ground, schema: LabelSchema, path: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Pixels and m2 per class, and of no label, read from the map."""
    pixels, m2 = np.zeros(256, np.int64), np.zeros(256)
    row_areas = ground.row_areas(dataset.height) if ground.same_in_a_row else None
    for window in _windows(dataset):
        for index, labels in enumerate(dataset.read(1, window=window), window.row_off):
            count = np.bincount(labels, minlength=256)
            pixels += count
            if row_areas is not None:
                m2 += count * row_areas[index]
            else:
                m2 += np.bincount(labels, ground.pixel_areas(index, window.col_off, labels.size), 256)
    unknown = np.flatnonzero(pixels[len(schema) : NO_LABEL])
    if unknown.size:
        raise SceneError(f"{path} holds the label {len(schema) + unknown[0]}; its schema has {len(schema)} classes")
    chosen = [*range(len(schema)), NO_LABEL]
    return pixels[chosen], m2[chosen]


def _windows(dataset: Any) -> Iterator[Window]:
    """A raster along its blocks, row by row, some 4 million pixels at a time."""
    height, width = dataset.block_shapes[0]
    rows = max(height, _WINDOW_PX // dataset.width // height * height)
    columns = max(width, _WINDOW_PX // rows // width * width)
    for top in range(0, dataset.height, rows):
        for left in range(0, dataset.width, columns):
            yield Window(left, top, min(columns, dataset.width - left), min(rows, dataset.height - top))
