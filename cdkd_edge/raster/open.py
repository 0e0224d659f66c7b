"""Opens rasters with GDAL, and turns GDAL's errors into ours.

Finds the scenes that an argument names: a file, a folder, a pattern, a list, or a name that only GDAL knows.
"""

from __future__ import annotations

import contextlib
import glob
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
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError
from rasterio.transform import from_gcps
from rasterio.warp import transform as transformed

from cdkd_edge.core.errors import SceneError, SystemRefusalError
from cdkd_edge.core.files import read_small
from cdkd_edge.raster.bands import Upright, orientation_of

# Suffixes that count in folders and for patterns; a scene that is named itself may be anything GDAL opens.
RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg", ".vrt", ".img")
_RESULTS = ("_labels.tif", "_confidence.tif", "_preview.png", "_quicklook.png")  # `segment` writes them beside scenes


def lines_of(argument: str) -> list[str]:
    """The names in a list if the argument is ``@LIST``, a text file with one a line; else the argument itself.

    Empty lines and those that begin with ``#`` do not count. SceneError: the list cannot be read or names nothing.
    """
    if not argument.startswith("@") or Path(argument).exists():
        return [argument]
    path = argument[1:]
    try:
        # File names may hold any bytes; surrogates keep them.
        text = read_small(Path(path)).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise SceneError(f"the list {path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise SceneError(f"the list {path} is no text file", hint="a list names a scene on each line")
    named = [name for line in text.splitlines() if (name := line.strip()) and not name.startswith("#")]
    if not named:
        raise SceneError(f"the list {path} names no scene")
    return named


def rasters_named(argument: str, suffixes: tuple[str, ...] = RASTER_SUFFIXES) -> list[str]:
    """The rasters that an argument names, in any order: itself, those in a folder, or those that match a pattern.

    Folders in a folder are not searched, so that masks are not taken for images; patterns may hold ``**``. Only
    ``suffixes`` count, without hidden files, the files that `segment` wrote, and masks beside their images
    (``ID_mask.*``, ``ID_sat.*``). SceneError: nothing found.
    """
    place = Path(argument)
    if is_gdal_name(argument) or place.is_file():
        return [argument]
    if place.is_dir():
        return _in_folder(place, suffixes)
    if not glob.has_magic(argument):
        raise SceneError(f"scene {argument} does not exist")
    if matches := [path for path in _matching(argument) if _is_raster(Path(path), suffixes)]:
        return matches
    raise SceneError(f"no raster matches {argument}")


def scenes_named(arguments: Sequence[str], suffixes: tuple[str, ...] = RASTER_SUFFIXES) -> list[str]:
    """Rasters that arguments and their lists name (:func:`rasters_named`, :func:`lines_of`).

    Paths as they were given, sorted; the same file once.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for name in lines_of(argument):
            try:
                paths = rasters_named(name, suffixes)
            except SceneError as error:
                if name == argument:
                    raise
                raise SceneError(f"the list {argument[1:]} cannot be used: {error.message}", hint=error.hint) from None
            for path in paths:
                key = file_key(path)
                found[key] = min(found.get(key, path), path)
    return sorted(found.values())


def file_key(path: str) -> str:
    """A key that is the same for two names of one file; a name that only GDAL knows is its own key."""
    return path if is_gdal_name(path) else os.path.realpath(path)  # Path.resolve() fails on links that go in circles


def _matching(pattern: str) -> Iterator[str]:
    """Paths that match a pattern; ``**`` is any folder below, each once even if links lead in circles.

    (The glob module follows such circles; Path.glob takes no absolute patterns.)
    """
    if Path(pattern).name == "**":
        pattern = f"{pattern.rstrip(os.sep)}{os.sep}*"
    before, stars, after = pattern.partition(f"**{os.sep}")
    if not stars or (before and not before.endswith(os.sep)):
        yield from glob.iglob(pattern)  # noqa: PTH207
        return
    seen: set[str] = set()
    for top in glob.iglob(before) if before else [""]:  # noqa: PTH207
        for folder, below, _ in os.walk(top or ".", followlinks=True):
            if (place := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(place)
            below[:] = sorted(name for name in below if not name.startswith("."))
            within = glob.escape(folder if top else folder[2:])
            yield from _matching(os.path.join(within, after))  # noqa: PTH118


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    if rasters := [str(path) for path in folder.iterdir() if _is_raster(path, suffixes)]:
        return rasters
    below = sorted(str(place) for place in folder.iterdir() if place.is_dir() and _holds_raster(place, suffixes))
    hint = f"there are some in {', '.join(below[:4])}" if below else f"for all below it: '{folder}/**/*.tif'"
    raise SceneError(f"{folder} holds no raster ({', '.join(suffixes)})", hint=hint)


def _holds_raster(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(_is_raster(path, suffixes) for path in folder.iterdir())


def _is_raster(path: Path, suffixes: tuple[str, ...]) -> bool:
    return (
        path.name.lower().endswith(suffixes)
        and not path.name.startswith(".")
        and not path.name.endswith(_RESULTS)
        and not _is_mask(path)
        # A broken link is a scene that fails, not one that is silently missing.
        and (path.is_file() or (path.is_symlink() and not path.exists()))
    )


def _is_mask(path: Path) -> bool:
    """Whether a file is the mask of another, ``ID_mask.png`` beside ``ID_sat.jpg``, as in DeepGlobe."""
    image = path.stem.removesuffix("_mask")
    return image != path.stem and any(path.with_name(f"{image}_sat{suffix}").exists() for suffix in RASTER_SUFFIXES)


_heard = threading.local()  # per thread, the messages of GDAL that :func:`gdal` collects there
_GDAL_CLASS = re.compile(r"^CPLE_\w+[: ]+| ?\(this (warning|error) can be turned .*")


class _GdalLog(logging.Handler):
    """Passes GDAL's messages on to :func:`gdal` in the same thread; other threads use other files."""

    def emit(self, record: logging.LogRecord) -> None:
        messages: list[tuple[int, str]] | None = getattr(_heard, "messages", None)
        if messages is not None:
            messages.append((record.levelno, _GDAL_CLASS.sub("", record.getMessage())))


# Users see GDAL's messages once, as the text of our errors and notes, and not also through logging's last resort.
logging.getLogger("rasterio").addHandler(_GdalLog(logging.WARNING))
# Set once: the context manager in warnings is not safe in threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # such scenes are welcome
warnings.filterwarnings("ignore", category=NodataShadowWarning)  # alpha counts as well, see .bands.Validity

# GDAL's cache of blocks, which masks and resampling need, for all threads; its own default is a share of the memory. As
# an option of rasterio.Env it would be reset by whichever thread leaves first. Env takes bytes, the variable takes MB.
CACHE_BYTES = 32 << 20
if "GDAL_CACHEMAX" not in os.environ:
    set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)

_PROJJSON = re.compile(r"'\{.*\}'")  # a reference system in PROJ's long form, half a page of text
_KINDS_SHOWN = 3  # kinds of warnings about one scene
_LITTLE_ROOM = 1 << 20  # bytes
_GDAL_OPTIONS = {
    "GDAL_PAM_ENABLED": "YES",
    # Reading a truncated PNG at once yields its compressed bytes as pixels, and no error (GDAL 3.10).
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",
    # Rows that overviews are made of at a time. GDAL's own choice takes 280 MB for a map 100,000 px wide.
    "GDAL_OVR_CHUNKYSIZE": "128",
}

# Names that GDAL opens though they are no files: URLs, subdatasets (GPKG:file:table), files inside archives.
_GDAL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]+:|/vsi")

_DAMAGED = "the file may be damaged or cut off; `gdalinfo -checksum` reads all of it"
_NO_RANGES = "this server sends whole files only; download the file, or use a server that answers range requests"
_HINTS = {
    "Range downloading": _NO_RANGES,
    "opened in a cascaded way|Recursion detected": "a VRT seems to refer to itself",
    "IReadBlock|TIFFRead|TIFFFill|[Rr]ead error|corrupt|decompress": _DAMAGED,
}

_ARCHIVES = {".zip": "/vsizip/", ".kmz": "/vsizip/", ".tar": "/vsitar/", ".tgz": "/vsitar/", ".gz": "/vsigzip/"}


class Warnings:
    """GDAL's warnings while a scene is read, each kind once; shared by the threads that read it.

    A JPEG with wrong bytes in its middle, for example, is decoded with a warning, and wrong from there on.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict  # whether a warning is an error
        self._kinds: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """A sentence for each of the first kinds."""
        texts = list(self._kinds.values())
        more = len(texts) - _KINDS_SHOWN
        notes = [f"GDAL warns: {text}; the file may be damaged there" for text in texts[:_KINDS_SHOWN]]
        return [*notes, f"GDAL warns of {more} more kinds"] if more > 0 else notes

    def take(self, doing: str, texts: Sequence[str]) -> None:
        """Take the warnings while ``doing`` something; with ``strict``, raise :class:`SceneError` if there are any."""
        if self._strict and texts:
            hint = f"{_DAMAGED}; without --strict this is only a note"
            raise SceneError(f"{doing}: GDAL warns: {texts[0]}", hint=hint)
        for text in texts:
            self._kinds.setdefault(re.sub(r"[\d.]+", "0", text), text)


@contextlib.contextmanager
def gdal(doing: str, warnings: Warnings | None = None, *, check_log: bool = False) -> Iterator[None]:
    """A GDAL environment in which errors become :class:`SceneError`: "``doing`` (e.g. "reading FILE") failed: why".

    ``warnings`` takes GDAL's warnings; ``check_log`` raises also the errors that rasterio only logs.
    """
    outer, messages = getattr(_heard, "messages", None), list[tuple[int, str]]()
    # Within another block the options are set already, and to set them takes longer than to read a small header.
    with rasterio.Env(**_GDAL_OPTIONS) if outer is None else contextlib.nullcontext():
        try:
            _heard.messages = messages
            yield
            if warnings is not None:
                warnings.take(doing, [text for _, text in messages])
            errors = [text for level, text in messages if level >= logging.ERROR]
            if check_log and errors:
                raise SceneError(f"{doing} failed: {errors[0]}")
        except (RasterioError, CPLE_BaseError) as error:
            reason = _reason_of(error)
            hint = next((hint for pattern, hint in _HINTS.items() if re.search(pattern, reason)), None)
            raise SceneError(f"{doing} failed: {reason}", hint=hint) from None
        except UnicodeEncodeError:
            raise SceneError(f"{doing} failed: GDAL takes only names in UTF-8") from None
        finally:
            _heard.messages = outer


def _reason_of(error: BaseException) -> str:
    """The most telling of an error's messages and those of its causes."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    telling = [text for text in texts if "previous exception" not in text] or texts
    return _PROJJSON.sub("the reference system", " ".join(max(telling, key=len).split()))


@contextlib.contextmanager
def writing(doing: str, folder: Path, room: int = _LITTLE_ROOM) -> Iterator[None]:
    """Like :func:`gdal`, for writing into ``folder``: logged errors are raised, and a full disk is called so.

    An error with less than ``room`` bytes free is taken for a full disk. (Some drivers remove what they began.)

    Raises:
        SceneError, SystemRefusalError: GDAL cannot write; the disk is full.
    """
    try:
        with gdal(doing, check_log=True):
            yield
    except SceneError:
        if shutil.disk_usage(folder).free < room:
            raise SystemRefusalError(f"{doing} failed: no space left on the device") from None
        raise


def is_gdal_name(name: str) -> bool:
    """Whether only GDAL knows what a name leads to: a URL, a subdataset, a file inside an archive."""
    return _GDAL_NAME.match(name) is not None


def open_scene(path: str | Path, warnings: Warnings | None = None) -> Any:
    """Open a raster for reading; a picture that is stored turned is shown upright (:class:`.bands.Upright`).

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
        if "not recognized" not in error.message:
            raise
        way = None if is_gdal_name(name) else _ARCHIVES.get(Path(name).suffix.lower())
        hint = f"name the file in it: {way}{name}{'' if way == '/vsigzip/' else '/SCENE.tif'}" if way else None
        raise SceneError(f"{name} is not a raster that GDAL can read", hint=hint) from None


_OFF = 0.45  # tolerance in pixels, less than half of one: a grid that is off by less still lays each pixel over its own


def place_problem(image: Any, labels: Any) -> str | None:
    """Why an open raster of labels does not lie pixel for pixel on an open image of the same size; None if it does.

    The corners of both grids are compared, in pixels of the image; with ground control points, of the grid that fits
    them best. The text is the end of a sentence that begins with the labels' name.
    """
    (here, our_crs), (there, their_crs) = _grid(image), _grid(labels)
    if here is None or there is None:
        return None
    corners = [(0, 0), (labels.width, 0), (0, labels.height), (labels.width, labels.height)]
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
    off = max(map(math.dist, corners, found))
    if off <= _OFF:
        return None
    shifts = {(round(x - column, 1), round(y - row, 1)) for (column, row), (x, y) in zip(corners, found, strict=True)}
    where = f"a corner is {off:.3g} px off"
    if len(shifts) == 1 and math.isfinite(off):
        right, down = shifts.pop()
        across = f"{abs(right):g} px to the {'right' if right > 0 else 'left'}" if right else ""
        along = f"{abs(down):g} px {'down' if down > 0 else 'up'}" if down else ""
        where = " and ".join(filter(None, (across, along)))
    return f"is not where its image is: {where}, by the grids of both files"


def _grid(dataset: Any) -> tuple[Affine | None, Any]:
    """The transform from pixels to the map (None: no place on Earth), and its reference system."""
    if not dataset.transform.is_identity:
        return dataset.transform, dataset.crs
    points, crs = dataset.gcps
    with contextlib.suppress(ValueError, RasterioError, CPLE_BaseError):
        return from_gcps(points) if len(points) > 2 else None, crs
    return None, crs
