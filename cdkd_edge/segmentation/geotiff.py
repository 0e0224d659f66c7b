"""Label maps as GeoTIFF: written from top to bottom, then copied into a Cloud-optimised GeoTIFF.

A label map is uint8 with a palette and nodata 255; class names are in ``<file>.aux.xml``, where GDAL looks for them.
Layout and options of the copy: https://gdal.org/en/stable/drivers/raster/cog.html.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from rasterio.io import MemoryFile
from rasterio.windows import Window

from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.open import gdal, open_scene, writing
from cdkd_edge.raster.styles import ClassArea, label_map_xml, sidecar_path

# Side of the blocks of a label map, px, and the longest side of its smallest overview. Rows are written in multiples of
# it, so that no block is written twice.
BLOCK = 512
_COUNTED_ROWS = 64  # rows whose labels are counted at once


def palette_of(schema: LabelSchema) -> dict[int, tuple[int, int, int, int]]:
    """The palette of a label map as rasterio takes it: RGBA per label; no label is transparent."""
    colors = schema.palette()[: len(schema)].tolist()
    return {label: (*color, 255) for label, color in enumerate(colors)} | {NO_LABEL: (0, 0, 0, 0)}


class LabelMapWriter:
    """Writes a label map from top to bottom; it gets its final name only when whole.

    Use as a context manager. After an exception inside the block nothing is left behind. Raises SceneError if GDAL
    cannot write the file, SystemRefusalError if the disk is full, OSError if the folder cannot be written.

    Args:
        schema: class names and colours; None: a raster of numbers without either.
        georeference: keyword arguments that place the raster (:attr:`.read.SceneReader.georeference`).
        tags: provenance, stored as TIFF metadata.
        quick: compress it quickly rather than well.
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
        # Pixels per label in each row, [height, K + 1]; the last column is no label.
        self.row_counts = np.zeros((height, len(schema) + 1 if schema else 0), np.uint32)
        self._schema, self._tags = schema, tags
        self._height, self._width = height, width
        self._pending = np.empty((0, width), np.uint8)
        self._next_row = 0
        self._profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8"}
        self._profile |= {"nodata": NO_LABEL, "compress": "deflate", "BIGTIFF": "IF_SAFER", **georeference}
        if quick:
            self._profile["zlevel"] = 1
        if min(height, width) >= BLOCK:
            self._profile.update(tiled=True, blockxsize=BLOCK, blockysize=BLOCK)

    def __enter__(self) -> LabelMapWriter:
        self._file = self._opened()
        self._file.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """The file while it is written, and what becomes of it at the end."""
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(whole_file(self.path))
            extra = sidecar_path(temporary)  # what GeoTIFF cannot hold, such as an unusual CRS
            stack.callback(extra.unlink, missing_ok=True)
            with gdal(f"creating {self.path}"):
                self._dataset = rasterio.open(temporary, "w", **self._profile)
                if self._schema is not None:
                    self._dataset.write_colormap(1, palette_of(self._schema))
                self._dataset.update_tags(**self._tags)
            try:
                yield
            except BaseException:
                with contextlib.suppress(SceneError, SystemRefusalError):
                    self._close()
                raise
            self._close()
            if self._next_row != self._height:
                raise SceneError(f"{self.path}: {self._next_row} of {self._height} rows were written")
            _write_sidecar(stack, temporary, self.path, self._schema)

    def _close(self) -> None:
        # GDAL flushes here; a full disk may show only now, and only in its log.
        with writing(f"writing {self.path}", self.path.parent):
            self._dataset.close()

    def write_rows(self, labels: npt.NDArray[np.uint8]) -> None:
        """Append rows ``[h, width]`` below those written before."""
        self._count(labels)
        rows = np.concatenate([self._pending, labels]) if len(self._pending) else labels
        ends = self._next_row + len(rows) == self._height
        whole = len(rows) if ends else len(rows) // BLOCK * BLOCK
        if whole:
            window = Window(0, self._next_row, self._width, whole)
            with writing(f"writing {self.path}", self.path.parent):
                self._dataset.write(rows[:whole], 1, window=window)
            self._next_row += whole
        self._pending = rows[whole:].copy()

    def _count(self, labels: npt.NDArray[np.uint8]) -> None:
        if self._schema is None:
            return
        first = self._next_row + len(self._pending)
        known = (*range(len(self._schema)), NO_LABEL)  # other labels, of a broken engine, are found missing later
        for start in range(0, len(labels), _COUNTED_ROWS):
            part = labels[start : start + _COUNTED_ROWS]
            rows = self.row_counts[first + start : first + start + len(part)]
            for column, label in enumerate(known):
                rows[:, column] = (part == label).sum(axis=1, dtype=np.uint32)


def _write_sidecar(
    stack: contextlib.ExitStack, written: Path, path: Path, schema: LabelSchema | None, areas: Sequence[ClassArea] = ()
) -> None:
    """Write class names, areas and what GDAL wrote beside the file ``written``; it appears when the stack is left."""
    extra = sidecar_path(written)
    text = extra.read_text(encoding="utf-8") if extra.exists() else None
    if schema is not None:
        text = label_map_xml(schema, areas, extra=text)
    if text is not None:
        stack.enter_context(whole_file(sidecar_path(path))).write_text(text, encoding="utf-8")


def write_cog(
    source: Path,
    destination: Path,
    schema: LabelSchema | None,
    tags: Mapping[str, str],
    *,
    areas: Sequence[ClassArea] = (),
    threads: int | None = None,
) -> None:
    """Copy a label map into a Cloud-optimised GeoTIFF, and write ``<destination>.aux.xml``.

    Both appear under their final names only when whole, the map last. Georeference (rotated transforms and ground
    control points too) and tags are those of the source; palette and nodata are those of the schema. Maps larger than
    512 px get overviews: of a label map, a pixel has the most frequent class of the pixels below it that have one, and
    no class only where none has (GDAL's MODE resampling leaves nodata out); of a raster of numbers, the nearest pixel.
    The same input gives the same bytes, whatever ``threads`` is (default: all processors). Raises the errors of
    :class:`LabelMapWriter`, and SceneError if the source is no label map.

    Args:
        source: uint8 raster of one band, nodata 255; tiled, or reading it costs more. ``destination`` may be the same.
        schema: class names and colours; None: a raster of numbers, and no sidecar unless GDAL needs one.
        tags: TIFF metadata in addition to the source's.
        areas: pixels and hectares per class for the attribute table.
    """
    with open_scene(source) as dataset:
        shape = dataset.height, dataset.width
        if dataset.count != 1 or dataset.dtypes[0] != "uint8":
            kinds = f"{dataset.count} band{'s' * (dataset.count != 1)} of {', '.join(sorted(set(dataset.dtypes)))}"
            raise SceneError(f"{source} is not a label map: it has {kinds}, not one of uint8")
    room = (1 << 20) + source.stat().st_size
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(whole_file(destination))
        # GDAL's own companions: an unusual CRS beside it, overviews while it works.
        for suffix in (".aux.xml", ".ovr.tmp", ".msk.ovr.tmp"):
            stack.callback(temporary.with_name(temporary.name + suffix).unlink, missing_ok=True)
        # The COG driver copies what its source says of itself; a virtual dataset can say more than the file does.
        with writing(f"writing {destination}", destination.parent, room), MemoryFile(ext=".vrt") as description:
            rasterio.shutil.copy(str(source.resolve()), description.name, driver="VRT")
            with rasterio.open(description.name, "r+") as virtual:
                virtual.nodata = NO_LABEL
                if schema is not None:
                    virtual.write_colormap(1, palette_of(schema))
                virtual.update_tags(**tags)
            rasterio.shutil.copy(
                description.name,
                str(temporary),
                driver="COG",
                COMPRESS="DEFLATE",
                PREDICTOR="NO",  # differences of class numbers mean nothing
                BLOCKSIZE=BLOCK,
                BIGTIFF="IF_SAFER",
                OVERVIEWS="NONE" if shape[1] == 1 else "IGNORE_EXISTING",  # a width of 1 cannot be halved
                OVERVIEW_RESAMPLING="NEAREST" if schema is None else "MODE",
                OVERVIEW_COMPRESS="DEFLATE",
                OVERVIEW_PREDICTOR="NO",
                NUM_THREADS=threads or "ALL_CPUS",
            )
            _require_whole(temporary, shape, destination)
        _write_sidecar(stack, temporary, destination, schema, areas)


def _require_whole(path: Path, shape: tuple[int, int], destination: Path) -> None:
    """Check the last block of the full resolution, which the driver writes last: it must lie in the file and open."""
    with rasterio.open(path) as dataset:
        row, column = ((side - 1) // BLOCK for side in shape)
        place = (dataset.get_tag_item(f"BLOCK_{one}_{column}_{row}", "TIFF", bidx=1) for one in ("OFFSET", "SIZE"))
        end = sum(int(one or 0) for one in place)  # a block without any data may be left out; then it has no place
        if (dataset.height, dataset.width) != shape or end > path.stat().st_size:
            raise SceneError(f"writing {destination} failed: the file is not whole")
        dataset.read(1, window=((shape[0] - 1, shape[0]), (shape[1] - 1, shape[1])))
