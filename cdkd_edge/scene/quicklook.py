"""A picture to look at: the scene, its label map, and a legend with shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cdkd_edge.files import whole_file
from cdkd_edge.labels import NO_LABEL, LabelSchema
from cdkd_edge.scene.pipeline import SegmentOptions, SegmentResult
from cdkd_edge.scene.raster import gdal, open_scene
from cdkd_edge.scene.reader import SceneReader

_PAPER, _INK, _QUIET = (255, 255, 255), (28, 32, 38), (110, 118, 128)
_NO_DATA = (235, 235, 235)
_MARGIN, _FONT = 16, 17


def write_quicklook(
    scene: str | Path,
    result: SegmentResult,
    schema: LabelSchema,
    output: Path,
    options: SegmentOptions = SegmentOptions(),
    longest_side: int = 900,
) -> None:
    """Draw scene and label map side by side (PNG).

    Args:
        scene: the raster that was labelled.
        result: what :func:`cdkd_edge.scene.pipeline.segment_scene` returned for it.
        schema: classes of the label map.
        output: the picture (``.png``).
        options: bands and stretch, as in the run.
        longest_side: of each of the two pictures, px.

    Raises:
        SceneError: scene or label map cannot be read.
    """
    reader = SceneReader(scene, bands=options.bands, stretch=options.stretch)
    try:
        image = reader.overview(longest_side)
    finally:
        reader.close()
    dataset = open_scene(result.output)
    with dataset, gdal(f"reading {result.output}"):
        labels = dataset.read(1, out_shape=image.shape[:2])
    picture = _side_by_side(image, _colored(labels, schema))
    picture = _with_legend(picture, _legend(result, schema))
    with whole_file(output) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _colored(labels: npt.NDArray[np.uint8], schema: LabelSchema) -> npt.NDArray[np.uint8]:
    palette = schema.palette()
    palette[NO_LABEL] = _NO_DATA
    return palette[labels]


def _side_by_side(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> Image.Image:
    height, width = left.shape[:2]
    picture = Image.new("RGB", (2 * width + 3 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    picture.paste(Image.fromarray(left), (_MARGIN, _MARGIN))
    picture.paste(Image.fromarray(right), (width + 2 * _MARGIN, _MARGIN))
    return picture


def _legend(result: SegmentResult, schema: LabelSchema) -> list[tuple[tuple[int, int, int], str, str]]:
    """Colour, name and share of the scene of every class that occurs, in schema order; then what has no data."""
    total = result.height * result.width
    entries = []
    for cls in schema.classes:
        count = result.class_pixels.get(cls.name, 0)
        if count:
            entries.append((cls.color, cls.name, f"{count / total:.1%}"))
    if result.no_data_pixels:
        entries.append((_NO_DATA, "no data", f"{result.no_data_pixels / total:.1%}"))
    return entries


def _with_legend(picture: Image.Image, entries: list[tuple[tuple[int, int, int], str, str]]) -> Image.Image:
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
