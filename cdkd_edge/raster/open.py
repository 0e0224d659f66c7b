"""Everything this package asks of rasterio and GDAL: opening rasters and turning their errors into ours."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError  # rasterio.shutil and .warp let GDAL's own errors through
from rasterio.env import set_gdal_config
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.transform import from_gcps
from rasterio.warp import transform as transformed

from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.raster.bands import Upright, orientation_of

_listening = threading.local()


class _Listener(logging.Handler):
    """Passes on what GDAL says to :func:`gdal` of the same thread; others read other files."""

    def emit(self, record: logging.LogRecord) -> None:
        heard: list[str] | None = getattr(_listening, "heard", None)
        if heard is not None:
            heard.append(_GDAL_CLASS.sub("", record.getMessage()))


_GDAL_CLASS = re.compile(r"^CPLE_\w+[: ]+| ?\(this (warning|error) can be turned .*")
# GDAL's messages reach the user once, as the text of our errors and notes, not also through logging's last resort.
logging.getLogger("rasterio").addHandler(_Listener(logging.WARNING))
# Scenes without georeference are welcome; their label maps have none either. (A filter set once: the
# context manager in warnings is not safe in threads.)
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
warnings.filterwarnings("ignore", category=NodataShadowWarning)  # alpha counts as well, see .bands.Validity

CACHE_BYTES = 32 << 20
"""GDAL's cache of blocks. What is read and written here goes along blocks; it is for masks and for resampling, which
ask for a block again soon. GDAL's own default is a share of the memory."""

_PROJJSON = re.compile(r"'\{.*\}'")
"""A reference system as PROJ spells it out, half a page long."""

# One for all threads of the process. An option of rasterio.Env would be so too, and whichever thread leaves first would
# put the default back; and Env takes bytes, where GDAL's environment variable takes MB.
if "GDAL_CACHEMAX" not in os.environ:
    set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)

_KINDS_SHOWN = 3
"""Of warnings about one scene."""

_LITTLE_ROOM = 1 << 20
"""Bytes."""

_GDAL_OPTIONS = {
    "GDAL_PAM_ENABLED": "YES",
    # Read at once, a truncated PNG yields its compressed bytes as pixels, and no error (GDAL 3.10).
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
}

# What GDAL opens though it is no file: URLs, subdatasets (GPKG:file:table), files inside files.
_GDAL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]+:|/vsi")

_DAMAGED = "the file may be damaged or cut off; `gdalinfo -checksum` reads all of it"
"""GDAL names the block that could not be read, and not what that means."""
_HINTS = {
    "Range downloading": "this server sends whole files only; download the file, or use a server that answers range "
    "requests",
    "opened in a cascaded way|Recursion detected": "a VRT seems to refer to itself",
    "IReadBlock|TIFFRead|TIFFFill|[Rr]ead error|corrupt|decompress": _DAMAGED,
}

_ARCHIVES = {".zip": "/vsizip/", ".kmz": "/vsizip/", ".tar": "/vsitar/", ".tgz": "/vsitar/", ".gz": "/vsigzip/"}


class Warnings:
    """What GDAL warns of while a scene is read, each kind once; shared by the threads that read it.

    A JPEG with wrong bytes in its middle, say, is decoded to the end, and wrong from there on.

    Args:
        strict: whether a warning is an error.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._kinds: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """A sentence on each kind; of many, the first ones."""
        texts = list(self._kinds.values())
        more = len(texts) - _KINDS_SHOWN
        notes = [f"GDAL warns: {text}; the file may be damaged there" for text in texts[:_KINDS_SHOWN]]
        return [*notes, f"GDAL warns of {more} more kinds"] if more > 0 else notes

    def take(self, doing: str, texts: Sequence[str]) -> None:
        """Take what was said while ``doing`` something.

        Raises:
            SceneError: a warning is an error.
        """
        if self._strict and texts:
            raise SceneError(f"{doing}: GDAL warns: {texts[0]}", hint=f"{_DAMAGED}; without --strict it is only told")
        for text in texts:
            self._kinds.setdefault(re.sub(r"[\d.]+", "0", text), text)


@contextlib.contextmanager
def gdal(doing: str, warnings: Warnings | None = None) -> Iterator[None]:
    """A GDAL environment in which errors become :class:`SceneError`: "``doing`` failed: why".

    ``warnings`` takes what GDAL only warns of; without it that is dropped.
    """
    outer, heard = getattr(_listening, "heard", None), list[str]()
    with rasterio.Env(**_GDAL_OPTIONS):
        try:
            _listening.heard = heard
            yield
            if warnings is not None:
                warnings.take(doing, heard)
        except (RasterioError, RasterioIOError, CPLE_BaseError) as error:  # before rasterio 1.4 no subclass
            causes = []
            cause: BaseException | None = error
            while cause is not None:
                causes.append(str(cause))
                cause = cause.__cause__
            telling = [text for text in causes if "previous exception" not in text] or causes
            reason = _PROJJSON.sub("the reference system", " ".join(max(telling, key=len).split()))
            hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, reason)), None)
            raise SceneError(f"{doing} failed: {reason}", hint=hint) from None
        except UnicodeEncodeError:
            raise SceneError(f"{doing} failed: GDAL takes only names in UTF-8") from None
        finally:
            _listening.heard = outer


@contextlib.contextmanager
def writing(doing: str, folder: Path, room: int = _LITTLE_ROOM) -> Iterator[None]:
    """Like :func:`gdal`, also for errors that rasterio only logs; and want of room in ``folder`` is called so.

    What failed with less than ``room`` bytes free failed for want of room. (Some drivers remove what they began.)

    Raises:
        SceneError: GDAL cannot write.
        SystemRefusalError: the disk is full.
    """
    thread, messages = threading.get_ident(), list[str]()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:  # what GDAL reports in others is about other files
                messages.append(record.getMessage())

    logger, collector = logging.getLogger("rasterio._env"), Collector(logging.ERROR)
    logger.addHandler(collector)
    try:
        with gdal(doing):
            yield
        if messages:
            raise SceneError(f"{doing} failed: {messages[0]}")
    except SceneError:
        if shutil.disk_usage(folder).free < room:
            raise SystemRefusalError(f"{doing} failed: no space left on the device") from None
        raise
    finally:
        logger.removeHandler(collector)


def is_gdal_name(name: str) -> bool:
    """Whether a name is one of GDAL's own and not a file's: a URL, a subdataset, a file inside an archive."""
    return _GDAL_NAME.match(name) is not None


def _way_into(name: str) -> str | None:
    """How GDAL reads what is in an archive."""
    way = _ARCHIVES.get(Path(name).suffix.lower())
    if way is None or is_gdal_name(name):
        return None
    return f"name what is in it: {way}{name}" + ("" if way == "/vsigzip/" else "/SCENE.tif")


def open_scene(path: str | Path, warnings: Warnings | None = None) -> Any:
    """Open a raster for reading; a picture that is stored turned as viewers show it (:class:`Upright`).

    ``warnings`` takes what GDAL warns of.

    Raises:
        SceneError: there is no such file, or GDAL does not know its format.
    """
    name = str(path)
    if not is_gdal_name(name) and not Path(name).is_file():
        raise SceneError(f"scene {name} {'is not a file' if Path(name).exists() else 'does not exist'}")
    try:
        with gdal(f"opening {name}", warnings):
            dataset = rasterio.open(name)
            orientation = orientation_of(dataset, name)
            return dataset if orientation == 1 else Upright(dataset, orientation)
    except SceneError as error:
        if "not recognized" in error.message:
            raise SceneError(f"{name} is not a raster that GDAL can read", hint=_way_into(name)) from None
        raise


_OFF = 0.45
"""Pixels, a little less than half of one. A grid that is off by less still lays each pixel over its own."""


def place_problem(image: Any, labels: Any) -> str | None:
    """What is wrong with the place of a raster of labels that should lie pixel for pixel on an image.

    Both are open and of one size. Compared are the corners of both grids, in pixels of the image; with ground control
    points the grid is the one that fits them best. Where either has no grid there is nothing to compare.

    Returns:
        The end of a sentence that begins with the labels' name, or None.
    """
    ours, theirs = _grid(image), _grid(labels)
    if ours is None or theirs is None:
        return None
    (here, our_crs), (there, their_crs) = ours, theirs
    height, width = labels.height, labels.width
    corners = [(0, 0), (width, 0), (0, height), (width, height)]
    xs, ys = zip(*(there * corner for corner in corners), strict=True)
    if our_crs and their_crs and our_crs != their_crs:
        try:
            with gdal("comparing places"):
                xs, ys = transformed(their_crs, our_crs, xs, ys)
        except SceneError:
            return f"is not where its image is: in {their_crs.to_string()}, and its image in {our_crs.to_string()}"
    if not here.determinant:
        return None
    found = [~here * point for point in zip(xs, ys, strict=True)]
    off = max(math.dist(corner, point) for corner, point in zip(corners, found, strict=True))
    if off <= _OFF:
        return None
    shifts = {(round(x - column, 1), round(y - row, 1)) for (column, row), (x, y) in zip(corners, found, strict=True)}
    if len(shifts) > 1 or not math.isfinite(off):
        return f"is not where its image is: a corner is {off:.3g} px off, by the grids of both files"
    right, down = shifts.pop()
    across = f"{abs(right):g} px to the {'right' if right > 0 else 'left'}" if right else ""
    along = f"{abs(down):g} px {'down' if down > 0 else 'up'}" if down else ""
    return f"is not where its image is: {' and '.join(filter(None, (across, along)))}, by the grids of both files"


def _grid(dataset: Any) -> tuple[Affine, Any] | None:
    """From pixels to the map, and in which reference system."""
    if not dataset.transform.is_identity:
        return dataset.transform, dataset.crs
    points, crs = dataset.gcps
    with contextlib.suppress(ValueError, RasterioError, CPLE_BaseError):
        return (from_gcps(points), crs) if len(points) > 2 else None
    return None
