"""The command that makes label maps: segment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import print_json, workspace_at
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
    scenes: Annotated[
        list[str],
        typer.Argument(help="Rasters that GDAL can read, folders of them, patterns ('scenes/**/*.tif'), @LIST.txt."),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "--out",
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
    readers: Annotated[int, typer.Option("--readers", help="Threads that read the scene.", min=1, max=16)] = 2,
    quicklook: Annotated[bool, typer.Option("--quicklook", help="Also write a PNG to look at.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing label maps, and drop what an interrupted run left.")
    ] = False,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--report", help="Keep a report of all scenes in this JSON file.", dir_okay=False),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--workers", help="Spread scenes over so many processes on this machine.", min=1),
    ] = None,
    dask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dask", help="Spread scenes over the workers of this dask scheduler.", metavar="ADDRESS"),
    ] = None,
    worker_engines: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--worker-engines",
            help="With --dask: each worker takes the engine of the same graph from its own DIR.",
            metavar="DIR",
        ),
    ] = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Scenes to label maps: GeoTIFF with palette, class names and the scene's georeference.

    A scene that fails does not keep the others from being labelled; the exit code is 18 then. Label maps that are
    there are kept if they are of this scene by this engine with these options.
    """
    import dataclasses

    from cdkd_edge.fleet.run import crew_for, engine_ref, segment_many
    from cdkd_edge.fleet.scenes import plan_outputs
    from cdkd_edge.report.fleet import live_fleet
    from cdkd_edge.scene.partial import way_to_go_on

    if dask and workers:
        raise typer.BadParameter("choose a scheduler or workers here", param_hint="--workers")
    if worker_engines and not dask:
        raise typer.BadParameter("needs --dask", param_hint="--worker-engines")
    space = workspace_at(workspace)
    options = dataclasses.replace(
        segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range),
        merge=merge,
        confidence=confidence,
        readers=readers,
    )
    products = ("quicklook",) if quicklook else ()
    names, outputs = plan_outputs(scenes, output, space.root, products, overwrite=overwrite)
    chosen = engine or space.only_engine("cdkd-edge segment SCENE --engine")
    ref = engine_ref(chosen, threads=threads, worker_folder=worker_engines)
    crew, ref = crew_for(ref, dask, workers)
    with live_fleet(names, as_json) as listener:
        try:
            segment_many(
                names,
                outputs,
                crew,
                ref,
                options,
                products,
                overwrite=overwrite,
                report_path=report,
                listener=listener,
            )
        except (KeyboardInterrupt, SystemExit):
            for advice in filter(None, map(way_to_go_on, outputs)):
                typer.echo(advice, err=True)
            raise
        finally:
            if as_json:  # also what was finished before a scene failed
                place = {name: number for number, name in enumerate(names)}
                print_json([row.document() for row in sorted(listener.reports, key=lambda row: place[row.scene])])
