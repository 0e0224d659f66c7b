"""Where label maps go, and what they must never replace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cdkd_edge.errors import SceneError, UsageError
from cdkd_edge.scene.partial import continues_replacing, partial_folder
from cdkd_edge.scene.raster import is_gdal_name

_OTHER_FORMATS = {".png", ".jpg", ".jpeg", ".jp2", ".img", ".vrt", ".gpkg", ".nc"}


def label_map_paths(
    scenes: Sequence[str], output: Path | None, folder: Path, *, keep_folders: bool = False
) -> list[Path]:
    """One label map per scene.

    Args:
        scenes: the rasters.
        output: a ``.tif`` for a single scene, or a directory. Default: ``folder``.
        folder: where ``<scene>_labels.tif`` goes when nothing is said.
        keep_folders: whether it goes below the folders that a scene is named with, as ``cp --parents`` does it.

    Raises:
        UsageError: ``output`` is another format, or one file for several scenes.
        SceneError: two scenes would get the same label map.
    """
    if output is not None:
        # "missing/../scene.tif" does not exist until missing/ is made on the way to it.
        output = Path(os.path.normpath(output))
        if output.suffix.lower() in _OTHER_FORMATS and not output.is_dir():
            raise UsageError(f"a label map is a .tif file, not {output.name}")
    if output is not None and output.suffix.lower() in (".tif", ".tiff"):
        if len(scenes) > 1:
            raise UsageError(f"several scenes need a directory, not the one file {output.name}")
        if keep_folders:
            raise UsageError(f"folders are kept in a directory, not in the file {output.name}")
        return [output]
    paths = [
        (output or folder) / (_folders(scene) if keep_folders else "") / f"{Path(scene).stem}_labels.tif"
        for scene in scenes
    ]
    sources: dict[Path, str] = {}
    for scene, path in zip(scenes, paths, strict=True):
        if (other := sources.setdefault(path, scene)) is not scene:
            raise SceneError(
                f"two scenes would both become {path}: {other} and {scene}",
                hint="segment them separately, with --output" if keep_folders else "give --keep-folders",
            )
    return paths


def _folders(scene: str) -> Path:
    """Those of its name, without what would lead out of the output folder; none of a name of GDAL's."""
    if is_gdal_name(scene):
        return Path()
    parts = Path(os.path.normpath(scene)).parent.parts
    return Path(*(part for part in parts if part not in (os.sep, "//", os.pardir)))


def quicklook_path(label_map: Path) -> Path:
    """The picture that belongs to a label map."""
    return label_map.with_name(f"{label_map.stem}_quicklook.png")


def confidence_path(label_map: Path) -> Path:
    """The confidence raster that belongs to a label map."""
    return label_map.with_name(f"{label_map.stem}_confidence.tif")


def spare(scenes: Sequence[str], outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Make sure that writing ``outputs`` replaces no scene, and nothing else unless it is to be replaced.

    Raises:
        SceneError: an output is a scene, a folder, or exists.
    """
    for path in outputs:
        if path.is_dir():
            raise SceneError(f"{path} is a folder", hint="name a file in it, or a folder without .tif")
        if not path.exists():
            continue
        if not overwrite and not continues_replacing(path) and not _awaits_its_label_map(path):
            raise SceneError(f"{path} exists", hint="keep it, or replace it with --overwrite")
        for scene in scenes:
            if Path(scene).exists() and path.samefile(scene):
                raise SceneError(f"{path} would overwrite the scene {scene}", hint="choose another --output")


def _awaits_its_label_map(path: Path) -> bool:
    """Whether it is the confidence raster of a run that was interrupted: finished first, and to be written again."""
    if not path.stem.endswith("_confidence"):
        return False
    stem = path.stem.removesuffix("_confidence")
    return any(partial_folder(path.with_name(stem + suffix)).is_dir() for suffix in (".tif", ".tiff"))
