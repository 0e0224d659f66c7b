"""Label maps: uint8 GeoTIFF with palette, nodata 255, and class names where GDAL looks for them."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.io import MemoryFile

from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.open import gdal
from cdkd_edge.raster.styles import label_map_xml, sidecar_path

BLOCK = 512
"""Side of the GeoTIFF's blocks, px. Rows are written in multiples of it, so no block is written twice."""

_NO_ROOM = BLOCK * BLOCK
"""A write that failed with less room than a block, in bytes, failed for want of room."""


@functools.cache
def quick_compression() -> dict[str, Any]:
    """GDAL's options for a GeoTIFF that is soon thrown away: ZSTD where GDAL was built with it."""
    options = {"compress": "zstd", "zstd_level": 1}
    try:
        with MemoryFile() as file, gdal("trying ZSTD"):
            file.open(driver="GTiff", height=1, width=1, count=1, dtype="uint8", **options).close()
    except SceneError:
        return {"compress": "deflate", "zlevel": 1}
    return options


class LabelMapWriter:
    """Writes a label map from top to bottom; under its final name only when whole.

    Use as a context manager. On an exception inside the block nothing is left behind.

    Args:
        path: final path (``.tif``).
        height, width: px.
        schema: class names and colours; None: a raster of numbers without either.
        georeference: keyword arguments that place the raster (:attr:`.reader.SceneReader.georeference`).
        tags: provenance, stored as TIFF metadata.
        quick: compress it quickly rather than well.

    Raises:
        SceneError: GDAL cannot write the file.
        SystemRefusalError: the disk is full.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        schema: LabelSchema | None,
        georeference: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        quick: bool = False,
    ) -> None:
        self.path = path
        self.counts = np.zeros(256, np.int64)
        """Pixels per label written so far."""
        self.row_counts = np.zeros((height, len(schema) + 1 if schema else 0), np.uint32)
        """Pixels per label in each row, ``[height, K + 1]``; the last column is no label."""
        self._schema = schema
        self._width = width
        self._pending = np.empty((0, width), np.uint8)
        self._next_row = 0
        self._tags = dict(tags)
        self._profile = {
            "driver": "GTiff",
            "height": height,
            "width": width,
            "count": 1,
            "dtype": "uint8",
            "nodata": NO_LABEL,
            **(quick_compression() if quick else {"compress": "deflate"}),
            "BIGTIFF": "IF_SAFER",
            **georeference,
        }
        if min(height, width) >= BLOCK:
            self._profile.update(tiled=True, blockxsize=BLOCK, blockysize=BLOCK)

    def __enter__(self) -> LabelMapWriter:
        self._file = whole_file(self.path)
        self._temporary = temporary = self._file.__enter__()
        try:
            with gdal(f"creating {self.path}"):
                self._dataset = rasterio.open(temporary, "w", **self._profile)
                if self._schema is not None:
                    palette = self._schema.palette()
                    colors = {label: (*map(int, palette[label]), 255) for label in range(len(self._schema))}
                    self._dataset.write_colormap(1, {**colors, NO_LABEL: (0, 0, 0, 0)})
                self._dataset.update_tags(**self._tags)
        except BaseException as error:
            self._abandon(error)
            raise
        self._errors = _GdalErrors()
        return self

    def write_rows(self, labels: npt.NDArray[np.uint8]) -> None:
        """Append rows ``[h, width]`` below those written before."""
        self._count(labels)
        rows = np.concatenate([self._pending, labels]) if len(self._pending) else labels
        whole = len(rows) if self._next_row + len(rows) == self._profile["height"] else len(rows) // BLOCK * BLOCK
        self._write(rows[:whole])
        self._pending = rows[whole:].copy()

    def _count(self, labels: npt.NDArray[np.uint8]) -> None:
        if self._schema is None:
            return
        first = self._next_row + len(self._pending)
        known = (*range(len(self._schema)), NO_LABEL)
        for start in range(0, len(labels), 64):
            part = labels[start : start + 64]
            rows = self.row_counts[first + start : first + start + len(part)]
            for column, label in enumerate(known):
                rows[:, column] = (part == label).sum(axis=1, dtype=np.uint32)
                self.counts[label] += rows[:, column].sum(dtype=np.int64)
            if rows.sum(dtype=np.int64) != part.size:  # a broken engine's labels may be any number
                self.counts += np.bincount(part[~np.isin(part, known)], minlength=256)

    def _write(self, rows: npt.NDArray[np.uint8]) -> None:
        if not len(rows):
            return
        window = rasterio.windows.Window(0, self._next_row, self._width, len(rows))
        with self._writing():
            self._dataset.write(rows, 1, window=window)
        self._next_row += len(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._close(discard=error is not None)
            if error is None:
                text = self._metadata()
                if text is None:
                    self._file.__exit__(None, None, None)
                    return
                with whole_file(sidecar_path(self.path)) as sidecar:
                    sidecar.write_text(text, encoding="utf-8")
                    self._file.__exit__(None, None, None)
        except BaseException as failure:
            self._abandon(failure)
            raise
        if error is not None:
            self._abandon(error)

    def _abandon(self, error: BaseException) -> None:
        with contextlib.suppress(OSError):  # as a rule there is none
            sidecar_path(self._temporary).unlink()
        self._file.__exit__(type(error), error, error.__traceback__)

    def _metadata(self) -> str | None:
        """The sidecar's text: class names, and what GDAL could not say in GeoTIFF (an unusual CRS)."""
        extra = sidecar_path(self._temporary)
        text = None
        if extra.exists():
            text = extra.read_text(encoding="utf-8")
            extra.unlink()
        return text if self._schema is None else label_map_xml(self._schema, extra=text)

    def _close(self, *, discard: bool) -> None:
        try:
            # GDAL flushes here; a full disk may show only now, and only in its log.
            with self._writing():
                self._dataset.close()
        except (SceneError, SystemRefusalError):
            if not discard:
                raise
        finally:
            self._errors.close()
        if discard:
            return
        if self._next_row != self._profile["height"]:
            raise SceneError(f"{self.path}: {self._next_row} of {self._profile['height']} rows were written")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._errors.threads.add(threading.get_ident())
        try:
            with gdal(f"writing {self.path}"):
                yield
            if self._errors.messages:
                raise SceneError(f"writing {self.path} failed: {self._errors.messages[0]}")
        except SceneError:
            # libtiff says "write error" and prints the reason past GDAL, straight to stderr.
            if shutil.disk_usage(self.path.parent).free < _NO_ROOM:
                raise SystemRefusalError(f"writing {self.path} failed: no space left on the device") from None
            raise


class _GdalErrors(logging.Handler):
    """Collects what GDAL reports while blocks are flushed, which rasterio logs instead of raising."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []
        self.threads: set[int] = set()
        """Threads that write; what GDAL reports in others is about other files."""
        self._logger = logging.getLogger("rasterio._env")
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread in self.threads:
            self.messages.append(record.getMessage())

    def close(self) -> None:
        self._logger.removeHandler(self)
        super().close()
