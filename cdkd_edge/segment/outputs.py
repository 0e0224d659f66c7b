"""Where label maps go."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.raster.open import is_gdal_name

LABEL_MAP = "LABEL_MAP"
"""Under this key a file beside a label map says what it was made of: ``sha256:`` of the label map."""

_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""GDAL makes label maps by way of XML, which cannot hold these."""

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


def confidence_path(label_map: Path) -> Path:
    """The confidence raster that belongs to a label map."""
    return label_map.with_name(f"{label_map.stem}_confidence.tif")


def require_writable_name(path: Path) -> None:
    """Make sure that GDAL can write a file of this name.

    Raises:
        SceneError: it cannot.
    """
    if _NOT_XML.search(str(path.absolute())):
        raise SceneError(
            f"{path} has control characters or bytes that are not UTF-8 in its name, which GDAL does not take",
            hint="choose another --output",
        )


def require_file_place(*paths: Path, links: bool = False) -> None:
    """Make sure that what is in the place of an output, if anything, is a file that may be replaced.

    Args:
        paths: outputs.
        links: whether one may be a link to a file.

    Raises:
        SceneError: it is a folder, a device, a pipe or a link.
    """
    for path in paths:
        if path.is_symlink() and not (links and path.is_file()):
            raise SceneError(f"{path} is a link", hint="name what it leads to, or choose another --output")
        if path.is_dir():
            raise SceneError(f"{path} is a folder", hint="name a file in it, or a folder without .tif")
        if path.exists() and not path.is_file():
            raise SceneError(f"{path} is a device or a pipe, not a file", hint="choose another --output")
