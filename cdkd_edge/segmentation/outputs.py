"""The files that a user gets: their names, how they are made from the spool, and how they get their final names.

Plain GeoTIFFs are written while the spool fills, then copied into Cloud-optimised ones, which are published when all of
them are whole. The files are always made in the same order, so the same labels give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.errors import SceneError, UsageError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.manifest import CONFIDENCE, LABELS
from cdkd_edge.raster.areas import Areas, class_areas
from cdkd_edge.raster.open import is_gdal_name
from cdkd_edge.raster.styles import is_users_style, label_map_style, sidecar_path, style_path
from cdkd_edge.segmentation.flow import ThreadGroup
from cdkd_edge.segmentation.geotiff import BLOCK, LabelMapWriter, write_cog
from cdkd_edge.segmentation.merge import NO_CONFIDENCE
from cdkd_edge.segmentation.spool import Spool

# The tag of a file beside a label map that names the label map it was made of: "sha256:" and the hash.
LABEL_MAP = "LABEL_MAP"
# Characters that XML cannot hold; GDAL copies label maps by way of XML.
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_OTHER_FORMATS = {".png", ".jpg", ".jpeg", ".jp2", ".img", ".vrt", ".gpkg", ".nc"}


def label_map_paths(
    scenes: Sequence[str], output: Path | None, folder: Path, *, keep_folders: bool = False
) -> list[Path]:
    """The path of the label map of each scene.

    Raises UsageError if ``output`` is another format or one file for several scenes, SceneError if two scenes would get
    the same label map.

    Args:
        scenes: the rasters.
        output: a ``.tif`` for a single scene, or a directory. Default: ``folder``.
        folder: where ``<scene>_labels.tif`` goes by default.
        keep_folders: keep the folders in a scene's name below the output directory, as ``cp --parents`` does.
    """
    if output is not None:
        # "missing/../scene.tif" does not exist until missing/ is made on the way to it.
        output = Path(os.path.normpath(output))
        if output.suffix.lower() in _OTHER_FORMATS and not output.is_dir():
            raise UsageError(f"a label map is a .tif file; --output is {output}")
    if output is not None and output.suffix.lower() in (".tif", ".tiff"):
        if len(scenes) > 1:
            raise UsageError(f"--output {output} is one file for {len(scenes)} scenes; name a directory")
        if keep_folders:
            raise UsageError(f"--keep-folders needs a directory as --output, not the file {output}")
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
    """The folders in a scene's name, without what would lead out of the output folder; none of a GDAL name."""
    if is_gdal_name(scene):
        return Path()
    parts = Path(os.path.normpath(scene)).parent.parts
    return Path(*(part for part in parts if part not in (os.sep, "//", os.pardir)))


def confidence_path(label_map: Path) -> Path:
    """The confidence raster that belongs to a label map."""
    return label_map.with_name(f"{label_map.stem}_confidence.tif")


def require_gdal_name(path: Path) -> None:
    """Raise :class:`SceneError` if GDAL cannot write a file of this name."""
    if _NOT_XML.search(str(path.absolute())):
        raise SceneError(
            f"GDAL cannot write {path}: control characters, or bytes that are not UTF-8, are in its name",
            hint="choose another --output",
        )


def require_file_place(*paths: Path, links: bool = False) -> None:
    """Raise :class:`SceneError` if an output would replace a folder, a device, a pipe or (unless ``links``) a link."""
    for path in paths:
        if path.is_symlink() and not (links and path.is_file()):
            raise SceneError(f"{path} is a link", hint="name the file it leads to, or choose another --output")
        if path.is_dir():
            raise SceneError(f"{path} is a folder", hint="name a file in it, or a folder without .tif in its name")
        if path.exists() and not path.is_file():
            raise SceneError(f"{path} is a device or a pipe, not a file", hint="choose another --output")


class RasterAssembler:
    """Writes plain GeoTIFFs from a spool while it fills, in a thread of its own, and publishes them.

    Use as a context manager; what is not published is removed when it is left. ``georeference`` and ``tags`` are those
    of :class:`.geotiff.LabelMapWriter`; the files go into ``folder/finish``.
    """

    def __init__(
        self,
        spool: Spool,
        schema: LabelSchema,
        georeference: Mapping[str, Any],
        tags: Mapping[str, str],
        folder: Path,
        *,
        confidence: bool,
    ) -> None:
        self._spool, self._schema = spool, schema
        self._folder = folder / "finish"
        self._threads = ThreadGroup()
        self._rows = 0
        self._writers = {LABELS: self._writer("label_map.tif", schema, georeference, tags)}
        if confidence:
            tags = {**tags, "UNIT": f"per cent, {NO_CONFIDENCE} where there is no label"}
            self._writers[CONFIDENCE] = self._writer("confidence.tif", None, georeference, tags)

    def _writer(
        self, name: str, schema: LabelSchema | None, georeference: Mapping[str, Any], tags: Mapping[str, str]
    ) -> LabelMapWriter:
        shape = self._spool.height, self._spool.width
        return LabelMapWriter(self._folder / name, *shape, schema, georeference, tags, quick=True)

    def __enter__(self) -> RasterAssembler:
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        self._folder.mkdir()
        self._threads.start("write", self._write)
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.stop()
        self._threads.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def advance(self, rows: int) -> None:
        """Say that the spool holds so many rows of pixels from the top; raises the error if writing failed."""
        with self._threads.turn:
            self._threads.raise_error()
            self._rows = rows
            self._threads.turn.notify_all()

    @property
    def row_counts(self) -> npt.NDArray[np.uint32]:
        """Pixels per label in each row, see :attr:`.geotiff.LabelMapWriter.row_counts`."""
        return self._writers[LABELS].row_counts

    def publish(self, destination: Path, confidence: Path | None, on_whole: Callable[[], None]) -> Areas:
        """Once the spool holds all rows, make Cloud-optimised GeoTIFFs and give them the names a user knows.

        ``destination`` is the label map (``.tif``), with class names and areas in ``.aux.xml`` and a style for QGIS
        beside it; ``on_whole`` is called when all is written and nothing has its final name yet. Returns pixels and
        hectares of the classes. Raises SceneError if GDAL cannot write or the spool is damaged, otherwise what the
        system refused.
        """
        self._threads.join()
        self._threads.raise_error()
        label_map = self._writers[LABELS].path
        areas = class_areas(label_map, self._schema, self.row_counts)
        write_cog(label_map, label_map, self._schema, {}, areas=areas.classes)
        style_path(label_map).write_text(label_map_style(self._schema), encoding="utf-8")
        if confidence is not None:
            raster = self._writers[CONFIDENCE].path
            write_cog(raster, raster, None, {LABEL_MAP: f"sha256:{sha256_of(label_map)}"})
        on_whole()
        if confidence is not None:
            _publish(raster, confidence, sidecar_path)
        style = [] if is_users_style(style_path(destination), self._schema) else [style_path]
        _publish(label_map, destination, sidecar_path, *style)
        return areas

    def _write(self) -> None:
        height = self._spool.height
        with contextlib.ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            for top in range(0, height, BLOCK):
                self._wait_for(min(top + BLOCK, height))
                for kind, writer in self._writers.items():
                    writer.write_rows(self._spool.row_of_blocks(kind, top))

    def _wait_for(self, rows: int) -> None:
        with self._threads.turn:
            self._threads.wait_until(lambda: self._rows >= rows)


def _publish(source: Path, destination: Path, *companions: Callable[[Path], Path]) -> None:
    """Give a file and its companions their final names; the file last, because other programs wait for it."""
    if destination.is_dir():
        raise IsADirectoryError(21, os.strerror(21), str(destination))
    for place in companions:
        if place(source).exists():
            os.replace(place(source), place(destination))
        else:
            place(destination).unlink(missing_ok=True)  # it belongs to an older file
    for suffix in (".ovr", ".msk"):  # so do overviews that GDAL or QGIS made of the older file
        destination.with_name(destination.name + suffix).unlink(missing_ok=True)
    try:
        os.replace(source, destination)
    except BaseException:
        if not destination.exists():
            for place in companions:
                with contextlib.suppress(OSError):
                    place(destination).unlink()
        raise
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
