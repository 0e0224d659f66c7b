"""``cdkd-edge demo``: every stage with a bundled network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from cdkd_edge.cli.options import BANDS, JSON, PALETTE, STRETCH, StretchOptions
from cdkd_edge.cli.progress import steps
from cdkd_edge.cli.report import Report, Rows, plain
from cdkd_edge.core.labels import Palette
from cdkd_edge.core.numbers import duration, percent, significant
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.demo.run import DemoResult


def demo(
    scene: Path | None = Option(None, help="Your own scene. Default: a bundled one of 3000 x 2000 px."),
    bands: str | None = BANDS,
    stretch: bool = STRETCH,
    palette: Palette = PALETTE,
    workspace: Path = Option(Path("cdkd-edge-demo"), "--workspace", "-w", help="Where all files go.", file_okay=False),
    as_json: bool = JSON,
) -> None:
    """Run the whole chain with a small bundled network: export, build, segment, bench.

    Without PyTorch, as on a board, the check against it is skipped.
    """
    from cdkd_edge.demo.run import run_demo

    options = StretchOptions(bands, stretch, None, None).segment_options(palette=palette)
    with steps() as step:
        result = run_demo(Workspace(workspace), scene, options, step)
    _describe(result).show(as_json)


def _describe(result: DemoResult) -> Report:
    segment, manifest = result.segment, result.export.manifest
    skipped = getattr(result.export, "skipped", None)
    total = max(1, segment.height * segment.width)
    figures = result.bench.figures
    speed = f"{significant(figures.tiles_per_second.mean)} tiles/s" if figures else "not measured"
    same = percent(manifest.check.label_agreement, 2)
    rows: Rows = [
        ("graph", f"{result.export.path}  ({manifest.nodes} nodes)"),
        ("skipped", skipped) if skipped else ("check", f"{same} of the pixels have PyTorch's label"),
        ("engine", f"{result.engine_path}  ({result.engine.attention_fused} attention blocks fused)"),
        ("label map", f"{segment.output}  ({segment.tiles} tiles in {duration(segment.seconds)})"),
        ("classes", ", ".join(f"{name} {percent(count / total)}" for name, count in segment.class_pixels.items())),
        *([("accuracy", f"mIoU {percent(result.mean_iou)} on the drawn scene")] if result.mean_iou is not None else []),
        ("picture", str(result.preview)),
        ("speed", f"{speed}; a quick look, `cdkd-edge bench` measures"),
        ("report", str(result.bench_folder / "report.html")),
    ]
    data = plain(result)
    del data["segment"]["row_class_pixels"]  # counts of every row of pixels
    return Report("cdkd-edge demo", rows, data)
