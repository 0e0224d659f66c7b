"""Pictures that are stored turned or mirrored, and say so by their EXIF orientation.

Viewers and annotation tools show them upright, and masks are drawn on what was shown. GDAL gives pixels as stored.
"""

from __future__ import annotations

import io
import os
import struct
from typing import Any, BinaryIO

from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.vrt import WarpedVRT

_ON_ITS_SIDE = 5
"""From this orientation on, rows are stored as columns."""
_CACHE_BYTES = 384 << 20
_ROOM = 32 << 20
_TAG = 274
_EXIF_BYTES = 1 << 16
_CHUNKS = 1 << 16
"""A PNG may have its EXIF behind the pixels, which may be many chunks."""


class Upright(WarpedVRT):  # type: ignore[misc]
    """A picture as its EXIF orientation (2 to 8) wants it seen, pixel for pixel.

    GDAL turns it window by window. What is on its side is read across the rows in which it is stored, and a JPEG or PNG
    is decoded from its beginning each time, unless all of it stays in GDAL's cache: up to :data:`_CACHE_BYTES` it does.
    """

    def __init__(self, stored: Any, orientation: int) -> None:
        width, height = stored.width, stored.height
        across, down = (width, height) if orientation < _ON_ITS_SIDE else (height, width)
        place = {
            2: Affine(-1, 0, width, 0, 1, 0),
            3: Affine(-1, 0, width, 0, -1, height),
            4: Affine(1, 0, 0, 0, -1, height),
            5: Affine(0, 1, 0, 1, 0, 0),
            6: Affine(0, -1, height, 1, 0, 0),
            7: Affine(0, -1, height, -1, 0, width),
            8: Affine(0, 1, 0, -1, 0, width),
        }[orientation]
        if orientation > 2 and stored.driver != "GTiff" and "GDAL_CACHEMAX" not in os.environ:
            cache = min(width * height * stored.count + _ROOM, _CACHE_BYTES)
            set_gdal_config("GDAL_CACHEMAX", max(int(get_gdal_config("GDAL_CACHEMAX")), cache))
        masked = any(MaskFlags.per_dataset in flags for flags in stored.mask_flag_enums)
        super().__init__(
            stored,
            src_transform=place,
            transform=Affine.identity(),
            width=across,
            height=down,
            add_alpha=masked and ColorInterp.alpha not in stored.colorinterp,
        )
        self.stored_driver = stored.driver
        self.note = f"turned upright, as its EXIF orientation ({orientation}) says and viewers show it"


def orientation_of(dataset: Any, name: str) -> int:
    """The EXIF orientation of a raster, 1 (upright) where it has none or has a place on Earth, which then decides.

    GDAL tells that of a JPEG, wherever it lies; TIFF, PNG and WebP are looked into if they are local files.
    """
    if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0] or dataset.tags(ns="RPC"):
        return 1
    try:
        if dataset.driver == "JPEG":
            found = int(dataset.tags().get("EXIF_Orientation", "1").split()[0])
        elif dataset.driver in ("GTiff", "PNG", "WEBP"):
            with open(name, "rb") as file:
                found = _in_tiff(file if dataset.driver == "GTiff" else io.BytesIO(_exif_chunk(file)))
        else:
            return 1
    except (OSError, ValueError, LookupError, OverflowError, struct.error):
        return 1
    return found if 1 <= found <= 8 else 1


def _exif_chunk(file: BinaryIO) -> bytes:
    """What a PNG or a WebP keeps as EXIF; empty where there is none."""
    png = file.read(4) == b"\x89PNG"
    file.seek(8 if png else 12)
    for _ in range(_CHUNKS):
        size, kind = struct.unpack(">I4s", file.read(8)) if png else struct.unpack("<4sI", file.read(8))[::-1]
        if kind in (b"eXIf", b"EXIF"):
            return file.read(min(size, _EXIF_BYTES)).removeprefix(b"Exif\0\0")
        file.seek(size + (4 if png else size % 2), os.SEEK_CUR)
    return b""


def _in_tiff(file: BinaryIO) -> int:
    """The orientation in the first directory of a TIFF or BigTIFF, which EXIF is as well."""
    order = {b"II": "<", b"MM": ">"}[file.read(2)]
    big = struct.unpack(f"{order}H", file.read(2))[0] == 43
    if big:
        file.seek(4, os.SEEK_CUR)
    file.seek(struct.unpack(f"{order}{'Q' if big else 'I'}", file.read(8 if big else 4))[0])
    entries = struct.unpack(f"{order}{'Q' if big else 'H'}", file.read(8 if big else 2))[0]
    for _ in range(min(entries, 1 << 12)):
        entry = file.read(20 if big else 12)
        tag, kind = struct.unpack(f"{order}HH", entry[:4])
        if tag == _TAG:
            value = entry[12 if big else 8 :]
            return int(struct.unpack(f"{order}{'H' if kind == 3 else 'I'}", value[: 2 if kind == 3 else 4])[0])
    return 1
