"""Writes a calibration set: the chosen tiles, a manifest, and a contact sheet that shows them."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cdkd_edge.core.errors import SceneError, printable
from cdkd_edge.core.files import sha256_of, whole_file
from cdkd_edge.graph.tiles import (
    SHEET_FILE,
    Role,
    SceneRecord,
    SetManifest,
    TileRecord,
    pixels_sha256,
    write_set_manifest,
    write_tile,
)
from cdkd_edge.precision.choose_tiles import Choice, ChosenTile
from cdkd_edge.precision.scan_scenes import Candidates
from cdkd_edge.raster.grid import Span
from cdkd_edge.segmentation.options import SegmentOptions

# One for each of :data:`.choose.MAX_KINDS`; in a grey print they still differ from the paper
KIND_COLORS = (
    (64, 120, 176), (214, 132, 52), (90, 148, 86), (178, 78, 84),
    (132, 104, 168), (150, 118, 92), (70, 160, 160), (190, 164, 52),
)  # fmt: skip

_PAPER, _INK, _QUIET, _RULE = (255, 255, 255), (28, 32, 38), (110, 118, 128), (222, 226, 230)
_MARGIN, _GAP, _STRIP = 28, 14, 6
_TITLE, _TEXT, _SMALL = 27, 16, 12
_CAPTION = 2 * (_SMALL + 4) + 6


@dataclass(frozen=True)
class SheetTile:
    """A tile on the sheet."""

    picture: npt.NDArray[np.uint8]  # RGB ``[S, S, 3]``, see :func:`shrink_tile`
    caption: str
    detail: str
    kind: int


@dataclass(frozen=True)
class Sheet:
    """The content of a contact sheet."""

    title: str
    lines: tuple[str, ...]
    kinds: tuple[str, ...]  # legend: the text of each kind
    sections: tuple[tuple[str, str, tuple[SheetTile, ...]], ...]  # heading, remark and tiles of each section


def write_set(
    folder: Path,
    name: str,
    candidates: Candidates,
    choice: Choice,
    reading: SegmentOptions,
    description: dict[str, Any],
) -> SetManifest:
    """Write a set called ``name`` into an empty folder.

    Tiles are read again with ``reading``, as in the scan; SceneError if a scene changed meanwhile. ``description`` are
    the manifest's fields about the whole set.
    """
    side = thumbnail_side(len(choice.calibration) + len(choice.check))
    records: dict[int, TileRecord] = {}
    pictures: dict[int, npt.NDArray[np.uint8]] = {}
    by_scene: dict[int, list[int]] = defaultdict(list)
    roles: dict[Role, tuple[ChosenTile, ...]] = {"calibration": choice.calibration, "check": choice.check}
    for role, tiles in roles.items():
        for number, tile in enumerate(tiles):
            records[tile.index] = _record(candidates, tile, role, number)
            by_scene[int(candidates.scene[tile.index])].append(tile.index)
    scenes = []
    for scene, indices in sorted(by_scene.items()):
        tiled = candidates.scenes[scene]
        limits = candidates.limits.get(scene)
        reader = dataclasses.replace(reading, strict=False).open(tiled.path, limits)
        try:
            pixels = np.empty((3, tiled.tile, tiled.tile), np.uint8)
            for index in sorted(indices):
                x, y = candidates.place[index].tolist()
                reader.read_tile(Span(y, 0, tiled.height), Span(x, 0, tiled.width), pixels)
                if pixels_sha256(pixels) != candidates.pixels[index]:
                    raise SceneError(f"{tiled.path} changed while it was read")
                write_tile(folder / records[index].file, pixels)
                pictures[index] = shrink_tile(pixels, side)
        finally:
            reader.close()
        path = Path(tiled.path)
        sha256, size = (sha256_of(path), path.stat().st_size) if path.is_file() else (None, None)
        scenes.append(SceneRecord(tiled.path, sha256, size, None if limits is None else limits.tolist()))
    in_order = tuple(records[tile.index] for tiles in roles.values() for tile in tiles)
    manifest = SetManifest(scenes=tuple(scenes), tiles=in_order, **description)
    write_set_manifest(folder, manifest)
    write_sheet(folder / SHEET_FILE, _sheet(name, manifest, choice, pictures))
    return manifest


def _record(candidates: Candidates, tile: ChosenTile, role: Role, number: int) -> TileRecord:
    scene = candidates.scenes[int(candidates.scene[tile.index])]
    x, y = candidates.place[tile.index].tolist()
    where = (scene.path, x, y, scene.tile, scene.tile)
    chosen = (tile.kind, tile.why, tile.score, tile.represents, tile.stratum)
    return TileRecord(f"{role}/{number:04}.png", str(candidates.pixels[tile.index]), *where, role, *chosen)


def _sheet(name: str, manifest: SetManifest, choice: Choice, pictures: dict[int, npt.NDArray[np.uint8]]) -> Sheet:
    counts, coverage = manifest.counts, manifest.method["coverage"]
    calibration, check = manifest.of_role("calibration"), manifest.of_role("check")
    reasons = [reason for reason in ("nodata", "blank", "excluded", "near_duplicate") if counts.get(reason)]
    left_out = "".join(f", {counts[reason]} {reason.replace('_', ' ')}" for reason in reasons)
    seen = counts["scenes"] - counts["scenes_excluded"] - counts["scenes_broken"]
    lines = (
        f"{manifest.tile} x {manifest.tile} px, seed {manifest.seed}; from {counts['candidates']} candidates "
        f"(tiles looked at: {counts['tiles_seen']}, scenes: {seen}{left_out})",
        f"distance of a candidate from the nearest tile: mean {coverage['mean_distance']:.2f}, "
        f"largest {coverage['largest_distance']:.2f} (random choice: {coverage['random_mean_distance']:.2f}, "
        f"{coverage['random_largest_distance']:.2f})",
    )

    def drawn(chosen: tuple[ChosenTile, ...], records: tuple[TileRecord, ...]) -> tuple[SheetTile, ...]:
        tiles = []
        for tile, record in zip(chosen, records, strict=True):
            detail = f"{record.x}, {record.y}   {record.stratum or record.why} {record.represents}"
            tiles.append(SheetTile(pictures[tile.index], Path(record.scene).stem, detail, record.cluster))
        return tuple(tiles)

    first = (f"{len(calibration)} tiles for calibration", "number: candidates like it")
    second = (f"{len(check)} tiles to check on", "never used for calibration")
    kinds = tuple(f"kind {kind}: {share:.0%}" for kind, share in enumerate(choice.kind_shares))
    sections = ((*first, drawn(choice.calibration, calibration)), (*second, drawn(choice.check, check)))
    return Sheet(f"Calibration set {name}", lines, kinds, sections)


def thumbnail_side(count: int) -> int:
    """Side of the pictures on a sheet, px: fewer tiles are shown larger."""
    return 160 if count <= 120 else 112 if count <= 400 else 72


def shrink_tile(tile: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A tile ``[3, T, T]`` as a picture ``[side, side, 3]``."""
    picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX if tile.shape[1] > side else 0))


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Draw a contact sheet (PNG)."""
    side = max((len(tile.picture) for *_, tiles in sheet.sections for tile in tiles), default=160)
    most = max((len(tiles) for *_, tiles in sheet.sections), default=1)
    columns = min(max(5, most), 8 if side >= 160 else 12 if side >= 112 else 18)
    room = columns * (side + _GAP) - _GAP
    width = room + 2 * _MARGIN
    cell = side + _STRIP + _CAPTION + _GAP
    legend = _legend_rows(sheet.kinds, room)
    header = _MARGIN + _TITLE + 14 + len(sheet.lines) * (_TEXT + 7) + 12 + len(legend) * (_TEXT + 12)
    heights = [_TEXT + 34 + -(-len(tiles) // columns) * cell for *_, tiles in sheet.sections if tiles]
    picture = Image.new("RGB", (width, header + sum(heights) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)

    def write(x: float, y: int, text: str, size: int, color: tuple[int, int, int], room: int) -> None:
        draw.text((x, y), _fitting(text, room, size), fill=color, font=_font(size))

    y = _MARGIN - 6
    write(_MARGIN, y, sheet.title, _TITLE, _INK, room)
    y += _TITLE + 14
    for line in sheet.lines:
        write(_MARGIN, y, line, _TEXT, _QUIET, room)
        y += _TEXT + 7
    y += 8
    for row in legend:
        for x, kind, text in row:
            draw.rectangle((_MARGIN + x, y + 2, _MARGIN + x + 14, y + 16), fill=KIND_COLORS[kind % len(KIND_COLORS)])
            write(_MARGIN + x + 22, y, text, _TEXT, _INK, room)
        y += _TEXT + 12
    for heading, remark, tiles in sheet.sections:
        if not tiles:
            continue
        draw.line((_MARGIN, y + 6, width - _MARGIN, y + 6), fill=_RULE, width=1)
        y += 16
        write(_MARGIN, y, heading, _TEXT + 2, _INK, room)
        offset = draw.textlength(heading + "   ", font=_font(_TEXT + 2))
        write(_MARGIN + offset, y + 2, remark, _TEXT, _QUIET, int(room - offset))
        y += _TEXT + 18
        for position, tile in enumerate(tiles):
            left = _MARGIN + position % columns * (side + _GAP)
            top = y + position // columns * cell
            picture.paste(Image.fromarray(tile.picture), (left, top))
            strip = (left, top + side, left + side - 1, top + side + _STRIP - 1)
            draw.rectangle(strip, fill=KIND_COLORS[tile.kind % len(KIND_COLORS)])
            below = top + side + _STRIP + 4
            write(left, below, tile.caption, _SMALL, _INK, side)
            write(left, below + _SMALL + 4, tile.detail, _SMALL, _QUIET, side)
        y += -(-len(tiles) // columns) * cell
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _legend_rows(kinds: Sequence[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Legend entries as (x, kind, text), broken into rows."""
    rows: list[list[tuple[int, int, str]]] = [[]]
    x = 0
    for kind, text in enumerate(kinds):
        length = 22 + int(_font(_TEXT).getlength(text)) + 26
        if x and x + length > width:
            rows.append([])
            x = 0
        rows[-1].append((x, kind, text))
        x += length
    return rows if rows[0] else []


def _fitting(text: str, width: int, size: int) -> str:
    """The text; if it is too long, without its middle, because names differ at both ends."""
    text = printable(text)
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    for keep in range(len(text) - 1, 1, -1):
        shorter = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return text[:1]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
