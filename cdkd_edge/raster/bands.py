"""Finds red, green and blue among a file's bands, and the pixels that have data; turns pictures upright.

A picture may be stored turned or mirrored, with an EXIF orientation that says so. Viewers and annotation tools show it
upright, and masks are drawn on what they show. GDAL gives pixels as stored.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.vrt import WarpedVRT

from cdkd_edge.core.errors import SceneError

Bands = tuple[int, int, int]

_RGB = ("red", "green", "blue")
_NAMES = (*_RGB, "nir")  # known band names (GDAL's descriptions); B4, say, is another colour on each satellite
_NOTHING_SAID = ("undefined", "gray", "alpha")  # GDAL tags the first band of a file without tags gray
_SHOWN = 8


def choose_bands(dataset: Any, path: object, asked: Sequence[int] | None) -> tuple[Bands, str | None]:
    """Choose red, green and blue, 1-based, and a note on how (None if the first three are tagged so).

    The first of these decides: ``asked``; colour tags and band names; three untagged bands are red, green, blue, and
    four are blue, green, red, near infrared, as in the original project. Bands tagged alpha do not count.

    Raises:
        SceneError: the file has no usable bands, or does not tell which they are.
    """
    count = dataset.count
    if count == 0 and dataset.subdatasets:
        hint = f"name one, e.g. {dataset.subdatasets[0]}"
        raise SceneError(f"{path} holds no bands of its own, only subdatasets", hint=hint)
    if count == 0:
        raise SceneError(f"{path} holds no bands")
    if asked is not None:
        if len(asked) != 3 or not all(1 <= band <= count for band in asked):
            shown = ",".join(map(str, asked))
            raise SceneError(f"{path} has bands 1..{count}; --bands {shown} does not name three of them")
        _require_real(dataset, path, asked)
        return (asked[0], asked[1], asked[2]), None
    _require_real(dataset, path, range(1, count + 1))
    tags, names = _tags(dataset), _names(dataset)
    if any(name in _NAMES and tag in _NAMES and name != tag for tag, name in zip(tags, names, strict=True)):
        choices = [f"--bands {','.join(map(str, found))}" for found in map(_first_of_each, (names, tags)) if found]
        raise SceneError(
            f"{path}: the bands are named {_listed(names)}, and tagged {_listed(tags)}",
            hint=f"say which is right: {' or '.join(choices) or '--bands RED,GREEN,BLUE'}",
        )
    known = [name if tag in _NOTHING_SAID and name in _NAMES else tag for tag, name in zip(tags, names, strict=True)]
    if found := _first_of_each(known):
        several = ", the first of several" if any(known.count(color) > 1 for color in _RGB) else ""
        if found == (1, 2, 3) and tags[:3] == list(_RGB) and not several:
            return found, None
        how = "tagged" if _first_of_each(tags) else "named"
        return found, f"bands {','.join(map(str, found))} are {how} red, green, blue{several}"
    plain = [band for band, color in enumerate(known, 1) if color != "alpha"]
    if any(color not in _NOTHING_SAID for color in known):
        _refuse(path, known, dataset)
    called = f" ({', '.join(names)})" if all(names) else ""
    if len(plain) == 3:
        how = f"bands {','.join(map(str, plain))} without color tags{called} taken as red, green, blue"
        return (plain[0], plain[1], plain[2]), f"{how} (else: --bands)"
    if len(plain) == 4:
        how = f"4 bands without color tags{called} taken as B, G, R, NIR, as upstream does"
        return (plain[2], plain[1], plain[0]), f"{how} (else: --bands)"
    raise SceneError(
        f"{path} has {count} band{'s' if count > 1 else ''}{called} and no color tags; red, green, blue are needed",
        hint="say which they are, e.g. --bands 3,2,1" if len(plain) > 3 else "a grey image works with --bands 1,1,1",
    )


class Validity:
    """Tells which pixels of an open raster have data, of the used bands (1-based).

    A pixel has no data if all used bands with a nodata value hold nodata, if the file's mask leaves it out, or if it is
    fully transparent in any band tagged alpha. Other bands do not count: an infrared value of 0 is dark. (GDAL's own
    mask, and rasterio's, ask all bands for nodata, and take alpha only as the last of two or four, and not of floats.)
    """

    def __init__(self, dataset: Any, bands: Sequence[int]) -> None:
        flags, unmasked = dataset.mask_flag_enums, {MaskFlags.all_valid, MaskFlags.alpha}
        self.masked = [band for band in sorted(set(bands)) if not unmasked & set(flags[band - 1])]  # nodata or a mask
        if self.masked and MaskFlags.per_dataset in flags[self.masked[0] - 1]:
            self.masked = self.masked[:1]
        tags, names = _tags(dataset), _names(dataset)
        others = [band for band in range(1, dataset.count + 1) if band not in bands]
        self.alpha = [band for band in others if tags[band - 1] == "alpha" and names[band - 1] not in _NAMES]

    def __bool__(self) -> bool:
        return bool(self.masked or self.alpha)

    def read(self, dataset: Any, **where: Any) -> npt.NDArray[np.bool_] | None:
        """Validity of a part of the raster (rasterio's ``window``, ``out_shape``), ``[h, w]``; None: all is valid."""
        valid: npt.NDArray[np.bool_] | None = None
        for band in self.masked:
            mask = dataset.read_masks(band, **where) != 0
            valid = mask if valid is None else np.logical_or(valid, mask, out=valid)
        for band in self.alpha:
            opaque = dataset.read(band, **where) > 0
            valid = opaque if valid is None else np.logical_and(valid, opaque, out=valid)
        return valid


def _tags(dataset: Any) -> list[str]:
    return [color.name for color in dataset.colorinterp]


def _names(dataset: Any) -> list[str]:
    return [(name or "").strip().lower() for name in dataset.descriptions]


def _first_of_each(colors: Sequence[str]) -> Bands | None:
    if not all(color in colors for color in _RGB):
        return None
    return colors.index("red") + 1, colors.index("green") + 1, colors.index("blue") + 1


def _listed(colors: Sequence[str]) -> str:
    shown = [f"{band} {color or '-'}" for band, color in enumerate(colors[:_SHOWN], 1)]
    return ", ".join(shown) + (", ..." if len(colors) > _SHOWN else "")


def _refuse(path: object, known: Sequence[str], dataset: Any) -> None:
    """Raise the error for a file whose known bands are not red, green and blue."""
    if ColorInterp.palette in dataset.colorinterp:
        raise SceneError(f"{path} is a paletted image", hint="expand it: gdal_translate -expand rgb IN OUT")
    missing = [color for color in _RGB if color not in known]
    if len(known) < 3:
        hint = "a grey image works with --bands 1,1,1"
    elif len(known) == 3:
        hint = "--bands 1,2,3 takes them as they lie"
    else:
        there = {color: known.index(color) + 1 for color in _RGB if color in known}
        rest = iter([band for band, color in enumerate(known, 1) if color in _NOTHING_SAID] or [1, 2, 3])
        guess = [str(there.get(color) or next(rest, 1)) for color in _RGB]
        hint = f"say which bands to take for them, e.g. --bands {','.join(guess)}"
    raise SceneError(f"{path} has no band tagged {' or '.join(missing)}; it has {_listed(known)}", hint=hint)


def _require_real(dataset: Any, path: object, bands: Sequence[int]) -> None:
    if any(dataset.dtypes[band - 1].startswith("complex") for band in bands):  # also complex_int16, unknown to NumPy
        raise SceneError(f"{path} holds complex values, not an image")


_ON_ITS_SIDE = 5  # the first orientation in which rows are stored as columns
_CACHE_BYTES, _ROOM = 384 << 20, 32 << 20
_TAG = 274  # of the orientation
_EXIF_BYTES = 1 << 16
_CHUNKS = 1 << 16  # a PNG may have its EXIF behind the pixels, which may be many chunks


class Upright(WarpedVRT):  # type: ignore[misc]
    """A picture turned as its EXIF orientation (2 to 8) says, pixel for pixel.

    GDAL turns it window by window. A picture on its side is read across its stored rows, so a JPEG or PNG would be
    decoded from its beginning each time; up to :data:`_CACHE_BYTES`, GDAL's cache therefore keeps all of it.
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
        alpha = masked and ColorInterp.alpha not in stored.colorinterp
        there = {"src_transform": place, "transform": Affine.identity(), "width": across, "height": down}
        super().__init__(stored, add_alpha=alpha, **there)
        self.stored_driver = stored.driver
        self.note = f"turned upright, as its EXIF orientation ({orientation}) says and viewers show it"


def orientation_of(dataset: Any, name: str) -> int:
    """The EXIF orientation of a raster; 1 (upright) if it has none, or has a place on Earth, which counts more.

    GDAL tells it for any JPEG; TIFF, PNG and WebP are searched if they are local files or parts of one.
    """
    if dataset.crs is not None or not dataset.transform.is_identity or dataset.gcps[0] or dataset.tags(ns="RPC"):
        return 1
    try:
        if dataset.driver == "JPEG":
            found = int(dataset.tags().get("EXIF_Orientation", "1").split()[0])
        elif dataset.driver in ("GTiff", "PNG", "WEBP"):
            with _opened(name) as file:
                found = _in_tiff(file if dataset.driver == "GTiff" else io.BytesIO(_exif_chunk(file)))
        else:
            return 1
    except (OSError, ValueError, LookupError, OverflowError, struct.error):
        return 1
    return found if 1 <= found <= 8 else 1


def _opened(name: str) -> Any:
    """A file, or a part of one by GDAL's name for it. Unbuffered: a buffer would read most of a PNG's pixels."""
    if part := re.fullmatch(r"/vsisubfile/(\d+)_\d+,(.+)", name):
        return _Part(part[2], int(part[1]))
    return open(name, "rb", buffering=0)


class _Part(io.FileIO):
    """A file from ``offset`` on."""

    def __init__(self, path: str, offset: int) -> None:
        super().__init__(path)
        self._offset = offset
        self.seek(0)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(place + (self._offset if whence == os.SEEK_SET else 0), whence) - self._offset


def _exif_chunk(file: BinaryIO) -> bytes:
    """The EXIF data of a PNG or a WebP; empty if there is none."""
    png = file.read(4) == b"\x89PNG"
    file.seek(8 if png else 12)
    for _ in range(_CHUNKS):
        size, kind = struct.unpack(">I4s", file.read(8)) if png else struct.unpack("<4sI", file.read(8))[::-1]
        if kind in (b"eXIf", b"EXIF"):
            return file.read(min(size, _EXIF_BYTES)).removeprefix(b"Exif\0\0")
        file.seek(size + (4 if png else size % 2), os.SEEK_CUR)
    return b""


def _in_tiff(file: BinaryIO) -> int:
    """The orientation in the first directory of a TIFF or BigTIFF; EXIF data is a TIFF too."""
    order = {b"II": "<", b"MM": ">"}[file.read(2)]

    def number(kind: str) -> int:
        return int(struct.unpack(order + kind, file.read(struct.calcsize(f"{order}{kind}")))[0])

    big = number("H") == 43
    if big:
        file.seek(4, os.SEEK_CUR)
    file.seek(number("Q" if big else "I"))
    for _ in range(min(number("Q" if big else "H"), 1 << 12)):
        tag, kind, _, value = number("H"), number("H"), number("Q" if big else "I"), file.read(8 if big else 4)
        if tag == _TAG:
            return int(struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", value)[0])
    return 1
