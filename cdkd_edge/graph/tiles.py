"""The format of a calibration set: a folder of lossless tiles and a manifest that says where each came from.

::

    NAME/set.json                the manifest
    NAME/calibration/0000.png    tiles that set the INT8 ranges: RGB, 8 bit, T x T px
    NAME/check/0000.png          tiles kept apart, on which the INT8 graph is judged
    NAME/contact-sheet.png       a picture of all tiles

``cdkd-edge calibrate`` writes it, `build` reads it. The same scenes, options and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cdkd_edge import __version__
from cdkd_edge.core.errors import ManifestError
from cdkd_edge.core.files import read_json, sha256_of, write_text

SET_VERSION = 1
SET_FILE = "set.json"
SHEET_FILE = "contact-sheet.png"
SET_KIND = "calibration-set"

Role = Literal["calibration", "check"]

_TILE_FILE = re.compile(r"(calibration|check)/[0-9]{4,}\.png")


@dataclass(frozen=True)
class TileRecord:
    """One tile: its file, where it came from, and why it was chosen."""

    file: str  # relative to the set's folder, e.g. ``calibration/0000.png``
    sha256: str  # SHA-256 of the pixels (:func:`pixels_sha256`), not of the file
    scene: str  # path of the scene as it was typed; an entry of :attr:`SetManifest.scenes`
    x: int
    y: int  # left and upper border in the scene, px; negative where a small scene was padded by reflection
    width: int
    height: int
    role: Role
    cluster: int  # the kind of imagery; 0 is the most frequent
    why: str  # ``extreme``: farthest from all tiles chosen before it; ``typical``: in the middle of its cluster
    score: float  # that distance, in standard deviations of the descriptors; typical: the distance from the middle
    represents: int  # number of candidates for the same role to which it is the nearest tile, itself included
    stratum: str | None = None  # the class for which it was drawn, where label maps were given


@dataclass(frozen=True)
class SceneRecord:
    """A scene from which tiles come."""

    path: str
    sha256: str | None  # SHA-256 of the file; None for a subdataset or a URL
    bytes: int | None
    stretch: list[list[float]] | None = None  # per channel, what became 0 and 255; None: 8-bit, left as it is


@dataclass(frozen=True)
class SetManifest:
    """``set.json``."""

    tile: int  # side of every tile, px
    seed: int
    method: dict[str, Any]  # how tiles were described and chosen
    options: dict[str, Any]  # the options of `calibrate`
    counts: dict[str, int]  # numbers of scenes and tiles, and of tiles left out by reason
    scenes: tuple[SceneRecord, ...]
    tiles: tuple[TileRecord, ...]
    notes: tuple[str, ...] = ()
    tool: str = field(default_factory=lambda: f"cdkd-edge {__version__}")
    set_version: int = SET_VERSION

    def of_role(self, role: Role) -> tuple[TileRecord, ...]:
        """The tiles of a role, in the order of their files."""
        return tuple(tile for tile in self.tiles if tile.role == role)


@dataclass(frozen=True)
class SetTiles:
    """The tiles of a role, RGB ``[3, T, T]``, read one at a time and checked, again and again.

    Raises:
        ManifestError: a tile cannot be read, or is not what the manifest says.
    """

    folder: Path
    records: tuple[TileRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return map(self._read, self.records)

    def _read(self, record: TileRecord) -> npt.NDArray[np.uint8]:
        from PIL import Image

        path, side = self.folder / record.file, record.width
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                kind = (picture.mode, *picture.size)
                pixels = np.asarray(picture) if kind == ("RGB", side, side) else None
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ManifestError(f"tile {path} cannot be read: {error}") from None
        if pixels is None:
            shown = "{}, {} x {} px".format(*kind)
            raise ManifestError(f"{path} is {shown}; tiles of this set are RGB, {side} x {side} px")
        tile: npt.NDArray[np.uint8] = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        if pixels_sha256(tile) != record.sha256:
            raise ManifestError(
                f"{path} is not the tile that its set describes (SHA-256 of its pixels differs)",
                hint="it was edited or damaged; make the set again with `cdkd-edge calibrate`",
            )
        return tile


@dataclass(frozen=True)
class CalibrationSet:
    """An open calibration set."""

    folder: Path
    manifest: SetManifest
    sha256: str  # SHA-256 of ``set.json``, which holds that of every tile: it identifies the whole set

    @classmethod
    def load(cls, folder: Path) -> CalibrationSet:
        """Open a set; ManifestError as :func:`read_set_manifest`, or if a tile is missing."""
        manifest = read_set_manifest(folder)
        missing = [tile.file for tile in manifest.tiles if not (folder / tile.file).is_file()]
        if missing:
            raise ManifestError(
                f"calibration set {folder} lacks {len(missing)} of {len(manifest.tiles)} tiles, e.g. {missing[0]}",
                hint="copy the whole folder, or make it again with `cdkd-edge calibrate`",
            )
        return cls(folder, manifest, sha256_of(folder / SET_FILE))

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(os.path.realpath(self.folder)).name

    @property
    def tile(self) -> int:
        """Side of the tiles, px."""
        return self.manifest.tile

    def tiles(self, role: Role = "calibration") -> SetTiles:
        """The tiles of a role."""
        return SetTiles(self.folder, self.manifest.of_role(role))


def pixels_sha256(tile: npt.NDArray[np.uint8]) -> str:
    """Hexadecimal SHA-256 of a tile's pixels, uint8 ``[3, T, T]``, channel by channel and row by row."""
    return hashlib.sha256(np.ascontiguousarray(tile).data).hexdigest()


def is_calibration_set(folder: Path) -> bool:
    """Whether a folder holds a calibration set of any version, by its ``set.json``."""
    try:
        document = read_json(folder / SET_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("kind") == SET_KIND


def write_tile(path: Path, tile: npt.NDArray[np.uint8]) -> None:
    """Write a tile ``[3, T, T]`` as PNG."""
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).save(path, format="PNG")


def write_set_manifest(folder: Path, manifest: SetManifest) -> None:
    """Write ``set.json`` (atomically)."""
    import msgspec

    document = {"kind": SET_KIND, **msgspec.to_builtins(manifest)}
    write_text(folder / SET_FILE, msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def read_set_manifest(folder: Path) -> SetManifest:
    """Read and check ``set.json``; ManifestError if it is missing, damaged, of another kind or another version."""
    import msgspec

    path = folder / SET_FILE
    try:
        document = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "has no set.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise ManifestError(
            f"calibration set {folder} {what}", hint="make one: cdkd-edge calibrate SCENES... -o FOLDER"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict) or document.pop("kind", None) != SET_KIND:
        raise ManifestError(f"{path} is not the manifest of a calibration set")
    if document.get("set_version") != SET_VERSION:
        raise ManifestError(
            f"{path} has version {document.get('set_version')}; this release reads {SET_VERSION}",
            hint="make the set again with `cdkd-edge calibrate`",
        )
    try:
        manifest = msgspec.convert(document, SetManifest)
    except msgspec.ValidationError as error:
        raise ManifestError(f"{path} is damaged: {error}") from None
    if problem := _problem(manifest):
        raise ManifestError(f"{path} is damaged: {problem}")
    return manifest


def _problem(manifest: SetManifest) -> str | None:
    """What is wrong with a manifest whose fields have the right types; None if nothing is."""
    files = [tile.file for tile in manifest.tiles]
    scenes = {scene.path for scene in manifest.scenes}
    if manifest.tile < 1:
        return f"tiles of {manifest.tile} px"
    if not manifest.of_role("calibration"):
        return "it lists no tile for calibration"
    for tile in manifest.tiles:
        # The set may come from elsewhere; a name must not lead out of its folder.
        if not _TILE_FILE.fullmatch(tile.file) or not tile.file.startswith(f"{tile.role}/"):
            return f"{tile.file!r} is not the name of a {tile.role} tile"
        if (tile.width, tile.height) != (manifest.tile, manifest.tile):
            return f"{tile.file} is {tile.width} x {tile.height} px in a set of {manifest.tile} px"
        if tile.scene not in scenes:
            return f"the scene of {tile.file} is not listed"
    if len(set(files)) != len(files):
        return "it lists a tile twice"
    return None
