"""Pictures in a row with a legend under them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cdkd_edge.core.labels import NO_LABEL, LabelSchema

NO_DATA_COLOR = (235, 235, 235)

_PAPER, _INK, _QUIET = (255, 255, 255), (28, 32, 38), (110, 118, 128)
_MARGIN, _FONT = 16, 17

LegendEntry = tuple[tuple[int, int, int], str, str]
"""Colour, name and what to say of it."""


def colored(labels: npt.NDArray[np.uint8], schema: LabelSchema) -> npt.NDArray[np.uint8]:
    """Labels ``[H, W]`` in the schema's colours, RGB ``[H, W, 3]``; no label is light grey."""
    palette = schema.palette()
    palette[NO_LABEL] = NO_DATA_COLOR
    return palette[labels]


def in_a_row(pictures: Sequence[npt.NDArray[np.uint8]], titles: Sequence[str] = ()) -> Image.Image:
    """RGB pictures ``[H, W, 3]`` of one size beside each other, each under its title if there are titles."""
    height, width = pictures[0].shape[:2]
    top = _MARGIN + (_FONT + 8 if titles else 0)
    picture = Image.new("RGB", (len(pictures) * (width + _MARGIN) + _MARGIN, height + top + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, pixels in enumerate(pictures):
        left = _MARGIN + index * (width + _MARGIN)
        picture.paste(Image.fromarray(pixels), (left, top))
        if titles:
            draw.text((left, _MARGIN - 2), titles[index], fill=_INK, font=ImageFont.load_default(_FONT))
    return picture


def with_legend(picture: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """The picture with a legend below, in as many lines as it needs."""
    font = ImageFont.load_default(_FONT)
    swatch, gap, line = _FONT, 8, _FONT + 14
    measure = ImageDraw.Draw(picture)
    widths = [swatch + gap + measure.textlength(f"{name}  {share}", font=font) + 28 for _, name, share in entries]
    positions, x, row = [], float(_MARGIN), 0
    for width in widths:
        if x + width > picture.width - _MARGIN and x > _MARGIN:
            x, row = float(_MARGIN), row + 1
        positions.append((x, row))
        x += width
    canvas = Image.new("RGB", (picture.width, picture.height + (row + 1) * line + 4), _PAPER)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (x, row), (color, name, share) in zip(positions, entries, strict=True):
        y = picture.height + row * line - 4
        draw.rectangle((x, y, x + swatch, y + swatch), fill=color, outline=_QUIET)
        draw.text((x + swatch + gap, y - 1), name, fill=_INK, font=font)
        offset = draw.textlength(f"{name}  ", font=font)
        draw.text((x + swatch + gap + offset, y - 1), share, fill=_QUIET, font=font)
    return canvas
