"""Keeps evaluation sets out of a calibration set, so that nothing is judged on images that set INT8 ranges.

An evaluation set is given as one of

* a folder of images, with its subfolders (masks in it do no harm), a raster, or a pattern,
* a calibration set: its tiles stay out, those to check on as well; other parts of their scenes may be used,
* a text file with an image or scene per line: a name, a file name or a path, with ``*`` and ``?``; for a part of it,
  followed by ``X Y WIDTH HEIGHT`` in px. Empty lines and what follows ``#`` are skipped.

A scene stays out if it has the name (without folder and suffix) or the content of an excluded image. A tile stays out
if it has the pixels of an excluded tile, overlaps an excluded window, or is a near-duplicate of a tile of an excluded
image (:mod:`.descriptors` compares those).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdkd_edge.core.errors import DatasetError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.graph.tiles import SET_FILE, is_calibration_set, read_set_manifest
from cdkd_edge.quality.datasets import read_list
from cdkd_edge.raster.open import RASTER_SUFFIXES, scenes_named

PixelWindow = tuple[int, int, int, int]  # x, y, width, height; px

_WINDOW = re.compile(r"(.+?)\s+(-?\d+)[\s,]+(-?\d+)[\s,]+(\d+)[\s,]+(\d+)")
_MASKS = re.compile(r"masks?(_png)?|labels?|annotations?")


@dataclass
class Exclusions:
    """All evaluation sets of a run."""

    images: list[Path] = field(default_factory=list)  # rasters of evaluation sets, without masks
    names: dict[str, str] = field(default_factory=dict)  # names and patterns, and the argument that gave them
    # Name of a scene, SHA-256 of its file if known, excluded part
    windows: list[tuple[str, str | None, PixelWindow]] = field(default_factory=list)
    pixels: set[str] = field(default_factory=set)  # SHA-256 of the pixels of excluded tiles
    _sizes: dict[int, list[Path]] = field(default_factory=dict)
    _window_sizes: dict[int, set[str]] = field(default_factory=dict)
    _known_patterns: list[str] | None = None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Exclusions:
        """Read the evaluation sets that the arguments name; CdkdEdgeError if one names nothing or is damaged."""
        exclusions = cls()
        for argument in arguments:
            exclusions._add(argument)
        return exclusions

    def reason(self, scene: str, size: int | None = None, content: Callable[[], str] | None = None) -> str | None:
        """Why a whole scene stays out; None if it does not.

        A scene that is a part of a file comes with its ``size``, bytes, and a function that gives its SHA-256.
        """
        name, stem = Path(scene).name, Path(scene).stem
        literal = (escape_pattern(stem), escape_pattern(name))  # most names are no patterns: 100,000 are looked up fast
        for known in (*literal, *self._patterns()):
            if known in self.names and (fnmatch.fnmatchcase(stem, known) or fnmatch.fnmatchcase(name, known)):
                return f"its name is in {self.names[known]}"
        path = Path(scene)
        if content is None:
            if not path.is_file():
                return None
            size, content = path.stat().st_size, lambda: sha256_of(path)
        for image in self._sizes.get(size or 0, ()):
            if (path.is_file() and image.samefile(path)) or sha256_of(image) == content():
                return f"it is the same file as {image}"
        return None

    def windows_of(self, scene: str) -> list[PixelWindow]:
        """The parts of a scene that stay out."""
        names = {Path(scene).name, Path(scene).stem}
        found = [window for name, _, window in self.windows if any(fnmatch.fnmatchcase(n, name) for n in names)]
        path = Path(scene)
        if path.is_file() and (known := self._window_sizes.get(path.stat().st_size)):
            content = sha256_of(path)
            if content in known:
                found += [window for _, sha256, window in self.windows if sha256 == content]
        return found

    def _patterns(self) -> list[str]:
        """Those names that are patterns."""
        if self._known_patterns is None:
            self._known_patterns = [name for name in self.names if re.search(r"[*?[]", re.sub(r"\[[*?[]\]", "", name))]
        return self._known_patterns

    def _add(self, argument: str) -> None:
        self._known_patterns = None
        place = Path(argument)
        if place.name == SET_FILE and is_calibration_set(place.parent):
            place = place.parent
        if place.is_dir():
            if is_calibration_set(place):
                self._add_set(place)
            else:
                self._add_images(sorted(filter(_is_image, place.rglob("*"))), argument)
        elif not place.exists():
            if not any(char in argument for char in "*?["):
                raise DatasetError(f"evaluation set {argument} does not exist")
            self._add_images([Path(path) for path in scenes_named([argument])], argument)
        elif place.suffix.lower() in RASTER_SUFFIXES:
            self._add_images([place], argument)
        else:
            self._add_list(place)

    def _add_images(self, images: list[Path], argument: str) -> None:
        if not images:
            raise DatasetError(
                f"evaluation set {argument} holds no image",
                hint="give a folder of images, a calibration set, or a text file with one name a line",
            )
        for image in images:
            self.images.append(image)
            self.names[escape_pattern(image.stem)] = argument
            self._sizes.setdefault(image.stat().st_size, []).append(image)

    def _add_set(self, folder: Path) -> None:
        manifest = read_set_manifest(folder)
        scenes = {scene.path: scene for scene in manifest.scenes}
        for tile in manifest.tiles:
            scene = scenes[tile.scene]
            window = (tile.x, tile.y, tile.width, tile.height)
            self.windows.append((escape_pattern(Path(tile.scene).name), scene.sha256, window))
            self.pixels.add(tile.sha256)
            if scene.sha256 is not None and scene.bytes is not None:
                self._window_sizes.setdefault(scene.bytes, set()).add(scene.sha256)

    def _add_list(self, file: Path) -> None:
        for entry in read_list(file):
            if match := _WINDOW.fullmatch(entry):
                name, *numbers = match.groups()
                x, y, width, height = map(int, numbers)
                self.windows.append((_without_suffix(Path(name).name), None, (x, y, width, height)))
            else:
                self.names[_without_suffix(Path(entry).name)] = str(file)


def overlaps(one: PixelWindow, other: PixelWindow) -> bool:
    """Whether two windows share a pixel."""
    (x, y, width, height), (left, top, across, down) = one, other
    return x < left + across and left < x + width and y < top + down and top < y + height


def escape_pattern(name: str) -> str:
    """A pattern that matches only the name itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _without_suffix(name: str) -> str:
    return str(Path(name).with_suffix("")) if Path(name).suffix.lower() in RASTER_SUFFIXES else name


def _is_image(path: Path) -> bool:
    """Whether a file is a raster and no mask."""
    is_mask = path.stem.endswith("_mask") or _MASKS.fullmatch(path.parent.name.lower())
    return path.suffix.lower() in RASTER_SUFFIXES and not path.name.startswith(".") and not is_mask and path.is_file()
