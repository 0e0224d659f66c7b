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
    merge: Annotated[
        str,
        typer.Option(
            "--merge", help="crop: the middle of each tile. hann: tiles blended; needs an engine with probabilities."
        ),
    ] = "crop",
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also write NAME_confidence.tif: the label's probability, per cent.")
    ] = False,
    gsd: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--gsd", help="Resample scenes to this ground sample distance, m.", metavar="METRES"),
    ] = None,
    aoi: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--aoi",
            help="Label only an area: a GeoJSON file, or a box in lon/lat (or the scene's coordinates).",
            metavar="FILE|MINX,MINY,MAXX,MAXY",
        ),
    ] = None,
    readers: Annotated[int, typer.Option("--readers", help="Threads that read the scene.", min=1, max=16)] = 2,
    quicklook: Annotated[bool, typer.Option("--quicklook", help="Also write a PNG to look at.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing label maps, and drop what an interrupted run left.")
    ] = False,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Scenes to label maps: GeoTIFF with palette, class names and the scene's georeference.

    What is done survives an interruption of any kind; the same command goes on from there.
    """
    import dataclasses

    from cdkd_edge.engines.load import load_engine
    from cdkd_edge.report.segment import describe_segment
    from cdkd_edge.scene.outputs import confidence_path, label_map_paths, quicklook_path, spare
    from cdkd_edge.scene.partial import way_to_go_on
    from cdkd_edge.scene.pipeline import segment_scene
    from cdkd_edge.scene.quicklook import write_quicklook

    space = workspace_at(workspace)
    options = dataclasses.replace(
        segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range),
        merge=merge,
        confidence=confidence,
        gsd=gsd,
        aoi=aoi,
        readers=readers,
    )
    outputs = label_map_paths(scenes, output, space.root)
    pictures = [quicklook_path(path) if quicklook else None for path in outputs]
    others = [*(picture for picture in pictures if picture), *(map(confidence_path, outputs) if confidence else ())]
    spare(scenes, [*outputs, *others], overwrite=overwrite)
    loaded = load_engine(engine or space.only_engine("cdkd-edge segment SCENE --engine"), threads=threads)
    results = []
    try:
        for scene, destination, picture in zip(scenes, outputs, pictures, strict=True):
            try:
                with progress_bar(Path(scene).name) as progress:
                    result = segment_scene(loaded, scene, destination, options, progress, resume=not overwrite)
            except (KeyboardInterrupt, SystemExit):
                if advice := way_to_go_on(destination):
                    typer.echo(advice, err=True)
                raise
            if picture:
                write_quicklook(scene, result, loaded.manifest.schema, picture, options)
            results.append(describe_segment(scene, result, picture))
            if not as_json:
                show(results[-1], as_json)
    finally:
        loaded.close()
        if as_json:  # also what was finished before a scene failed
            print_json([result.data for result in results])
