"""A picture to look at: the scene, its label map, and a legend with shares."""

from __future__ import annotations

from pathlib import Path

from cdkd_edge.core.files import whole_file
from cdkd_edge.core.labels import LabelSchema
from cdkd_edge.raster.open import gdal, open_scene
from cdkd_edge.raster.pictures import NO_DATA_COLOR, LegendEntry, colored, in_a_row, with_legend
from cdkd_edge.raster.read import SceneReader
from cdkd_edge.segment.options import SegmentOptions, SegmentResult


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
        result: what :func:`cdkd_edge.segment.pipeline.segment_scene` returned for it.
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
    picture = in_a_row([image, colored(labels, schema)])
    picture = with_legend(picture, _legend(result, schema))
    with whole_file(output) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _legend(result: SegmentResult, schema: LabelSchema) -> list[LegendEntry]:
    """Colour, name and share of the scene of every class that occurs, in schema order; then what has no data."""
    total = result.height * result.width
    entries = []
    for cls in schema.classes:
        count = result.class_pixels.get(cls.name, 0)
        if count:
            entries.append((cls.color, cls.name, f"{count / total:.1%}"))
    if result.no_data_pixels:
        entries.append((NO_DATA_COLOR, "no data", f"{result.no_data_pixels / total:.1%}"))
    return entries
