"""From an argument of a command to scenes: a file, a folder, a pattern, or a name of GDAL's."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from cdkd_edge.errors import SceneError
from cdkd_edge.scene.raster import is_gdal_name

RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg", ".vrt", ".img")
"""What a folder or a pattern is searched for. A scene that is named may be anything GDAL opens."""

_RESULTS = ("_labels.tif", "_confidence.tif", "_preview.png", "_quicklook.png")
"""Endings of what `segment` leaves beside scenes."""


def rasters_named(argument: str) -> list[str]:
    """Rasters that an argument names, in no order: itself, a folder's, or those that match a pattern (``**`` too).

    Folders are not searched below, so that masks are not taken for images. Found in folders and by patterns are
    :data:`RASTER_SUFFIXES`; not what `segment` wrote, and no files whose names begin with a dot.

    Raises:
        SceneError: it names nothing.
    """
    place = Path(argument)
    if is_gdal_name(argument) or place.is_file():
        return [argument]
    if place.is_dir():
        return _in_folder(place)
    if glob.has_magic(argument):
        # Path.glob takes no absolute patterns.
        matches = [path for path in glob.glob(argument, recursive=True) if _is_raster(Path(path))]  # noqa: PTH207
        if not matches:
            raise SceneError(f"no raster matches {argument}")
        return matches
    raise SceneError(f"scene {argument} does not exist")


def file_key(path: str) -> str:
    """The same for two names of one file; names of GDAL's are only equal to themselves."""
    return path if is_gdal_name(path) else os.path.realpath(path)  # unlike Path.resolve(), of links in a loop as well


def _in_folder(folder: Path) -> list[str]:
    rasters = [str(path) for path in folder.iterdir() if _is_raster(path)]
    if not rasters:
        below = sorted(
            str(place) for place in folder.iterdir() if place.is_dir() and any(map(_is_raster, place.iterdir()))
        )
        raise SceneError(
            f"{folder} holds no raster ({', '.join(RASTER_SUFFIXES)})",
            hint=f"there are some in {', '.join(below[:4])}" if below else None,
        )
    return rasters


def _is_raster(path: Path) -> bool:
    return (
        path.suffix.lower() in RASTER_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(_RESULTS)
        # A link to what is gone is a scene that fails, not one that is silently missing.
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    )
