"""The contact sheet: every tile of a set, small, with where it comes from and which kind of imagery it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cdkd_edge.core.errors import printable
from cdkd_edge.core.files import whole_file

KIND_COLORS = (
    (64, 120, 176), (214, 132, 52), (90, 148, 86), (178, 78, 84),
    (132, 104, 168), (150, 118, 92), (70, 160, 160), (190, 164, 52),
)  # fmt: skip
"""One for each kind of imagery; eight that a print in grey still tells from the paper."""

KINDS = len(KIND_COLORS)

_PAPER, _INK, _QUIET, _RULE = (255, 255, 255), (28, 32, 38), (110, 118, 128), (222, 226, 230)
_MARGIN, _GAP, _STRIP = 28, 14, 6
_TITLE, _TEXT, _SMALL = 27, 16, 12
_CAPTION = 2 * (_SMALL + 4) + 6


@dataclass(frozen=True)
class SheetTile:
    """One picture of the sheet."""

    picture: npt.NDArray[np.uint8]
    """RGB ``[S, S, 3]``, as :func:`small` makes it."""
    caption: str
    detail: str
    kind: int


@dataclass(frozen=True)
class Sheet:
    """What is drawn."""

    title: str
    lines: tuple[str, ...]
    kinds: tuple[tuple[int, str], ...]
    """Kind and what to say of it, in the order of the legend."""
    sections: tuple[tuple[str, str, tuple[SheetTile, ...]], ...]
    """Heading, what to say of it, and its tiles."""


def thumbnail_side(count: int) -> int:
    """Side of a sheet's pictures, px: fewer tiles are shown larger."""
    return 160 if count <= 120 else 112 if count <= 400 else 72


def small(tile: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """A tile ``[3, T, T]`` as a picture ``[side, side, 3]``."""
    picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX if tile.shape[1] > side else 0))


def write_sheet(path: Path, sheet: Sheet) -> None:
    """Draw a contact sheet (PNG)."""
    side = max((len(tile.picture) for *_, tiles in sheet.sections for tile in tiles), default=160)
    most = max((len(tiles) for *_, tiles in sheet.sections), default=1)
    columns = min(max(5, most), 8 if side >= 160 else 12 if side >= 112 else 18)
    width = 2 * _MARGIN + columns * (side + _GAP) - _GAP
    cell = side + _STRIP + _CAPTION + _GAP
    legend = _legend_rows(sheet.kinds, width - 2 * _MARGIN)
    header = _MARGIN + _TITLE + 14 + len(sheet.lines) * (_TEXT + 7) + 12 + len(legend) * (_TEXT + 12)
    heights = [_TEXT + 34 + -(-len(tiles) // columns) * cell for *_, tiles in sheet.sections if tiles]
    picture = Image.new("RGB", (width, header + sum(heights) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    y = _MARGIN - 6
    draw.text((_MARGIN, y), _fitting(sheet.title, width - 2 * _MARGIN, _TITLE), fill=_INK, font=_font(_TITLE))
    y += _TITLE + 14
    for line in sheet.lines:
        draw.text((_MARGIN, y), _fitting(line, width - 2 * _MARGIN, _TEXT), fill=_QUIET, font=_font(_TEXT))
        y += _TEXT + 7
    y += 8
    for row in legend:
        for x, kind, text in row:
            draw.rectangle((_MARGIN + x, y + 2, _MARGIN + x + 14, y + 16), fill=KIND_COLORS[kind % KINDS])
            draw.text((_MARGIN + x + 22, y), text, fill=_INK, font=_font(_TEXT))
        y += _TEXT + 12
    for heading, remark, tiles in sheet.sections:
        if not tiles:
            continue
        draw.line((_MARGIN, y + 6, width - _MARGIN, y + 6), fill=_RULE, width=1)
        y += 16
        draw.text((_MARGIN, y), heading, fill=_INK, font=_font(_TEXT + 2))
        offset = draw.textlength(heading + "   ", font=_font(_TEXT + 2))
        room = int(width - 2 * _MARGIN - offset)
        draw.text((_MARGIN + offset, y + 2), _fitting(remark, room, _TEXT), fill=_QUIET, font=_font(_TEXT))
        y += _TEXT + 18
        for position, tile in enumerate(tiles):
            left = _MARGIN + position % columns * (side + _GAP)
            top = y + position // columns * cell
            picture.paste(Image.fromarray(tile.picture), (left, top))
            strip = (left, top + side, left + side - 1, top + side + _STRIP - 1)
            draw.rectangle(strip, fill=KIND_COLORS[tile.kind % KINDS])
            below = top + side + _STRIP + 4
            draw.text((left, below), _fitting(tile.caption, side, _SMALL), fill=_INK, font=_font(_SMALL))
            detail = _fitting(tile.detail, side, _SMALL)
            draw.text((left, below + _SMALL + 4), detail, fill=_QUIET, font=_font(_SMALL))
        y += -(-len(tiles) // columns) * cell
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _legend_rows(kinds: Sequence[tuple[int, str]], width: int) -> list[list[tuple[int, int, str]]]:
    """Entries as (x, kind, text), broken into rows."""
    rows: list[list[tuple[int, int, str]]] = [[]]
    x = 0
    for kind, text in kinds:
        length = 22 + int(_font(_TEXT).getlength(text)) + 26
        if x and x + length > width:
            rows.append([])
            x = 0
        rows[-1].append((x, kind, text))
        x += length
    return rows if rows[0] else []


def _fitting(text: str, width: int, size: int) -> str:
    """The text, its middle left out where it is too long: names differ at both ends."""
    text = printable(text)
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    for keep in range(len(text) - 1, 1, -1):
        shorter = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return text[:1]


_fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if size not in _fonts:
        _fonts[size] = ImageFont.load_default(size)
    return _fonts[size]
