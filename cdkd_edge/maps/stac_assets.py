"""The files beside a label map as assets of its STAC Item."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cdkd_edge.files import read_json, sha256_of, write_text
from cdkd_edge.scene.merge import NO_CONFIDENCE
from cdkd_edge.scene.pam import sidecar_path
from cdkd_edge.scene.raster import is_gdal_name
from cdkd_edge.scene.style import style_path

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
