"""A STAC Item for a label map: where and when, which classes, and how it was made.

STAC 1.1.0 with the extensions projection 2.0.0, raster 2.0.0, classification 2.0.0, file 2.1.0 and processing 1.2.0
(https://stac-extensions.github.io).

The files beside a label map as assets of its STAC Item.
"""

from __future__ import annotations

import json
import mimetypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cdkd_edge import __version__
from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.core.files import read_json, sha256_of, write_text
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.areas import Areas
from cdkd_edge.raster.open import gdal, is_gdal_name, open_scene
from cdkd_edge.raster.styles import sidecar_path, style_path
from cdkd_edge.segment.crop import NO_CONFIDENCE
from cdkd_edge.segment.products.footprint import footprint_of

COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
_MULTIHASH_SHA256 = "1220"
"""Function code and length of a SHA-256 digest (https://github.com/multiformats/multihash)."""

_ASSETS: dict[str, dict[str, Any]] = {
    "attributes": {
        "type": "application/xml",
        "title": "Class names and areas as GDAL and QGIS read them",
        "roles": ["metadata"],
    },
    "style": {"type": "application/xml", "title": "Names and colours for QGIS", "roles": ["metadata"]},
    "confidence": {
        "type": COG_TYPE,
        "title": "Probability of the label",
        "roles": ["data"],
        "bands": [
            {
                "name": "confidence",
                "description": "Softmax probability of the label, not calibrated",
                "data_type": "uint8",
                "nodata": NO_CONFIDENCE,
                "unit": "%",
                "raster:sampling": "area",
            }
        ],
    },
    "vector": {"type": "application/geopackage+sqlite3", "title": "Polygons per class", "roles": ["data"]},
    "preview": {"type": "image/png", "title": "The label map over the scene", "roles": ["overview"]},
}


def further_assets(label_map: Path, assets: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What lies beside a label map, as STAC assets.

    Args:
        label_map: the file.
        assets: others by key: ``confidence``, ``vector``, ``preview``. Its ``.aux.xml`` and ``.qml`` are found.
    """
    found = {}
    for key, path in assets.items():
        found[key] = {"href": href(path, label_map.parent), **_ASSETS[key], **file_fields(path)}
    # Without size and checksum: GDAL and QGIS keep statistics in one, users their own style in the other.
    for key, path in (("attributes", sidecar_path(label_map)), ("style", style_path(label_map))):
        if path.exists():
            found[key] = {"href": href(path, label_map.parent), **_ASSETS[key]}
    return found


def read_item(path: Path) -> dict[str, Any]:
    """An Item that :func:`write_item` wrote; others may have added to it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
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
    """SHA-256 of the label map that an Item is about; empty if it does not say so."""
    return str(item["assets"].get("labels", {}).get("file:checksum", "")).removeprefix(_MULTIHASH_SHA256)


def complete_item(path: Path, label_map: Path, assets: Mapping[str, Path]) -> bool:
    """Add assets to an item that was written before they were, or of which it knows older ones; all else in it stays.

    Args:
        path: the item.
        label_map: the file it describes.
        assets: as for :func:`further_assets`.

    Returns:
        Whether there were any.

    Raises:
        OSError: the item cannot be read or written.
        ValueError: it is no item.
    """
    item = read_item(path)
    found = further_assets(label_map, assets)
    keys = [key for key in assets if item["assets"].get(key, {}).get("file:checksum") != found[key]["file:checksum"]]
    if keys:
        item["assets"].update({key: one for key, one in found.items() if key in keys or key not in item["assets"]})
        write_item(path, item)
    return bool(keys)


def write_item(path: Path, item: Mapping[str, Any]) -> None:
    """Write an item as JSON; the file appears only when whole."""
    write_text(path, json.dumps(item, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_fields(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, by the file extension."""
    return {"file:size": path.stat().st_size, "file:checksum": _MULTIHASH_SHA256 + sha256_of(path)}


def href(target: str | Path, folder: Path) -> str:
    """A file as a link from a folder, relative; a name of GDAL's (a URL) as it is."""
    name = str(target)
    if is_gdal_name(name):
        return name
    relative = Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder))).as_posix()
    quoted = quote(relative)
    return quoted if quoted.startswith("../") else f"./{quoted}"


STAC_VERSION = "1.1.0"
_EXTENSION = "https://stac-extensions.github.io/{}/schema.json"
EXTENSIONS = tuple(
    _EXTENSION.format(name)
    for name in ("projection/v2.0.0", "raster/v2.0.0", "classification/v2.0.0", "file/v2.1.0", "processing/v1.2.0")
)
_TIFF_TIME = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)")


@dataclass(frozen=True)
class When:
    """A moment or an interval, UTC; ``note`` says where it comes from if nobody stated it."""

    start: datetime
    end: datetime | None = None
    note: str | None = None


@dataclass(frozen=True)
class Provenance:
    """What made a label map."""

    engine: str
    """File name."""
    engine_sha256: str


def parse_when(text: str) -> When:
    """A moment (ISO 8601, UTC if it has no offset; a day alone is its beginning) or an interval ``START/END``.

    Raises:
        UsageError: it is neither.
    """
    moments = []
    for part in text.split("/"):
        try:
            moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", part.strip()))
        except ValueError:
            raise UsageError(
                f"{part.strip()!r} is no date and time", hint="for example 2026-05-04T10:30:00Z, or START/END"
            ) from None
        moments.append(_utc(moment))
    if len(moments) > 2 or (len(moments) == 2 and moments[0] > moments[1]):
        raise UsageError(f"{text!r} is no interval", hint="START/END, the earlier one first")
    return When(moments[0], moments[1] if len(moments) == 2 else None)


def times_of(when: When) -> list[str | None]:
    """``datetime``, ``start_datetime`` and ``end_datetime`` of an Item; None: it has none."""
    if when.end is None:
        return [_text(when.start), None, None]
    return [None, _text(when.start), _text(when.end)]


def item_for(
    label_map: Path,
    scene: str | Path,
    schema: LabelSchema,
    areas: Areas,
    *,
    provenance: Provenance | None = None,
    when: When | None = None,
    assets: Mapping[str, Path] | None = None,
    created: datetime | None = None,
) -> dict[str, Any]:
    """The STAC Item of a finished label map, as plain data; links are relative to the label map's folder.

    Args:
        label_map: the file it describes; its SHA-256 is computed.
        scene: what was labelled.
        schema, areas: classes and what they cover.
        provenance: the engine.
        when: the time of the image. Default: ``TIFFTAG_DATETIME`` of the scene or label map (taken as UTC), else the
            time of creation; the item says which.
        assets: further files, by key: ``confidence`` (GeoTIFF), ``vector`` (GeoPackage), ``preview`` (PNG).
        created: the time of creation. Default: now.

    Raises:
        SceneError: the label map cannot be read.
    """
    created = _utc(created or datetime.now(timezone.utc)).replace(microsecond=0)
    dataset = open_scene(label_map)
    with dataset, gdal(f"reading {label_map}"):
        footprint = footprint_of(dataset)
        projection = _projection(dataset)
        band = {
            "name": "labels",
            "data_type": "uint8",
            "nodata": NO_LABEL,
            "raster:sampling": "area",
            "classification:classes": _classes(schema, areas),
        }
        overviews = bool(dataset.overviews(1)) or dataset.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    when = (
        when
        or _taken(scene, label_map)
        or When(created, note="the time of the image is unknown; this is when the map was made")
    )
    notes = [note for note in (when.note, footprint.note, areas.reason, *areas.notes) if note]
    moment, start, end = times_of(when)
    properties: dict[str, Any] = {
        "datetime": moment,
        "created": _text(created),
        "title": f"Land cover of {Path(str(scene)).name}",
        **projection,
        "processing:software": {"cdkd-edge": __version__},
        "processing:lineage": "Semantic segmentation, tile by tile"
        + (f", by {provenance.engine}" if provenance else ""),
        "cdkd-edge:scene": Path(str(scene)).name,
    }
    if end is not None:
        properties.update(start_datetime=start, end_datetime=end)
    if provenance is not None:
        properties["cdkd-edge:engine"] = provenance.engine
        properties["cdkd-edge:engine_sha256"] = provenance.engine_sha256
    if notes:
        properties["cdkd-edge:notes"] = notes
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": list(EXTENSIONS),
        "id": label_map.stem,
        "geometry": footprint.geometry,
        **({"bbox": footprint.bbox} if footprint.bbox is not None else {}),
        "properties": properties,
        "links": [_source_link(scene, label_map.parent)],
        "assets": {
            "labels": {
                "href": href(label_map, label_map.parent),
                "type": COG_TYPE if overviews else "image/tiff; application=geotiff",
                "title": "Label map",
                "roles": ["data"],
                "bands": [band],
                **file_fields(label_map),
            }
        },
    }
    item["assets"].update(further_assets(label_map, assets or {}))
    return item


def _source_link(scene: str | Path, folder: Path) -> dict[str, Any]:
    link = {"rel": "derived_from", "href": href(scene, folder), "title": "the scene"}
    kind, _ = mimetypes.guess_type(str(scene))
    return {**link, "type": kind} if kind is not None else link  # so that nobody takes it for a STAC Item


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
    used: set[str] = set()
    classes = []
    for cls, area in zip(schema.classes, areas.classes, strict=True):
        name = re.sub(r"[^0-9A-Za-z_-]+", "_", cls.name).strip("_") or f"class_{area.label}"
        if name in used:
            name = f"{name}_{area.label}"
        used.add(name)
        classes.append(
            {
                "value": area.label,
                "name": name,
                "title": cls.name,
                "description": cls.name,
                "color_hint": "{:02X}{:02X}{:02X}".format(*cls.color),
                "count": area.pixels,
                **({"percentage": round(100 * area.pixels / total, 6)} if total else {}),
                **({"cdkd-edge:area_ha": area.hectares} if area.hectares is not None else {}),
            }
        )
    no_data = {"value": NO_LABEL, "name": "no_data", "description": "no data", "nodata": True}
    if "no_data" in used:
        no_data["name"] = "no_data_255"
    return [*classes, no_data]


def _taken(scene: str | Path, label_map: Path) -> When | None:
    """When the image was taken, by its TIFF tag."""
    for path in (scene, label_map):
        try:
            with open_scene(path) as dataset:
                text = dataset.tags().get("TIFFTAG_DATETIME", "")
        except SceneError:  # moved away since
            continue
        found = _TIFF_TIME.fullmatch(text.strip())
        if found is None:
            continue
        try:
            moment = datetime(*map(int, found.groups()), tzinfo=timezone.utc)  # type: ignore[misc, arg-type]
        except ValueError:  # 0000:00:00
            continue
        return When(moment, note="the time of the image is its TIFFTAG_DATETIME, taken as UTC")
    return None


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)


def _text(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
