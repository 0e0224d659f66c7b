"""The command that makes label maps: segment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import print_json, progress_bar, show, workspace_at
from cdkd_edge.cli.options import (
    BandsOption,
    EngineOption,
    JsonOption,
    OverlapOption,
    PercentilesOption,
    RangeOption,
    StretchOption,
    ThreadsOption,
    WorkspaceOption,
    segment_options,
)


@app.command()
def segment(
    scenes: Annotated[list[str], typer.Argument(help="Rasters that GDAL can read: GeoTIFF, PNG, JPEG, ...")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Label map (.tif), or a directory. Default: NAME_labels.tif here, NAME being the scene's.",
        ),
    ] = None,
    engine: EngineOption = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    quicklook: Annotated[bool, typer.Option("--quicklook", help="Also write a PNG to look at.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing label maps.")] = False,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Scenes to label maps: GeoTIFF with palette, class names and the scene's georeference."""
    from cdkd_edge.engines.load import load_engine
    from cdkd_edge.report.segment import describe_segment
    from cdkd_edge.scene.outputs import label_map_paths, quicklook_path, spare
    from cdkd_edge.scene.pipeline import segment_scene
    from cdkd_edge.scene.quicklook import write_quicklook

    space = workspace_at(workspace)
    options = segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range)
    outputs = label_map_paths(scenes, output, space.root)
    pictures = [quicklook_path(path) if quicklook else None for path in outputs]
    spare(scenes, [*outputs, *(picture for picture in pictures if picture)], overwrite=overwrite)
    loaded = load_engine(engine or space.only_engine("cdkd-edge segment SCENE --engine"), threads=threads)
    results = []
    try:
        for scene, destination, picture in zip(scenes, outputs, pictures, strict=True):
            with progress_bar(Path(scene).name) as progress:
                result = segment_scene(loaded, scene, destination, options, progress)
            if picture:
                write_quicklook(scene, result, loaded.manifest.schema, picture, options)
            results.append(describe_segment(scene, result, picture))
            if not as_json:
                show(results[-1], as_json)
    finally:
        loaded.close()
        if as_json:  # also what was finished before a scene failed
            print_json([result.data for result in results])
