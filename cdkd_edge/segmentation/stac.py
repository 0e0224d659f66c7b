"""The STAC Item of a label map: where and when, which classes, and how it was made.

STAC 1.1.0 with the extensions projection 2.0.0, raster 2.0.0, classification 2.0.0, file 2.1.0 and processing 1.2.0
(https://stac-extensions.github.io). The footprint is GeoJSON (RFC 7946): on WGS 84 and cut at the antimeridian.
"""

from __future__ import annotations

import json
import math
import mimetypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.transform import from_gcps

from cdkd_edge import __version__
from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.core.files import read_json, write_text
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.core.manifest import FileRecord
from cdkd_edge.graph.stac import MULTIHASH_SHA256, STAC_VERSION, class_names, extension, file_fields, href, utc_text
from cdkd_edge.raster.areas import Areas, mapped, to_wgs84
from cdkd_edge.raster.open import gdal, is_gdal_name, open_scene
from cdkd_edge.raster.styles import sidecar_path, style_path

_USED = ("projection/v2.0.0", "raster/v2.0.0", "classification/v2.0.0", "file/v2.1.0", "processing/v1.2.0")
EXTENSIONS = tuple(map(extension, _USED))
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_BAND: dict[str, Any] = {"data_type": "uint8", "nodata": NO_LABEL, "raster:sampling": "area"}
_ABOUT_CONFIDENCE = "Softmax probability of the label, not calibrated"
_CONFIDENCE = {"name": "confidence", "description": _ABOUT_CONFIDENCE, "unit": "%", **_BAND}
_ASSETS: dict[str, dict[str, Any]] = {
    "attributes": {"type": "application/xml", "title": "Class names and areas for GDAL, QGIS", "roles": ["metadata"]},
    "style": {"type": "application/xml", "title": "Names and colours for QGIS", "roles": ["metadata"]},
    "confidence": {"type": _COG, "title": "Probability of the label", "roles": ["data"], "bands": [_CONFIDENCE]},
    "vector": {"type": "application/geopackage+sqlite3", "title": "Polygons per class", "roles": ["data"]},
    "preview": {"type": "image/png", "title": "The label map over the scene", "roles": ["overview"]},
}
_POINTS_PER_SIDE = 16  # straight edges on a map grid are curves in longitude and latitude
_DIGITS = 7  # decimals of a degree: a centimetre
_FULL_TURN = 360 - 1e-6  # degrees of longitude from which a scene counts as going around the Earth

_Point = tuple[float, float]


@dataclass(frozen=True)
class When:
    """A moment or an interval, UTC."""

    start: datetime
    end: datetime | None = None
    note: str | None = None  # where the time comes from, if the user did not give it

    @property
    def fields(self) -> list[str | None]:
        """``datetime``, ``start_datetime`` and ``end_datetime`` of an Item; None: the Item does not have it."""
        if self.end is None:
            return [utc_text(self.start), None, None]
        return [None, utc_text(self.start), utc_text(self.end)]


def parse_when(text: str) -> When:
    """Read a moment or an interval ``START/END`` in ISO 8601; UTC if it has no offset, a day is its beginning."""
    moments = []
    for part in text.split("/"):
        try:
            moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", part.strip()))
        except ValueError:
            hint = "type for example 2026-05-04T10:30:00Z, or START/END"
            raise UsageError(f"{part.strip()!r} is no date and time", hint=hint) from None
        moments.append(moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment)
    if len(moments) > 2 or (len(moments) == 2 and moments[0] > moments[1]):
        raise UsageError(f"{text!r} is no interval", hint="type START/END, the earlier one first")
    return When(moments[0], moments[1] if len(moments) == 2 else None)


def _time_in_tags(scene: str | Path, label_map: Path) -> When | None:
    """When the image was taken, by its TIFF tag."""
    for path in (scene, label_map):
        try:
            with open_scene(path) as dataset:
                moment = datetime.strptime(dataset.tags().get("TIFFTAG_DATETIME", "").strip(), "%Y:%m:%d %H:%M:%S")
        except (SceneError, ValueError):  # the scene was moved away; no such time, such as 0000:00:00
            continue
        moment = moment.replace(tzinfo=timezone.utc)
        return When(moment, note="the time of the image is its TIFFTAG_DATETIME, taken as UTC")
    return None


@dataclass(frozen=True)
class Footprint:
    """The outline of a raster on Earth. Without geometry, ``note`` says why."""

    geometry: dict[str, Any] | None
    bbox: list[float] | None  # west, south, east, north, degrees; west > east where it crosses the antimeridian
    note: str | None = None


def footprint_of(dataset: Any) -> Footprint:
    """The outline of an open raster; approximate, with a note, where only ground control points place it."""
    crs, transform, note = dataset.crs, dataset.transform, None
    if crs is None and dataset.gcps[0]:
        crs, transform = dataset.gcps[1], from_gcps(dataset.gcps[0])
        note = "the footprint is approximate, from ground control points"
    if crs is None or transform.is_identity:
        return Footprint(None, None, "the scene has no place on Earth that is known")
    corners = np.array([(0, 0), (0, dataset.height), (dataset.width, dataset.height), (dataset.width, 0), (0, 0)])
    # Edges of a geographic raster are straight already; wide ones need points between to know which way round they go.
    straight = crs.is_geographic and dataset.width * math.hypot(transform.a, transform.d) * crs.units_factor[1] < 1
    points = 1 if straight else _POINTS_PER_SIDE
    pixels = np.concatenate([np.linspace(a, b, points, endpoint=False) for a, b in pairwise(corners)])
    placed = to_wgs84(crs, *mapped(transform, *pixels.T.tolist()))
    if placed is None:
        return Footprint(None, None, "the scene's coordinates have no longitude and latitude on WGS 84")
    return _footprint(*placed, note)


def _footprint(longitudes: list[float], latitudes: list[float], note: str | None) -> Footprint:
    """From the corners of an open ring, as one polygon or as the two sides of the antimeridian."""
    closed, y = np.unwrap([*longitudes, longitudes[0]], period=360), np.clip(latitudes, -90.0, 90.0)
    south, north = float(y.min()), float(y.max())
    around_pole = abs(closed[-1] - closed[0]) > 180
    if around_pole:
        south, north = (-90.0, north) if y.sum() < 0 else (south, 90.0)
        note = "the scene lies around a pole; its footprint is the cap that holds it"
    x = closed[:-1] - 360 * np.floor((closed[:-1].min() + closed[:-1].max() + 360) / 720)  # the middle in -180..180
    if around_pole or np.ptp(x) > _FULL_TURN:
        x, y = np.array([-180.0, 180.0, 180.0, -180.0]), np.array([south, south, north, north])
    parts = []
    for offset in (0, 360, -360):
        ring: list[_Point] = list(zip((x + offset).tolist(), y.tolist(), strict=True))
        for meridian, side in ((-180.0, 1), (180.0, -1)):
            ring = _clipped(ring, meridian, side)
        if len(ring) >= 3 and _signed_area(ring) != 0:
            parts.append([_geojson_ring(ring)])
    kind, coordinates = ("Polygon", parts[0]) if len(parts) == 1 else ("MultiPolygon", parts)
    west, east = float(x.min()), float(x.max())
    box = [west + 360 if west < -180 else west, south, east - 360 if east > 180 else east, north]
    return Footprint({"type": kind, "coordinates": coordinates}, [round(value, _DIGITS) for value in box], note)


def _clipped(ring: list[_Point], at: float, side: int) -> list[_Point]:
    """The part of a ring east (1) or west (-1) of a meridian (Sutherland and Hodgman, 1974)."""
    kept: list[_Point] = []
    for (x0, y0), (x1, y1) in zip([ring[-1], *ring[:-1]] if ring else [], ring, strict=True):
        inside0, inside1 = (side * (x - at) >= 0 for x in (x0, x1))
        if inside0 != inside1:
            kept.append((at, y0 + (y1 - y0) * (at - x0) / (x1 - x0)))
        if inside1:
            kept.append((x1, y1))
    return kept


def _signed_area(ring: list[_Point]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True)) / 2


def _geojson_ring(ring: list[_Point]) -> list[list[float]]:
    """Anticlockwise, closed, rounded, without repeated points."""
    points = [[round(x, _DIGITS), round(y, _DIGITS)] for x, y in (ring if _signed_area(ring) > 0 else ring[::-1])]
    points = [point for index, point in enumerate(points) if point != points[index - 1]]
    return [*points, points[0]]


def item_for(
    label_map: Path,
    scene: str | Path,
    schema: LabelSchema,
    areas: Areas,
    *,
    engine: FileRecord | None = None,
    when: When | None = None,
    assets: Mapping[str, Path] | None = None,
    created: datetime | None = None,
) -> dict[str, Any]:
    """Describe a finished label map as a STAC Item (plain data). Links are relative to the label map's folder.

    Raises SceneError if the label map cannot be read.

    Args:
        scene, schema, areas: what was labelled, the classes and what they cover.
        engine: the file that made it.
        when: the time of the image. Default: ``TIFFTAG_DATETIME`` of the scene or label map, taken as UTC; else the
            time of creation. The item says which.
        assets: further files by key: ``confidence`` (GeoTIFF), ``vector`` (GeoPackage), ``preview`` (PNG).
        created: the time of creation. Default: now.
    """
    created = (created or datetime.now(timezone.utc)).replace(microsecond=0)
    with open_scene(label_map) as dataset, gdal(f"reading {label_map}"):
        footprint = footprint_of(dataset)
        projection = _projection(dataset)
        overviews = bool(dataset.overviews(1)) or dataset.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    when = when or _time_in_tags(scene, label_map)
    when = when or When(created, note="the time of the image is unknown; this is when the map was made")
    moment, start, end = when.fields
    name = Path(str(scene)).name
    properties: dict[str, Any] = {
        "datetime": moment,
        "created": utc_text(created),
        "title": f"Land cover of {name}",
        **projection,
        "processing:software": {"cdkd-edge": __version__},
        "processing:lineage": "Semantic segmentation, tile by tile" + (f", by {engine.file}" if engine else ""),
        "cdkd-edge:scene": name,
    }
    if end is not None:
        properties.update(start_datetime=start, end_datetime=end)
    if engine is not None:
        properties |= {"cdkd-edge:engine": engine.file, "cdkd-edge:engine_sha256": engine.sha256}
    if notes := [note for note in (when.note, footprint.note, areas.reason, *areas.notes) if note]:
        properties["cdkd-edge:notes"] = notes
    labels = {
        "href": _link(label_map, label_map.parent),
        "type": _COG if overviews else "image/tiff; application=geotiff",
        "title": "Label map",
        "roles": ["data"],
        "bands": [{"name": "labels", **_BAND, "classification:classes": _classes(schema, areas)}],
        **file_fields(FileRecord.of(label_map)),
    }
    source = {"rel": "derived_from", "href": _link(scene, label_map.parent), "title": "the scene"}
    if (kind := mimetypes.guess_type(str(scene))[0]) is not None:
        source["type"] = kind  # so that nobody takes it for a STAC Item
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": list(EXTENSIONS),
        "id": label_map.stem,
        "geometry": footprint.geometry,
        **({"bbox": footprint.bbox} if footprint.bbox is not None else {}),
        "properties": properties,
        "links": [source],
        "assets": {"labels": labels, **_further_assets(label_map, assets or {})},
    }


def write_item(path: Path, item: Mapping[str, Any]) -> None:
    """Write an item as JSON; the file appears only when it is complete."""
    write_text(path, json.dumps(item, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_item(path: Path) -> dict[str, Any]:
    """Read an item that :func:`write_item` wrote; others may have added to it.

    Raises OSError or ValueError if it cannot be read or is something else.
    """
    try:
        item = read_json(path)
        ours = "cdkd-edge:scene" in item["properties"] and all(isinstance(one, dict) for one in item["assets"].values())
    except (TypeError, KeyError, AttributeError):
        ours = False
    if not ours or not label_map_of(item):
        raise ValueError("it is no STAC Item of a label map")
    return dict(item)


def label_map_of(item: Mapping[str, Any]) -> str:
    """SHA-256 of the label map that an item describes; empty if it does not say."""
    return str(item["assets"].get("labels", {}).get("file:checksum", "")).removeprefix(MULTIHASH_SHA256)


def complete_item(path: Path, label_map: Path, assets: Mapping[str, Path]) -> bool:
    """Add files to an item that does not list them, or lists older ones; the rest of the item stays.

    ``assets`` are those of :func:`item_for`. Returns whether the item was changed. Raises OSError or ValueError if it
    cannot be read or written, or is not one of a label map.
    """
    item = read_item(path)
    found = _further_assets(label_map, assets)
    keys = [key for key in assets if item["assets"].get(key, {}).get("file:checksum") != found[key]["file:checksum"]]
    if keys:
        item["assets"].update({key: one for key, one in found.items() if key in keys or key not in item["assets"]})
        write_item(path, item)
    return bool(keys)


def _further_assets(label_map: Path, assets: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The given files and, if they are there, the label map's ``.aux.xml`` and ``.qml``."""
    folder = label_map.parent
    found = {
        key: {"href": _link(path, folder), **_ASSETS[key], **file_fields(FileRecord.of(path))}
        for key, path in assets.items()
    }
    # Without checksums: GDAL and QGIS keep statistics in the one, users their own style in the other.
    for key, path in (("attributes", sidecar_path(label_map)), ("style", style_path(label_map))):
        if path.exists():
            found[key] = {"href": _link(path, folder), **_ASSETS[key]}
    return found


def _link(target: str | Path, folder: Path) -> str:
    """A link from a folder to a file, relative; GDAL's own names (URLs, ``/vsi...``) stay as they are."""
    name = str(target)
    if is_gdal_name(name):
        return name
    return href(Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder))).as_posix())


def _projection(dataset: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"proj:shape": [dataset.height, dataset.width], "proj:code": None}
    if not dataset.transform.is_identity:
        found["proj:transform"] = list(dataset.transform)[:6]
    if dataset.crs is not None:
        authority = dataset.crs.to_authority(confidence_threshold=100)
        if authority is not None:
            found["proj:code"] = ":".join(authority)
        else:
            found["proj:wkt2"] = dataset.crs.to_wkt(version="WKT2_2019")
    return found


def _classes(schema: LabelSchema, areas: Areas) -> list[dict[str, Any]]:
    total = sum(area.pixels for area in areas.classes)
    classes = [
        {
            "value": area.label,
            "name": name,
            "title": cls.name,
            "description": cls.name,
            "color_hint": "{:02X}{:02X}{:02X}".format(*cls.shown),
            "count": area.pixels,
            **({"percentage": round(100 * area.pixels / total, 6)} if total else {}),
            **({"cdkd-edge:area_ha": area.hectares} if area.hectares is not None else {}),
        }
        for name, cls, area in zip(class_names(schema.class_names), schema.classes, areas.classes, strict=True)
    ]
    # Names of classes have no underscore, so this one is not among them.
    return [*classes, {"value": NO_LABEL, "name": "no_data", "description": "no data", "nodata": True}]
