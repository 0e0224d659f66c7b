"""Finds the images to train on: files and members of shards, their sizes, and what each folder and shard holds."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import rasterio

from cdkd_edge.core.errors import DatasetError, SceneError
from cdkd_edge.core.numbers import significant
from cdkd_edge.distillation.shards import COMPRESSED, SHARD, gdal_name, images_of
from cdkd_edge.precision.exclusions import Exclusions, PixelWindow
from cdkd_edge.raster.open import RASTER_SUFFIXES, gdal, scenes_named
from cdkd_edge.raster.read import ReadingNotes, SceneReader
from cdkd_edge.raster.stretch import Limits
from cdkd_edge.segmentation.options import SegmentOptions

# GDAL lists a folder for every file that it opens there; to ask for each sidecar by name is faster.
OPENING = {"GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
_THREADS, _CHUNK = 4, 256  # images are opened in threads, so many at a time: on a network drive that is mostly waiting
_ROWS = 20  # folders and shards in a report
_SHOWN = 3  # images in a note
_NO_LIMITS = np.zeros((3, 2), np.float32)  # of a stretch: keeps a reader from taking percentiles

Progress = Callable[[int, int], None]
Range = tuple[float, float]


class Header(NamedTuple):
    """What the header of an image tells."""

    height: int
    width: int
    kind: str  # bands and type of values
    gsd: float | None  # ground sample distance, m
    notes: Sequence[str]
    windows: Sequence[PixelWindow]  # parts that belong to evaluation sets


@dataclass
class FolderReport:
    """What a folder or a shard holds."""

    name: str
    images: int = 0
    tiles: int = 0
    left_out: int = 0  # images that cannot be read, or belong to an evaluation set
    kinds: dict[str, int] = field(default_factory=dict)  # images by bands and type of values, ``3 x uint8``
    width: Range | None = None  # smallest and largest, px
    height: Range | None = None
    gsd: Range | None = None  # finest and coarsest ground sample distance, m; None: no image tells

    def add(self, header: Header, tiles: int) -> None:
        """Count an image."""
        gsd = None if header.gsd is None else (header.gsd, header.gsd)
        width, height = (header.width, header.width), (header.height, header.height)
        self.merge(FolderReport("", 1, tiles, 0, {header.kind: 1}, width, height, gsd))

    def merge(self, other: FolderReport) -> None:
        """Count all that another folder holds."""
        self.images, self.tiles = self.images + other.images, self.tiles + other.tiles
        self.left_out += other.left_out
        self.kinds = dict((Counter(self.kinds) + Counter(other.kinds)).most_common())
        for name in ("width", "height", "gsd"):
            ranges = list(filter(None, (getattr(self, name), getattr(other, name))))
            if ranges:
                setattr(self, name, (min(low for low, _ in ranges), max(high for _, high in ranges)))

    @property
    def text(self) -> str:
        """One line: ``900 images, 900 tiles, 1024 x 1024 px, 3 x uint8, 0.5 m``."""
        parts = [f"{self.images:,} images, {self.tiles:,} tiles"]
        if self.width and self.height:
            parts.append(f"{_span(self.width)} x {_span(self.height)} px")
        only = len(self.kinds) == 1
        parts += [kind if only else f"{count:,} of {kind}" for kind, count in self.kinds.items()]
        if self.gsd:
            parts.append(f"{_span(self.gsd)} m")
        if self.left_out:
            parts.append(f"{self.left_out:,} left out")
        return ", ".join(parts)


class Imagery:
    """The images that arguments name, in the order of their names. What is known of each lies in arrays.

    Args:
        arguments: rasters, shards (``.tar``), folders of either, patterns, or lists (``@LIST``) of all these.
        tile: side of a tile, px.
        options: how images are read. With ``strict``, an image that cannot be opened is an error.
        exclude: evaluation sets. Images with their names or content stay out, as in :mod:`.precision.exclusions`.
        progress: called with the number of images looked at, and of all.

    Raises:
        SceneError: nothing is found; a shard cannot be used; images need an option; none can be read.
        DatasetError: an evaluation set cannot be used; all images are of one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        tile: int,
        options: SegmentOptions = SegmentOptions(),
        exclude: Sequence[str] = (),
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.tile, self._options = tile, options
        self.names: list[str] = []  # paths, and names of members
        self._shards: list[str] = []
        self._shard, self._part = array("i"), array("q")  # shard of each image, -1: none; its offset and size there
        self.unreadable: list[str] = []  # why images were left out
        self.excluded: list[str] = []  # images of evaluation sets, and why
        self.windows: dict[int, Sequence[PixelWindow]] = {}  # parts of images that belong to evaluation sets
        self._folders: dict[str, FolderReport] = {}
        self._notes = ReadingNotes()
        for path in scenes_named(arguments, (*RASTER_SUFFIXES, SHARD, *COMPRESSED)):
            self._find(path)
        sizes = self._look(Exclusions.of(exclude), progress)
        self.heights, self.widths = np.frombuffer(sizes, np.int32).reshape(-1, 2).T.copy()  # px

    def __len__(self) -> int:
        return len(self.names)

    def open(self, image: int, limits: Limits | None = None) -> SceneReader:
        """Open an image, as :meth:`.SegmentOptions.open` does; its errors name the image as :meth:`shown` does."""
        try:
            return self._options.open(self._path(image), limits)
        except SceneError as error:
            raise self.named(error, image) from None

    def named(self, error: SceneError, image: int) -> SceneError:
        """The same error, with the name of its image in place of GDAL's."""
        shown = self.shown(image)
        text = error.message.replace(self._path(image), shown)
        error.message = text if shown in text else f"{shown}: {text}"
        return error

    def shown(self, image: int) -> str:
        """The path of an image, or ``SHARD: MEMBER``."""
        shard = self._shard[image]
        return self.names[image] if shard < 0 else f"{self._shards[shard]}: {self.names[image]}"

    def report(self) -> list[FolderReport]:
        """What the folders and shards hold, by name; those after the first 19 in one row if there are more than 20."""
        found = [self._folders[name] for name in sorted(self._folders)]
        if len(found) <= _ROWS:
            return found
        others = FolderReport(f"{len(found) - _ROWS + 1} more")
        for folder in found[_ROWS - 1 :]:
            others.merge(folder)
        return [*found[: _ROWS - 1], others]

    @property
    def digest(self) -> str:
        """SHA-256 of the names and sizes of all images. Another place of the same folder has the same."""
        found = hashlib.sha256()
        for name, height, width in zip(self.names, self.heights.tolist(), self.widths.tolist(), strict=True):
            found.update(f"{name.rpartition('/')[2]}\0{height}x{width}\n".encode(errors="surrogateescape"))
        return found.hexdigest()

    @property
    def notes(self) -> list[str]:
        """Which images are left out, which are smaller than a tile, and how images are read."""
        notes, total = [], len(self) + len(self.unreadable) + len(self.excluded)
        if self.unreadable:
            gone = f"{len(self.unreadable)} of {total} images cannot be read and are left out"
            notes.append(f"{gone}: {few(self.unreadable)}")
        if self.excluded:
            notes.append(f"{len(self.excluded)} of {total} images are of an evaluation set: {few(self.excluded)}")
        if small := int(((self.heights < self.tile) | (self.widths < self.tile)).sum()):
            less = f"{small} of {len(self)} images are smaller than {self.tile} px"
            notes.append(f"{less}: they are mirrored at their borders")
        return [*notes, *self._notes.texts]

    def _find(self, path: str) -> None:
        """Add a file, or the images of a shard."""
        if not path.lower().endswith((SHARD, *COMPRESSED)):
            self._add(path, -1, 0, 0)
            return
        self._shards.append(path)
        for member in images_of(path):
            self._add(member.name, len(self._shards) - 1, member.offset, member.size)

    def _add(self, name: str, shard: int, offset: int, size: int) -> None:
        self.names.append(name)
        self._shard.append(shard)
        self._part.extend((offset, size))

    def _path(self, image: int) -> str:
        """The name by which GDAL opens an image."""
        if (shard := self._shard[image]) < 0:
            return self.names[image]
        return gdal_name(self._shards[shard], self._part[2 * image], self._part[2 * image + 1])

    def _look(self, exclusions: Exclusions, progress: Progress) -> array[int]:
        """Read all headers and keep what can be used. Returns height and width of each image kept."""
        sizes, total, kept = array("i"), len(self), 0
        needs_option: dict[str, SceneError] = {}
        for image, found in enumerate(self._headers(exclusions)):
            shard = self._shard[image]
            name = self._shards[shard] if shard >= 0 else self.names[image].rpartition("/")[0] or "."
            folder = self._folders.setdefault(name, FolderReport(name))
            if isinstance(found, Header):
                self._notes.add(self.shown(image), found.notes)
                folder.add(found, int(tiles_along(found.height, self.tile) * tiles_along(found.width, self.tile)))
                if found.windows:
                    self.windows[kept] = found.windows
                # Images move up to the places of those that are left out.
                self.names[kept], self._shard[kept] = self.names[image], shard
                self._part[2 * kept : 2 * kept + 2] = self._part[2 * image : 2 * image + 2]
                sizes.extend((found.height, found.width))
                kept += 1
            elif isinstance(found, str):
                folder.left_out += 1
                self.excluded.append(found)
            elif self._options.strict:
                raise found
            else:
                folder.left_out += 1
                self.unreadable.append(found.message)
                if "--" in (found.hint or ""):
                    needs_option.setdefault(name, found)
            if (image + 1) % _CHUNK == 0 or image + 1 == total:
                progress(image + 1, total)
        del self.names[kept:], self._shard[kept:], self._part[2 * kept :]
        # A few images of another kind are left out. A whole folder of them is a sensor that needs an option.
        for name, error in needs_option.items():
            if not self._folders[name].images:
                raise SceneError(f"no image of {name} can be used; the first: {error.message}", hint=error.hint)
        if not kept and self.unreadable:
            raise SceneError(f"none of {total} images can be read; the first: {self.unreadable[0]}")
        if not kept:
            raise DatasetError(f"all {total} images are of an evaluation set: {few(self.excluded)}")
        return sizes

    def _headers(self, exclusions: Exclusions) -> Iterator[Header | SceneError | str]:
        """What the headers of all images tell, in order; the error of one that cannot be read; why one is excluded."""

        def read(first: int) -> list[Header | SceneError | str]:
            with rasterio.Env(**OPENING), gdal("opening images"):
                return [self._header(image, exclusions) for image in range(first, min(first + _CHUNK, total))]

        total = len(self)
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="headers")
        try:
            for chunk in pool.map(read, range(0, total, _CHUNK)):
                yield from chunk
        finally:
            pool.shutdown(cancel_futures=True)

    def _header(self, image: int, exclusions: Exclusions) -> Header | SceneError | str:
        name, shard = self.names[image], self._shard[image]
        windows: Sequence[PixelWindow] = ()
        if exclusions.names or exclusions.windows:
            size = None if shard < 0 else self._part[2 * image + 1]
            content = None if shard < 0 else lambda: self._member_sha256(image)
            if reason := exclusions.reason(name, size, content):
                return f"{self.shown(image)} ({reason})"
            windows = exclusions.windows_of(name)
        try:
            limits = None if self._options.stretch is None else _NO_LIMITS
            with closing(self.open(image, limits)) as reader:
                return Header(reader.height, reader.width, reader.stored, reader.own_gsd, reader.notes, windows)
        except SceneError as error:
            return error

    def _member_sha256(self, image: int) -> str:
        with open(self._shards[self._shard[image]], "rb") as file:
            file.seek(self._part[2 * image])
            return hashlib.sha256(file.read(self._part[2 * image + 1])).hexdigest()


def tiles_along(size: Any, tile: int) -> Any:
    """Tiles without overlap along an axis of ``size`` px, as in :mod:`cdkd_edge.raster.grid`; also of arrays."""
    return -(-size // tile)


def _span(ends: Range) -> str:
    low, high = (f"{end:,}" if isinstance(end, int) else significant(end) for end in ends)
    return low if low == high else f"{low}..{high}"


def few(texts: Sequence[str]) -> str:
    """The first of some texts, and how many more there are."""
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
