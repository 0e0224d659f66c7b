"""The last step: from the spool to the files a user opens, in one pass and always the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.labels import LabelSchema
from cdkd_edge.scene.areas import Areas, class_areas
from cdkd_edge.scene.cog import write_cog
from cdkd_edge.scene.merge import NO_CONFIDENCE
from cdkd_edge.scene.pyramid import Pyramid
from cdkd_edge.scene.spool import CONFIDENCE, LABELS, Spool
from cdkd_edge.scene.writer import LabelMapWriter


@dataclass(frozen=True)
class Finished:
    """A label map under its final name."""

    counts: npt.NDArray[np.int64]
    """Pixels per label, ``[256]``."""
    row_counts: npt.NDArray[np.uint32]
    """Pixels per label in each row of pixels, ``[height, K + 1]``; the last column is no label."""
    areas: Areas
    """Of the classes, on the ground."""


def finish_label_map(
    spool: Spool,
    destination: Path,
    schema: LabelSchema,
    georeference: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    folder: Path,
    confidence: Path | None = None,
) -> Finished:
    """Write what a finished spool holds. The same spool gives the same bytes.

    Args:
        spool: all rows of tiles are done.
        destination: the label map (``.tif``); class names beside it in ``.aux.xml``.
        schema: class names and colours.
        georeference: keyword arguments that place the raster.
        tags: provenance, stored as TIFF metadata.
        folder: on the same file system, for files that are not whole yet.
        confidence: where the confidence raster goes, if there is one.

    Raises:
        SceneError: GDAL cannot write, or the spool is damaged.
        SystemRefusalError, OSError: the system refused to write.
    """
    # What a killed run left there is of no use.
    work = folder / "finish"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        if confidence is not None:
            _write_confidence(spool, confidence, georeference, tags, work)
        return _write_label_map(spool, destination, schema, georeference, tags, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_label_map(
    spool: Spool,
    destination: Path,
    schema: LabelSchema,
    georeference: Mapping[str, Any],
    tags: Mapping[str, str],
    folder: Path,
) -> Finished:
    plain = folder / "label_map.tif"
    pyramid = Pyramid(folder, spool.height, spool.width)
    writer = LabelMapWriter(plain, spool.height, spool.width, schema, georeference, tags, quick=True)
    with writer, pyramid:
        for rows in spool.rows_of_blocks(LABELS):
            writer.write_rows(rows)
            pyramid.add(rows)
    areas = class_areas(plain, schema, writer.row_counts)
    # GDAL makes a Cloud-optimised GeoTIFF from a whole raster only.
    write_cog(plain, plain, schema, {}, pyramid=pyramid.paths, areas=areas.classes)
    _publish(plain, destination)
    return Finished(writer.counts, writer.row_counts, areas)


def _write_confidence(
    spool: Spool, destination: Path, georeference: Mapping[str, Any], tags: Mapping[str, str], folder: Path
) -> None:
    plain = folder / "confidence.tif"
    percent = {**tags, "UNIT": f"per cent, {NO_CONFIDENCE} where there is no label"}
    with LabelMapWriter(plain, spool.height, spool.width, None, georeference, percent) as raster:
        for rows in spool.rows_of_blocks(CONFIDENCE):
            raster.write_rows(rows)
    _publish(plain, destination)


def _publish(source: Path, destination: Path) -> None:
    """Give a file and its sidecar their final names; the file last, because it is what others look for."""
    sidecar, final = _sidecar(source), _sidecar(destination)
    if destination.is_dir():
        raise IsADirectoryError(21, os.strerror(21), str(destination))
    if sidecar.exists():
        os.replace(sidecar, final)
    else:
        final.unlink(missing_ok=True)  # of an older file; it would describe this one wrongly
    try:
        os.replace(source, destination)
    except BaseException:
        if not destination.exists():
            with contextlib.suppress(OSError):
                final.unlink()
        raise
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".aux.xml")
