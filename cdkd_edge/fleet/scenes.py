"""From the arguments of ``segment`` to scenes and label maps, before anything is read."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from cdkd_edge.errors import SceneError, SystemRefusalError
from cdkd_edge.files import read_small
from cdkd_edge.fleet.kept import is_label_map
from cdkd_edge.maps.products import NOTHING, Wanted, product_paths
from cdkd_edge.scene.find import file_key, rasters_named
from cdkd_edge.scene.outputs import label_map_paths, require_file_place
from cdkd_edge.scene.pam import sidecar_path
from cdkd_edge.scene.raster import is_gdal_name

_MOST_SCENES = 100_000
"""In a list; the report alone of so many takes 100 MB."""


def scenes_of(arguments: Sequence[str]) -> list[str]:
    """Scenes that arguments name.

    An argument is a raster; a name of GDAL's (``/vsicurl/...``, ``https://...``), which stays as it is; a folder, for
    the rasters in it; a pattern (``**`` too); or ``@LIST``, a text file with one of these a line, ``#`` for comments.
    Matches of a pattern and files of a folder are sorted and leave out what ``segment`` wrote.

    Returns:
        Paths in the order of the arguments, each file once, by its own name rather than by a link's. A path that does
        not exist is among them: that scene will fail, and no other.

    Raises:
        SceneError: a pattern or a folder gives no scene, or a list cannot be read.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for path in _named(argument):
            first = found.setdefault(file_key(path), path)
            if Path(first).is_symlink() and not Path(path).is_symlink():
                found[file_key(path)] = path  # "latest.tif" is another scene's name tomorrow
    return list(found.values())


def _named(argument: str) -> list[str]:
    if argument.startswith("@") and not Path(argument).exists():
        return [path for line in _lines(Path(argument[1:])) for path in _named_in_list(line)]
    return _named_in_list(argument)


def _named_in_list(argument: str) -> list[str]:
    # The path of a file that is gone; what to make of it is decided where it would be read.
    if not is_gdal_name(argument) and not Path(argument).exists() and not glob.has_magic(argument):
        return [argument]
    return sorted(rasters_named(argument))


def _lines(path: Path) -> list[str]:
    try:
        # File names may hold any bytes; surrogates bring them through.
        text = read_small(path).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise SceneError(f"the list {path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise SceneError(f"the list {path} is no text file", hint="a list names a scene on each line")
    lines = (line.strip() for line in text.splitlines())
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise SceneError(f"the list {path} names no scene")
    if len(named) > _MOST_SCENES:
        raise SceneError(f"the list {path} names {len(named)} scenes; a run takes {_MOST_SCENES}", hint="divide it")
    return named


def plan_outputs(
    arguments: Sequence[str],
    output: Path | None,
    folder: Path,
    products: Wanted = NOTHING,
    *,
    confidence: bool = False,
    keep_folders: bool = False,
    overwrite: bool,
) -> tuple[list[str], list[Path]]:
    """Scenes and their label maps, checked against each other.

    Args:
        arguments: as for :func:`scenes_of`.
        output, folder, keep_folders: as for :func:`~cdkd_edge.scene.outputs.label_map_paths`.
        products: what is wanted beside each label map.
        confidence: whether a raster of confidence is among it.
        overwrite: whether existing label maps are replaced.

    Returns:
        Scenes and their label maps. A scene that is the label map of another (``segment *.tif`` for the second
        time) is left out.

    Raises:
        SceneError: two scenes would get one label map, or a scene would be replaced.
        UsageError: the output is another format, or one file for several scenes.
        SystemRefusalError: the output folder is a file.
    """
    scenes = scenes_of(arguments)
    planned = label_map_paths(scenes, output, folder, keep_folders=keep_folders)
    outputs = {file_key(str(path)) for path in planned}
    pairs = [
        (scene, path)
        for scene, path in zip(scenes, planned, strict=True)
        if len(scenes) == 1 or file_key(scene) not in outputs or not is_label_map(scene)
    ]
    scenes, planned = [scene for scene, _ in pairs], [path for _, path in pairs]
    sources = {file_key(scene): scene for scene in scenes}
    for path in planned:
        _require_room(path)
        for place in (path, sidecar_path(path), *product_paths(path, products, confidence=confidence).values()):
            require_file_place(place, links=True)
            if overwrite and (scene := sources.get(file_key(str(place)))):
                raise SceneError(f"{place} would overwrite the scene {scene}", hint="choose another --output")
    return scenes, planned


def _require_room(path: Path) -> None:
    """Something that is in the way of every label map is said once, before work begins."""
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise SystemRefusalError(f"{parent} is a file, not a folder", hint="choose another --output")
