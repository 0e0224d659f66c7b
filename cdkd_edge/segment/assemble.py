"""From the spool to the files a user opens: plain GeoTIFFs while the spool fills, then Cloud-optimised ones, published.

The files are always made in the same order, so the same labels give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.output_kinds import CONFIDENCE, LABELS
from cdkd_edge.raster.areas import Areas, class_areas
from cdkd_edge.raster.styles import is_somebodys_own, label_map_style, sidecar_path, style_path
from cdkd_edge.segment.crop import NO_CONFIDENCE
from cdkd_edge.segment.flow import ThreadGroup
from cdkd_edge.segment.geotiff import BLOCK, LabelMapWriter, write_cog
from cdkd_edge.segment.outputs import LABEL_MAP
from cdkd_edge.segment.spool import Spool


@dataclass(frozen=True)
class PlainRasters:
    """The content of a spool as plain GeoTIFFs, not yet under the names a user knows."""

    label_map: Path
    """Tiled, with palette; class names in its ``.aux.xml``."""
    confidence: Path | None
    counts: npt.NDArray[np.int64]
    """Pixels per label, ``[256]``."""
    row_counts: npt.NDArray[np.uint32]
    """Pixels per label in each row of pixels, ``[height, K + 1]``; the last column is no label."""


class RasterAssembler:
    """Writes plain rasters from a spool while it fills, in a thread of its own.

    Use as a context manager; the rasters are removed when it is left.

    Args:
        spool: where finished rows of tiles are.
        schema: class names and colours.
        georeference: keyword arguments that place the raster.
        tags: provenance, stored as TIFF metadata.
        folder: where to make a folder ``finish`` with the files.
        confidence: whether the spool holds confidence too.
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
        self._spool = spool
        self._folder = folder = folder / "finish"
        self._threads = ThreadGroup()
        self._rows = 0
        shape = spool.height, spool.width
        self._writers = {
            LABELS: LabelMapWriter(folder / "label_map.tif", *shape, schema, georeference, tags, quick=True)
        }
        if confidence:
            tags = {**tags, "UNIT": f"per cent, {NO_CONFIDENCE} where there is no label"}
            self._writers[CONFIDENCE] = LabelMapWriter(
                folder / "confidence.tif", *shape, None, georeference, tags, quick=True
            )

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
        """Say that the spool holds so many rows of pixels from the top.

        Raises:
            SceneError, SystemRefusalError, OSError: writing failed.
        """
        with self._threads.turn:
            self._threads.raise_error()
            self._rows = rows
            self._threads.turn.notify_all()

    def result(self) -> PlainRasters:
        """Wait for the rasters, once the spool holds all rows.

        Raises:
            SceneError: GDAL cannot write, or the spool is damaged.
            SystemRefusalError, OSError: the system refused to write.
        """
        self._threads.join()
        self._threads.raise_error()
        labels = self._writers[LABELS]
        confidence = self._writers[CONFIDENCE].path if CONFIDENCE in self._writers else None
        return PlainRasters(labels.path, confidence, labels.counts, labels.row_counts)

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


def publish(
    plain: PlainRasters,
    destination: Path,
    schema: LabelSchema,
    confidence: Path | None = None,
    *,
    on_whole: Callable[[], None] = lambda: None,
) -> Areas:
    """Make the rasters Cloud-optimised GeoTIFFs, and give them the names a user knows.

    Args:
        plain: the rasters, on the same file system.
        destination: the label map (``.tif``); beside it class names and areas in ``.aux.xml``, and a style for QGIS.
        schema: its classes.
        confidence: where the confidence raster goes, if there is one.
        on_whole: called when all is written and nothing has its final name yet.

    Returns:
        Pixels and hectares of the classes.

    Raises:
        SceneError: GDAL cannot write.
        SystemRefusalError, OSError: the system refused.
    """
    areas = class_areas(plain.label_map, schema, plain.row_counts)
    write_cog(plain.label_map, plain.label_map, schema, {}, areas=areas.classes)
    style_path(plain.label_map).write_text(label_map_style(schema), encoding="utf-8")
    if confidence is not None and plain.confidence is not None:
        made_of = {LABEL_MAP: f"sha256:{sha256_of(plain.label_map)}"}
        write_cog(plain.confidence, plain.confidence, None, made_of)
    on_whole()
    if confidence is not None and plain.confidence is not None:
        _publish(plain.confidence, confidence, sidecar_path)
    if is_somebodys_own(style_path(destination), schema):
        _publish(plain.label_map, destination, sidecar_path)
    else:
        _publish(plain.label_map, destination, sidecar_path, style_path)
    return areas


def _publish(source: Path, destination: Path, *companions: Callable[[Path], Path]) -> None:
    """Give a file and what lies beside it their final names; the file last, because it is what others look for."""
    if destination.is_dir():
        raise IsADirectoryError(21, os.strerror(21), str(destination))
    for place in companions:
        if place(source).exists():
            os.replace(place(source), place(destination))
        else:
            place(destination).unlink(missing_ok=True)  # of an older file; it would describe this one wrongly
    for suffix in (".ovr", ".msk"):  # so would overviews that somebody had GDAL or QGIS make of it
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
