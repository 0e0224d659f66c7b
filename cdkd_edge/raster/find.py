"""Finds the scenes that an argument names: a file, a folder, a pattern, or a name that only GDAL knows."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdkd_edge.core.errors import SceneError
from cdkd_edge.raster.open import is_gdal_name

# Suffixes that count in folders and for patterns; a scene that is named itself may be anything GDAL opens.
RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg", ".vrt", ".img")
_RESULTS = ("_labels.tif", "_confidence.tif", "_preview.png", "_quicklook.png")  # `segment` writes them beside scenes


def rasters_named(argument: str) -> list[str]:
    """The rasters that an argument names, in any order: itself, those in a folder, or those that match a pattern.

    Folders in a folder are not searched, so that masks are not taken for images; patterns may hold ``**``. Only
    :data:`RASTER_SUFFIXES` count, without hidden files and the files that `segment` wrote. SceneError: nothing found.
    """
    place = Path(argument)
    if is_gdal_name(argument) or place.is_file():
        return [argument]
    if place.is_dir():
        return _in_folder(place)
    if not glob.has_magic(argument):
        raise SceneError(f"scene {argument} does not exist")
    if matches := [path for path in _matching(argument) if _is_raster(Path(path))]:
        return matches
    raise SceneError(f"no raster matches {argument}")


def scenes_named(arguments: Sequence[str]) -> list[str]:
    """Rasters that arguments name (:func:`rasters_named`): paths as they were given, sorted; the same file once."""
    found: dict[str, str] = {}
    for argument in arguments:
        for path in rasters_named(argument):
            key = file_key(path)
            found[key] = min(found.get(key, path), path)
    return sorted(found.values())


def file_key(path: str) -> str:
    """A key that is the same for two names of one file; a name that only GDAL knows is its own key."""
    return path if is_gdal_name(path) else os.path.realpath(path)  # Path.resolve() fails on links that go in circles


def _matching(pattern: str) -> Iterator[str]:
    """Paths that match a pattern; ``**`` is any folder below, each once even if links lead in circles.

    (The glob module follows such circles; Path.glob takes no absolute patterns.)
    """
    if Path(pattern).name == "**":
        pattern = f"{pattern.rstrip(os.sep)}{os.sep}*"
    before, stars, after = pattern.partition(f"**{os.sep}")
    if not stars or (before and not before.endswith(os.sep)):
        yield from glob.iglob(pattern)  # noqa: PTH207
        return
    seen: set[str] = set()
    for top in glob.iglob(before) if before else [""]:  # noqa: PTH207
        for folder, below, _ in os.walk(top or ".", followlinks=True):
            if (place := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(place)
            below[:] = sorted(name for name in below if not name.startswith("."))
            within = glob.escape(folder if top else folder[2:])
            yield from _matching(os.path.join(within, after))  # noqa: PTH118


def _in_folder(folder: Path) -> list[str]:
    if rasters := [str(path) for path in folder.iterdir() if _is_raster(path)]:
        return rasters
    below = sorted(str(place) for place in folder.iterdir() if place.is_dir() and any(map(_is_raster, place.iterdir())))
    hint = f"there are some in {', '.join(below[:4])}" if below else f"for all below it: '{folder}/**/*.tif'"
    raise SceneError(f"{folder} holds no raster ({', '.join(RASTER_SUFFIXES)})", hint=hint)


def _is_raster(path: Path) -> bool:
    return (
        path.suffix.lower() in RASTER_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(_RESULTS)
        # A broken link is a scene that fails, not one that is silently missing.
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    )
