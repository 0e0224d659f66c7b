"""From the spool to the files a user opens: written while the last panel is computed, always in the same order.

Whether a disk will hold what a run is going to write: told after minutes, not after hours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.core.output_kinds import CONFIDENCE, LABELS
from cdkd_edge.raster.areas import Areas, class_areas
from cdkd_edge.raster.styles import is_somebodys_own, label_map_style, sidecar_path, style_path
from cdkd_edge.segment.cog import write_cog
from cdkd_edge.segment.crop import NO_CONFIDENCE
from cdkd_edge.segment.outputs import LABEL_MAP
from cdkd_edge.segment.pyramid import Pyramid, every_other
from cdkd_edge.segment.spool import Spool
from cdkd_edge.segment.write import BLOCK, LabelMapWriter

_FINISHING = 1.5
"""Room for finishing over that of the spool: plain rasters, overviews, Cloud-optimised GeoTIFFs. Measured: 1.8, with
confidence 2.3 (81 MP of drawn labels); less here, since an alarm should be none too many."""

_LITTLE = 16 << 20
"""A need below this is not worth a word, bytes."""


class RoomWatch:
    """Compares the room that is left with the need that what is done so far lets expect, and warns once.

    Args:
        folder: where all is written; what is in it counts as written.
        warn: is told.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._warned = False

    def look(self, spool: Path, done: float) -> None:
        """Look, when a share ``done`` (0..1) of the scene is in the file ``spool``."""
        if self._warned or done <= 0:
            return
        try:
            whole = (1 + _FINISHING) * spool.stat().st_size / done
            written = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            free = shutil.disk_usage(self._folder).free
        except OSError:  # files come and go
            return
        need = whole - written
        if need < _LITTLE or need <= free:
            return
        self._warned = True
        self._warn(
            f"going on like this, {_bytes(need)} more will be written beside {self._folder}, and {_bytes(free)} are "
            "free; make room meanwhile. (On a full disk the run stops, and the same command goes on.)"
        )


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, count / 1e6):.0f} MB"


@dataclass(frozen=True)
class PlainRasters:
    """What a spool holds as plain GeoTIFFs, not yet under the names a user knows."""

    label_map: Path
    """Tiled, with palette; class names in its ``.aux.xml``."""
    confidence: Path | None
    counts: npt.NDArray[np.int64]
    """Pixels per label, ``[256]``."""
    row_counts: npt.NDArray[np.uint32]
    """Pixels per label in each row of pixels, ``[height, K + 1]``; the last column is no label."""
    pyramid: tuple[Path, ...]
    """Overviews of the label map."""
    confidence_pyramid: tuple[Path, ...] = ()
    """Overviews of the confidence raster."""


class _StoppedError(Exception):
    """The rest of the pipeline failed."""


class RasterWriting:
    """Writes plain rasters from a spool while it fills, in a thread of its own. The same labels give the same bytes.

    Use as a context manager; what is not finished when it is left is removed.

    Args:
        spool: where finished rows of tiles are.
        schema: class names and colours.
        georeference: keyword arguments that place the raster.
        tags: provenance, stored as TIFF metadata.
        folder: for a folder with the files.
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
        self._turn = threading.Condition()
        self._rows = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._folder = folder = folder / "finish"
        height, width = spool.height, spool.width
        labels = LabelMapWriter(folder / "label_map.tif", height, width, schema, georeference, tags, quick=True)
        self._writers = [(LABELS, labels, Pyramid(folder, height, width))]
        if confidence:
            percent = {**tags, "UNIT": f"per cent, {NO_CONFIDENCE} where there is no label"}
            raster = LabelMapWriter(folder / "confidence.tif", height, width, None, georeference, percent, quick=True)
            levels = Pyramid(folder, height, width, every_other, "confidence-overview")
            self._writers.append((CONFIDENCE, raster, levels))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="write")

    def __enter__(self) -> RasterWriting:
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed run left there is of no use
        self._folder.mkdir()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        self._wait_for_the_end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def advance(self, rows: int) -> None:
        """Say that the spool holds so many rows of pixels from the top.

        Raises:
            SceneError, SystemRefusalError, OSError: writing failed.
        """
        with self._turn:
            if self._error is not None:
                raise self._error
            self._rows = rows
            self._turn.notify_all()

    def result(self) -> PlainRasters:
        """Wait for the rasters, once the spool holds all rows.

        Raises:
            SceneError: GDAL cannot write, or the spool is damaged.
            SystemRefusalError, OSError: the system refused to write.
        """
        self._wait_for_the_end()
        if self._error is not None:
            raise self._error
        (_, writer, pyramid), *other = self._writers
        return PlainRasters(
            label_map=writer.path,
            confidence=other[0][1].path if other else None,
            counts=writer.counts,
            row_counts=writer.row_counts,
            pyramid=tuple(pyramid.paths),
            confidence_pyramid=tuple(other[0][2].paths) if other else (),
        )

    def _wait_for_the_end(self) -> None:
        # Not by join() alone: when Ctrl-C ends it, Python up to 3.12 takes the thread for finished, and what it writes
        # after that would stay in the folder.
        self._ended.wait()
        self._thread.join()

    def _guard(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                for _, writer, pyramid in self._writers:
                    stack.enter_context(writer)
                    stack.enter_context(pyramid)
                for top in range(0, self._spool.height, BLOCK):
                    self._wait_for(min(top + BLOCK, self._spool.height))
                    for kind, writer, pyramid in self._writers:
                        rows = self._spool.row_of_blocks(kind, top)
                        writer.write_rows(rows)
                        pyramid.add(rows)
        except _StoppedError:
            pass
        except BaseException as error:
            with self._turn:
                self._error = error
        finally:
            self._ended.set()

    def _wait_for(self, rows: int) -> None:
        with self._turn:
            while self._rows < rows and not self._stopped:
                self._turn.wait()
            if self._stopped:
                raise _StoppedError


def finish_label_map(
    plain: PlainRasters,
    destination: Path,
    schema: LabelSchema,
    confidence: Path | None = None,
    *,
    on_whole: Callable[[], None] = lambda: None,
) -> Areas:
    """Make the rasters Cloud-optimised GeoTIFFs, and give them the names a user knows.

    Args:
        plain: all of it, on the same file system.
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
    # GDAL makes one of a whole raster only.
    levels = plain.pyramid
    write_cog(plain.label_map, plain.label_map, schema, {}, overviews=bool(levels), pyramid=levels, areas=areas.classes)
    style_path(plain.label_map).write_text(label_map_style(schema), encoding="utf-8")
    if confidence is not None and plain.confidence is not None:
        levels = plain.confidence_pyramid
        made_of = {LABEL_MAP: f"sha256:{sha256_of(plain.label_map)}"}
        write_cog(plain.confidence, plain.confidence, None, made_of, overviews=bool(levels), pyramid=levels)
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
