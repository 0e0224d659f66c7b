"""A finished label map as a Cloud-optimised GeoTIFF, by GDAL's own COG driver.

Layout and options: https://gdal.org/en/stable/drivers/raster/cog.html.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rasterio
import rasterio.shutil
from rasterio.io import MemoryFile

from cdkd_edge.core.errors import SceneError
from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.open import open_scene, writing
from cdkd_edge.raster.styles import ClassArea, label_map_xml, sidecar_path

BLOCK = 512
"""Side of the file's blocks, px; also the longest side of the smallest overview."""


def write_cog(
    source: Path,
    destination: Path,
    schema: LabelSchema | None,
    tags: Mapping[str, str],
    *,
    overviews: bool = True,
    pyramid: Sequence[Path] = (),
    areas: Sequence[ClassArea] = (),
    threads: int | None = None,
) -> None:
    """Copy a label map into a Cloud-optimised GeoTIFF, and write ``<destination>.aux.xml``.

    Both appear under their final names only when whole, the map last. Georeference (rotated transforms and ground
    control points too) and tags are those of the source; palette and nodata are those of the schema. An overview
    pixel has the most frequent class of the pixels below it that have one, and no class only where none has
    (GDAL's MODE resampling leaves nodata out). The same input gives the same bytes, whatever ``threads`` is.

    Args:
        source: uint8 label map of one band, nodata 255; tiled, or reading it costs more.
        destination: the file to write (``.tif``); may be ``source``.
        schema: class names and colours; None: a raster of numbers, and no sidecar unless GDAL needs one.
        tags: TIFF metadata in addition to the source's.
        overviews: whether to add overviews down to 512 px.
        pyramid: rasters to take them from, each half the size of the one before (:mod:`.pyramid`). Default: by GDAL.
        areas: pixels and hectares per class for the attribute table.
        threads: that compress. Default: all processors.

    Raises:
        SceneError: the source is no label map, or GDAL cannot write the file.
        SystemRefusalError: the disk is full.
        OSError: the folder cannot be written.
    """
    source, destination = Path(source), Path(destination)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(whole_file(destination))
        try:
            _copy(source, temporary, destination, schema, tags, overviews, pyramid, threads)
            extra = sidecar_path(temporary)
            text = extra.read_text(encoding="utf-8") if extra.exists() else None
            if schema is not None:
                text = label_map_xml(schema, areas, extra=text)
            if text is not None:
                stack.enter_context(whole_file(sidecar_path(destination))).write_text(text, encoding="utf-8")
        finally:
            # GDAL's own companions: an unusual CRS beside it, overviews while it works.
            for suffix in (".aux.xml", ".ovr.tmp", ".msk.ovr.tmp"):
                temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _copy(
    source: Path,
    temporary: Path,
    destination: Path,
    schema: LabelSchema | None,
    tags: Mapping[str, str],
    overviews: bool,
    pyramid: Sequence[Path],
    threads: int | None,
) -> None:
    with open_scene(source) as dataset:
        shape = _require_label_map(dataset, source)
    room = (1 << 20) + sum(path.stat().st_size for path in (source, *pyramid))
    with writing(f"writing {destination}", destination.parent, room):
        # The COG driver copies what its source says of itself; a virtual dataset can say more than the file does.
        with contextlib.ExitStack() as stack:
            description = stack.enter_context(MemoryFile(ext=".vrt"))
            rasterio.shutil.copy(str(source.resolve()), description.name, driver="VRT")
            with rasterio.open(description.name, "r+") as virtual:
                virtual.nodata = NO_LABEL
                if schema is not None:
                    virtual.write_colormap(1, colormap(schema))
                virtual.update_tags(**tags)
            copied = description.name
            if overviews and pyramid:
                text = description.read().decode("utf-8")
                copied = stack.enter_context(MemoryFile(_with_overviews(text, pyramid), ext=".vrt")).name
            rasterio.shutil.copy(
                copied,
                str(temporary),
                driver="COG",
                COMPRESS="DEFLATE",
                PREDICTOR="NO",  # differences of class numbers mean nothing
                BLOCKSIZE=BLOCK,
                BIGTIFF="IF_SAFER",
                OVERVIEWS="NONE" if not overviews else "FORCE_USE_EXISTING" if pyramid else "IGNORE_EXISTING",
                OVERVIEW_RESAMPLING="MODE" if schema is not None else "NEAREST",
                OVERVIEW_COMPRESS="DEFLATE",
                OVERVIEW_PREDICTOR="NO",
                NUM_THREADS=threads or "ALL_CPUS",
            )
        _require_whole(temporary, shape, destination)


def _with_overviews(description: str, pyramid: Sequence[Path]) -> bytes:
    """A virtual dataset's text, with overviews from other files."""
    root = ElementTree.fromstring(description)
    band = root.find("VRTRasterBand")
    assert band is not None
    for path in pyramid:
        overview = ElementTree.SubElement(band, "Overview")
        ElementTree.SubElement(overview, "SourceFilename", relativeToVRT="0").text = str(path.resolve())
        ElementTree.SubElement(overview, "SourceBand").text = "1"
    return ElementTree.tostring(root)


def colormap(schema: LabelSchema) -> dict[int, tuple[int, int, int, int]]:
    """The palette as rasterio takes it: RGBA per label, and no label transparent."""
    colors = {label: (*cls.color, 255) for label, cls in enumerate(schema.classes)}
    return {**colors, NO_LABEL: (0, 0, 0, 0)}


def _require_label_map(dataset: Any, path: Path) -> tuple[int, int]:
    if dataset.count != 1 or dataset.dtypes[0] != "uint8":
        kinds = f"{dataset.count} band{'s' * (dataset.count != 1)} of {', '.join(sorted(set(dataset.dtypes)))}"
        raise SceneError(f"{path} is not a label map: it has {kinds}, not one of uint8")
    return int(dataset.height), int(dataset.width)


def _require_whole(path: Path, shape: tuple[int, int], destination: Path) -> None:
    """The driver puts the last block of the full resolution last; it must lie within the file, and open."""
    with rasterio.open(path) as dataset:
        row, column = ((side - 1) // BLOCK for side in shape)
        place = [
            dataset.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1) or 0 for what in ("OFFSET", "SIZE")
        ]
        # A block without any data may be left out; then it has no place.
        if (dataset.height, dataset.width) != shape or sum(map(int, place)) > path.stat().st_size:
            raise SceneError(f"writing {destination} failed: the file is not whole")
        dataset.read(1, window=((shape[0] - 1, shape[0]), (shape[1] - 1, shape[1])))
