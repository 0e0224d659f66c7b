"""A picture for people: the scene, the label map over it, a legend with areas, and a scale bar."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.raster.areas import WGS84, Areas, centre_corners, to_wgs84
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.segment.options import SegmentOptions

LONGEST_SIDE = 1200
"""Of each of the two pictures, px."""

_OVERSAMPLED = 2
"""Scene and labels are read this much finer and averaged, so that thin roads don't break up."""

_OPACITY, _BORDER_OPACITY = 0.5, 0.9
_DULLED, _LIFTED = 0.5, 70
"""Under the labels the scene is half grey, so that its own colours don't pass for classes, and its black is this
light, so that colours over shadow and water are those of the legend."""

_PAPER, _INK, _QUIET, _NO_DATA = (255, 255, 255), (28, 32, 38), (96, 104, 114), (232, 232, 232)
_SMALL_HA = 0.1
_STRIP = 128
"""Rows coloured at once."""

_Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Look:
    """Sizes that follow the picture's, px."""

    font: int
    margin: int

    @classmethod
    def of(cls, longest: int) -> _Look:
        font = min(30, max(14, round(longest / 52)))
        return cls(font, font)

    def text(self, factor: float = 1.0) -> Any:
        return ImageFont.load_default(round(self.font * factor))


def write_preview(
    scene: str | Path,
    label_map: Path,
    schema: LabelSchema,
    areas: Areas,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    longest_side: int = LONGEST_SIDE,
    *,
    stamp: Mapping[str, str] | None = None,
) -> None:
    """Draw the scene and, beside or below it, the label map over the scene (PNG).

    The legend has name, colour, share of the labelled area and hectares of every class that occurs. The scale bar is
    measured on the ellipsoid along the middle row, and left out where the scene has no map grid. North is where the
    scene has it; an arrow says where that is. Scenes and label maps with overviews are read from these.

    Args:
        scene: the raster that was labelled.
        label_map: its label map.
        schema: classes of the label map.
        areas: of the label map.
        output: the picture (``.png``).
        options: bands and stretch, as in the run.
        longest_side: of each of the two pictures, px.
        stamp: what the file says about its making.

    Raises:
        SceneError: scene or label map cannot be read.
        OSError: the folder cannot be written.
    """
    reader = dataclasses.replace(options, gsd=None, strict=False).open(scene)
    try:
        image = reader.overview(longest_side * _OVERSAMPLED)
    finally:
        reader.close()
    dataset = open_scene(label_map)
    with dataset, gdal(f"reading {label_map}"):
        shown = _reduced_size(dataset.height, dataset.width, longest_side)
        labels = dataset.read(1, out_shape=image.shape[:2])
        bar = _metres_along_row(dataset)
        metres_per_px = None if bar is None else bar * dataset.width / shown[1]
        north = _north(dataset)
    image = np.where((labels == NO_LABEL)[..., None] & (image == 0).all(2)[..., None], np.uint8(_NO_DATA[0]), image)
    look = _Look.of(max(shown))
    left = _reduced(image, shown)
    right = _reduced(overlaid(image, labels, schema, line=max(1, round(image.shape[0] / shown[0]))), shown)
    _draw_scale_bar(right, metres_per_px, look)
    _draw_north(right, north, look)
    picture = _composed([left, right], _legend(schema, areas), look)
    texts = PngInfo()
    for key, value in (stamp or {}).items():
        texts.add_text(key, value)
    with whole_file(output) as temporary:
        picture.save(temporary, format="PNG", pnginfo=texts)


def overlaid(image: _Picture, labels: _Picture, schema: LabelSchema, line: int = 1) -> _Picture:
    """Labels ``[H, W]`` over a scene ``[H, W, 3]``: colour washes, and borders in a darker tone of their class.

    ``line`` is the width of the borders, px on each side.
    """
    border = np.zeros(labels.shape, bool)
    for shift in range(1, line + 1):
        down, right = labels[shift:] != labels[:-shift], labels[:, shift:] != labels[:, :-shift]
        border[shift:] |= down
        border[:-shift] |= down
        border[:, shift:] |= right
        border[:, :-shift] |= right
    result = np.empty_like(image)
    for start in range(0, len(image), _STRIP):  # floats take four times the room
        rows = slice(start, start + _STRIP)
        result[rows] = _washed(image[rows], labels[rows], border[rows], schema)
    return result


def _washed(image: _Picture, labels: _Picture, border: npt.NDArray[np.bool_], schema: LabelSchema) -> _Picture:
    labelled = (labels != NO_LABEL)[..., None]
    pixels = image.astype(np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    faded = pixels + _DULLED * (grey[..., None] - pixels)
    pixels = np.where(labelled, _LIFTED + faded * np.float32((255 - _LIFTED) / 255), pixels)
    opacity = np.where(border, np.float32(_BORDER_OPACITY), np.float32(_OPACITY))[..., None] * labelled
    tint = schema.palette().astype(np.float32)[labels] * np.where(border, np.float32(0.75), np.float32(1))[..., None]
    washed: _Picture = np.rint(pixels * (1 - opacity) + tint * opacity).astype(np.uint8)
    return washed


def _reduced_size(height: int, width: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _reduced(pixels: _Picture, shape: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture if pixels.shape[:2] == shape else picture.resize(shape[::-1], Image.Resampling.BOX)


def _metres_along_row(dataset: Any) -> float | None:
    """Ground length of a pixel along the row at the centre, m."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None
    placed = to_wgs84(dataset.crs, *centre_corners(dataset))
    if placed is None:
        return None
    corner, right, _ = WGS84.positions(*placed)
    length = float(np.linalg.norm(right - corner))
    return length if length > 0 else None


def _north(dataset: Any) -> tuple[float, float] | None:
    """Direction of grid north in the picture (x right, y down), of length 1."""
    t = dataset.transform
    if dataset.crs is None or t.is_identity or t.determinant == 0:
        return None
    right, down = -t.b / t.determinant, t.a / t.determinant  # the inverse of the transform, applied to (0, 1)
    length = math.hypot(right, down)
    return right / length, down / length


def round_length(longest: float) -> float:
    """The longest of 1, 2, 5, 10, ... that is not above ``longest`` (m)."""
    power = 10.0 ** math.floor(math.log10(longest))
    return max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9))


def _draw_scale_bar(picture: Image.Image, metres_per_px: float | None, look: _Look) -> None:
    if metres_per_px is None or picture.width < 8 * look.font or picture.height < 5 * look.font:
        return
    length = round_length(metres_per_px * picture.width / 4)
    side = round(length / metres_per_px)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m" if length >= 0.01 else f"{length * 1000:g} mm"
    font, pad, thick = look.text(), look.font // 2, max(3, look.font // 5)
    wide = round(max(side, ImageDraw.Draw(picture).textlength(text, font=font)))
    x1, y1 = picture.width - look.font, picture.height - look.font
    box = (x1 - wide - 2 * pad, y1 - round(2.2 * look.font) - pad, x1, y1)
    _plate(picture, box)
    draw = ImageDraw.Draw(picture)
    middle = (box[0] + box[2]) / 2
    draw.text((middle, box[1] + pad), text, fill=_INK, font=font, anchor="mt")
    y = box[3] - pad
    draw.rectangle((middle - side / 2, y - thick, middle + side / 2, y), fill=_INK)


def _draw_north(picture: Image.Image, north: tuple[float, float] | None, look: _Look) -> None:
    radius = 1.3 * look.font
    if north is None or min(picture.size) < 6 * radius:
        return
    x, y = picture.width - look.font - radius, look.font + radius
    _plate(picture, (round(x - radius), round(y - radius), round(x + radius), round(y + radius)), round_corners=True)
    draw = ImageDraw.Draw(picture)
    dx, dy = north
    tip, base = 0.92 * radius, 0.1 * radius
    at = [(x + dx * tip, y + dy * tip)]
    at += [(x + dx * base + side * dy * 0.34 * radius, y + dy * base - side * dx * 0.34 * radius) for side in (1, -1)]
    draw.polygon(at, fill=_INK)
    draw.text((x - dx * 0.42 * radius, y - dy * 0.42 * radius), "N", fill=_INK, font=look.text(0.95), anchor="mm")


def _plate(picture: Image.Image, box: tuple[int, int, int, int], *, round_corners: bool = False) -> None:
    """Let a part of the picture fade, so that ink is legible on it."""
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if round_corners else draw.rectangle)(box, fill=205)
    picture.paste(_PAPER, (0, 0), mask)


@dataclass(frozen=True)
class _Entry:
    color: tuple[int, int, int]
    name: str
    share: str
    area: str


def _legend(schema: LabelSchema, areas: Areas) -> list[_Entry]:
    """Classes that occur, in schema order, then what has no data; shares are of the labelled pixels."""
    labelled = sum(area.pixels for area in areas.classes)
    rows = [(cls.color, area) for cls, area in zip(schema.classes, areas.classes, strict=True) if area.pixels]
    entries = [_Entry(color, a.name, _percent(a.pixels / labelled), _hectares(a.hectares)) for color, a in rows]
    if areas.no_data.pixels:
        entries.append(_Entry(_NO_DATA, "no data", "", _hectares(areas.no_data.hectares)))
    return entries


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.0005 else f"{share:.1%}".replace("%", " %")


def _hectares(hectares: float | None) -> str:
    if hectares is None:
        return ""
    if hectares < _SMALL_HA:  # not in square metres: the font has no raised two
        return f"{hectares:.4f} ha"
    decimals = 2 if hectares < 10 else 1 if hectares < 1000 else 0
    return f"{hectares:,.{decimals}f} ha".replace(",", " ")


def _composed(panels: Sequence[Image.Image], legend: Sequence[_Entry], look: _Look) -> Image.Image:
    """Panels in a row, or above each other if they are wide, with the legend below."""
    width, height = panels[0].size
    stacked = width > 1.6 * height
    across, along = (width, height * 2 + look.margin) if stacked else (width * 2 + look.margin, height)
    table, measure = look.text(), ImageDraw.Draw(panels[0])
    swatch, gap = round(look.font * 1.1), look.font // 2
    cells = [
        [round(measure.textlength(text, font=table)) for text in (entry.name, entry.share, entry.area)]
        for entry in legend
    ]
    # Columns of one width, so that figures stand below each other.
    name, share, area = (max((cell[i] for cell in cells), default=0) for i in range(3))
    cell = swatch + gap + name + 2 * gap + share + (2 * gap + area if area else 0)
    columns = max(1, min(len(legend), (across + 3 * gap) // (cell + 3 * gap)))
    rows = -(-len(legend) // columns)
    line = round(look.font * 1.75)
    total_width = max(across, cell) + 2 * look.margin
    picture = Image.new("RGB", (total_width, along + rows * line + (3 if rows else 2) * look.margin), _PAPER)
    picture.paste(panels[0], (look.margin, look.margin))
    second = (0, height + look.margin) if stacked else (width + look.margin, 0)
    picture.paste(panels[1], (look.margin + second[0], look.margin + second[1]))
    draw = ImageDraw.Draw(picture)
    for index, entry in enumerate(legend):
        column, row = divmod(index, rows)
        x = look.margin + column * (cell + 3 * gap)
        y = along + 2 * look.margin + row * line
        draw.rectangle((x, y, x + swatch, y + swatch), fill=entry.color, outline=_QUIET)
        middle = y + swatch / 2
        x += swatch + gap
        draw.text((x, middle), entry.name, fill=_INK, font=table, anchor="lm")
        x += name + 2 * gap + share
        draw.text((x, middle), entry.share, fill=_INK, font=table, anchor="rm")
        draw.text((x + 2 * gap + area, middle), entry.area, fill=_QUIET, font=table, anchor="rm")
    return picture
