"""What ``cdkd-edge segment`` shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.report import Report, in_brackets, plain

if TYPE_CHECKING:
    from cdkd_edge.scene.pipeline import SegmentResult


def describe_segment(scene: str, result: SegmentResult, quicklook: Path | None) -> Report:
    """``cdkd-edge segment``, one scene."""
    total = max(1, result.height * result.width)
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in result.class_pixels.items() if count)
    rows = [
        ("scene", f"{scene}, {result.width} x {result.height} px"),
        *(("note", note) for note in result.notes),
        ("classes", shares or "none"),
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
        *([("quicklook", str(quicklook))] if quicklook else []),
    ]
    data = {"scene": scene, **segment_data(result), "quicklook": str(quicklook) if quicklook else None}
    return Report(f"label map {result.output}", tuple(rows), data)


def segment_data(result: SegmentResult) -> dict[str, Any]:
    """A result as JSON data, without the counts of every row of pixels."""
    data: dict[str, Any] = plain(dataclasses.replace(result, row_class_pixels=None))
    del data["row_class_pixels"]
    return data
