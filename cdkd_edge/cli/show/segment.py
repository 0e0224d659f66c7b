"""What ``cdkd-edge segment`` shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cdkd_edge.cli.show.table import Report, in_brackets, plain
from cdkd_edge.core.labels import NAME_THEM, nameless

if TYPE_CHECKING:
    from cdkd_edge.raster.areas import Areas
    from cdkd_edge.segment.options import SegmentResult


def describe_segment(scene: str, result: SegmentResult, products: Mapping[str, str]) -> Report:
    """``cdkd-edge segment``, one scene, and the files made beside its label map."""
    total = max(1, result.height * result.width)
    rows = [
        ("scene", f"{scene}, {result.width} x {result.height} px"),
        *(("note", note) for note in result.notes),
        *class_rows(result.areas, total),
        ("no data", f"{result.no_data_pixels / total:.1%}"),
        (
            "tiles",
            f"{result.tiles}"
            + in_brackets(result.tiles_without_data, "without data, not computed")
            + in_brackets(result.tiles_resumed, "done by an earlier run"),
        ),
        (
            "time",
            f"{result.seconds:.1f} s, engine {result.engine_seconds:.1f} s, {total / result.seconds / 1e6:.2f} MP/s",
        ),
        *([("confidence", str(result.confidence))] if result.confidence else []),
        *products.items(),
    ]
    data = {"scene": scene, **segment_data(result), **products}
    return Report(f"label map {result.output}", tuple(rows), data)


def class_rows(areas: Areas | None, total: int) -> list[tuple[str, str]]:
    """What share of ``total`` pixels each class has, and how many hectares, where that is known."""
    if areas is None:
        return []
    shares = []
    for area in areas.classes:
        if area.pixels:
            ground = "" if area.hectares is None else f" ({area.hectares:.4g} ha)"
            shares.append(f"{area.name} {area.pixels / total:.1%}{ground}")
    rows = [("classes", ", ".join(shares) or "none")]
    if nameless([area.name for area in areas.classes]):
        rows.append(("note", NAME_THEM))
    return rows if areas.reason is None else [*rows, ("no hectares", areas.reason)]


def segment_data(result: SegmentResult) -> dict[str, Any]:
    """A result as JSON data, without the counts of every row of pixels."""
    data: dict[str, Any] = plain(dataclasses.replace(result, row_class_pixels=None))
    del data["row_class_pixels"]
    return data
