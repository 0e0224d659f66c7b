"""Draws the preview: the scene, the label map over the scene, a legend with areas, a scale bar and a north arrow."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import NO_LABEL, LabelSchema
from cdkd_edge.core.numbers import percent
from cdkd_edge.raster.areas import WGS84, Areas, centre_corners, to_wgs84
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.segmentation.options import SegmentOptions

LONGEST_SIDE = 1200  # of the scene and of the overlay, px each

_OVERSAMPLED = 2  # scene and labels are read at this multiple of the size and averaged: thin roads do not break up
_OPACITY, _BORDER_OPACITY = 0.5, 0.9
# Below the labels the scene is half grey, so that its colours are not taken for classes, and black becomes this grey
# value, so that colours over shadow and water look like those of the legend.
_GREY_SHARE, _BLACK_LEVEL = 0.5, 70
_PAPER, _INK, _QUIET, _NO_DATA = (255, 255, 255), (28, 32, 38), (96, 104, 114), (232, 232, 232)
_PLATE = (*_PAPER, 205)  # fades the picture below text, so that it can be read
_SMALL_HA = 0.1
_STRIP = 128  # rows coloured at a time: floats take four times the memory of bytes

_Picture = npt.NDArray[np.uint8]


def _font(size: float) -> Any:
    return ImageFont.load_default(round(size))


def write_preview(
    scene: str | Path,
    label_map: Path,
    schema: LabelSchema,
    areas: Areas,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    longest_side: int = LONGEST_SIDE,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Draw the scene and, beside or below it, the label map over the scene (PNG).

    The legend names every class that occurs, with its share of the labelled area and its hectares. The scale bar is
    measured on the ellipsoid along the middle row; without a map grid there is neither bar nor north arrow. Overviews
    of the scene and the label map are used where they exist. Raises SceneError if one of the two cannot be read.

    ``options`` are the run's, for bands and stretch; ``longest_side`` is of the scene and of the overlay, px each;
    ``metadata`` is stored in the file's text chunks.
    """
    with contextlib.closing(dataclasses.replace(options, gsd=None, strict=False).open(scene)) as reader:
        image = reader.overview(longest_side * _OVERSAMPLED)
    with open_scene(label_map) as dataset, gdal(f"reading {label_map}"):
        shown = _reduced_size(dataset.height, dataset.width, longest_side)
        labels = dataset.read(1, out_shape=image.shape[:2])
        bar = _metres_along_row(dataset)
        metres_per_px = None if bar is None else bar * dataset.width / shown[1]
        north = _north(dataset)
    image = np.where((labels == NO_LABEL)[..., None] & (image == 0).all(2)[..., None], np.uint8(_NO_DATA[0]), image)
    size = min(30, max(14, round(max(shown) / 52)))  # of the font, px; margins follow it
    left = _reduced(image, shown)
    right = _reduced(overlaid(image, labels, schema, line=max(1, round(image.shape[0] / shown[0]))), shown)
    _draw_scale_bar(right, metres_per_px, size)
    _draw_north(right, north, size)
    picture = _composed([left, right], _legend(schema, areas), size)
    texts = PngInfo()
    for key, value in (metadata or {}).items():
        texts.add_text(key, value)
    with whole_file(output) as temporary:
        picture.save(temporary, format="PNG", pnginfo=texts)


def overlaid(image: _Picture, labels: _Picture, schema: LabelSchema, line: int = 1) -> _Picture:
    """Draw labels ``[H, W]`` over a scene ``[H, W, 3]``: a transparent colour, and borders in a darker tone of it.

    ``line`` is the width of a border on each of its sides, px.
    """
    border = np.zeros(labels.shape, bool)
    for shift in range(1, line + 1):
        down, right = labels[shift:] != labels[:-shift], labels[:, shift:] != labels[:, :-shift]
        border[shift:] |= down
        border[:-shift] |= down
        border[:, shift:] |= right
        border[:, :-shift] |= right
    palette = schema.palette().astype(np.float32)
    result = np.empty_like(image)
    for start in range(0, len(image), _STRIP):
        rows = slice(start, start + _STRIP)
        labelled = (labels[rows] != NO_LABEL)[..., None]
        pixels = image[rows].astype(np.float32)
        grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        faded = pixels + _GREY_SHARE * (grey[..., None] - pixels)
        pixels = np.where(labelled, _BLACK_LEVEL + faded * np.float32((255 - _BLACK_LEVEL) / 255), pixels)
        opacity = np.where(border[rows], np.float32(_BORDER_OPACITY), np.float32(_OPACITY))[..., None] * labelled
        tint = palette[labels[rows]] * np.where(border[rows], np.float32(0.75), np.float32(1))[..., None]
        result[rows] = np.rint(pixels * (1 - opacity) + tint * opacity).astype(np.uint8)
    return result


def _reduced_size(height: int, width: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _reduced(pixels: _Picture, shape: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture if pixels.shape[:2] == shape else picture.resize(shape[::-1], Image.Resampling.BOX)


def _metres_along_row(dataset: Any) -> float | None:
    """Length on the ground of a pixel in the centre row, m; None without a map grid."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None
    placed = to_wgs84(dataset.crs, *centre_corners(dataset))
    if placed is None:
        return None
    corner, right, _ = WGS84.positions(*placed)
    length = float(np.linalg.norm(right - corner))
    return length if length > 0 else None


def _north(dataset: Any) -> tuple[float, float] | None:
    """Unit vector to grid north in the picture (x right, y down); None without a map grid."""
    t = dataset.transform
    if dataset.crs is None or t.is_identity or t.determinant == 0:
        return None
    right, down = -t.b / t.determinant, t.a / t.determinant  # the inverse of the transform, applied to (0, 1)
    length = math.hypot(right, down)
    return right / length, down / length


def round_length(longest: float) -> float:
    """The largest of ..., 1, 2, 5, 10, ... that is not above ``longest``."""
    power = 10.0 ** math.floor(math.log10(longest))
    return max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9))


def _draw_scale_bar(picture: Image.Image, metres_per_px: float | None, size: int) -> None:
    if metres_per_px is None or picture.width < 8 * size or picture.height < 5 * size:
        return
    length = round_length(metres_per_px * picture.width / 4)
    side = round(length / metres_per_px)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m" if length >= 0.01 else f"{length * 1000:g} mm"
    font, pad, thick, draw = _font(size), size // 2, max(3, size // 5), ImageDraw.Draw(picture, "RGBA")
    wide = round(max(side, draw.textlength(text, font=font)))
    x1, y1 = picture.width - size, picture.height - size
    box = (x1 - wide - 2 * pad, y1 - round(2.2 * size) - pad, x1, y1)
    draw.rectangle(box, fill=_PLATE)
    middle = (box[0] + box[2]) / 2
    draw.text((middle, box[1] + pad), text, fill=_INK, font=font, anchor="mt")
    y = box[3] - pad
    draw.rectangle((middle - side / 2, y - thick, middle + side / 2, y), fill=_INK)


def _draw_north(picture: Image.Image, north: tuple[float, float] | None, size: int) -> None:
    radius = 1.3 * size
    if north is None or min(picture.size) < 6 * radius:
        return
    x, y = picture.width - size - radius, size + radius
    draw, (dx, dy) = ImageDraw.Draw(picture, "RGBA"), north
    draw.ellipse((round(x - radius), round(y - radius), round(x + radius), round(y + radius)), fill=_PLATE)
    tip, base = 0.92 * radius, 0.1 * radius
    at = [(x + dx * tip, y + dy * tip)]
    at += [(x + dx * base + side * dy * 0.34 * radius, y + dy * base - side * dx * 0.34 * radius) for side in (1, -1)]
    draw.polygon(at, fill=_INK)
    draw.text((x - dx * 0.42 * radius, y - dy * 0.42 * radius), "N", fill=_INK, font=_font(0.95 * size), anchor="mm")


class _Entry(NamedTuple):
    color: tuple[int, int, int]
    name: str
    share: str
    area: str


def _legend(schema: LabelSchema, areas: Areas) -> list[_Entry]:
    """The classes that occur, in schema order, then "no data"; shares are of the labelled pixels."""
    labelled = sum(area.pixels for area in areas.classes)
    rows = [(cls.shown, area) for cls, area in zip(schema.classes, areas.classes, strict=True) if area.pixels]
    entries = [_Entry(color, a.name, percent(a.pixels / labelled), _hectares(a.hectares)) for color, a in rows]
    if areas.no_data.pixels:
        entries.append(_Entry(_NO_DATA, "no data", "", _hectares(areas.no_data.hectares)))
    return entries


def _hectares(hectares: float | None) -> str:
    if hectares is None:
        return ""
    if hectares < _SMALL_HA:  # not in square metres: the font has no raised two
        return f"{hectares:.4f} ha"
    decimals = 2 if hectares < 10 else 1 if hectares < 1000 else 0
    return f"{hectares:,.{decimals}f} ha".replace(",", " ")


def _composed(panels: Sequence[Image.Image], legend: Sequence[_Entry], size: int) -> Image.Image:
    """Place the panels side by side, or above each other if they are wide, and the legend below."""
    width, height = panels[0].size
    stacked = width > 1.6 * height
    across, along = (width, height * 2 + size) if stacked else (width * 2 + size, height)
    table, measure = _font(size), ImageDraw.Draw(panels[0])
    swatch, gap = round(size * 1.1), size // 2
    # Columns of one width, so that numbers are aligned.
    texts = [("", "", ""), *((entry.name, entry.share, entry.area) for entry in legend)]
    widths = [[round(measure.textlength(text, font=table)) for text in row] for row in texts]
    name, share, area = np.max(widths, axis=0).tolist()
    cell = swatch + gap + name + 2 * gap + share + (2 * gap + area if area else 0)
    columns = max(1, min(len(legend), (across + 3 * gap) // (cell + 3 * gap)))
    rows = -(-len(legend) // columns)
    line = round(size * 1.75)
    total_width = max(across, cell) + 2 * size
    picture = Image.new("RGB", (total_width, along + rows * line + (3 if rows else 2) * size), _PAPER)
    picture.paste(panels[0], (size, size))
    second = (0, height + size) if stacked else (width + size, 0)
    picture.paste(panels[1], (size + second[0], size + second[1]))
    draw = ImageDraw.Draw(picture)
    for index, entry in enumerate(legend):
        column, row = divmod(index, rows)
        x = size + column * (cell + 3 * gap)
        y = along + 2 * size + row * line
        draw.rectangle((x, y, x + swatch, y + swatch), fill=entry.color, outline=_QUIET)
        middle = y + swatch / 2
        x += swatch + gap
        draw.text((x, middle), entry.name, fill=_INK, font=table, anchor="lm")
        x += name + 2 * gap + share
        draw.text((x, middle), entry.share, fill=_INK, font=table, anchor="rm")
        draw.text((x + 2 * gap + area, middle), entry.area, fill=_QUIET, font=table, anchor="rm")
    return picture
