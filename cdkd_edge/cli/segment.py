"""The command that makes label maps: segment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import command_line, print_json, say, workspace_at
from cdkd_edge.cli.options import (
    BandsOption,
    EngineOption,
    JsonOption,
    OverlapOption,
    PaletteOption,
    PercentilesOption,
    RangeOption,
    StretchOption,
    StrictOption,
    ThreadsOption,
    WorkspaceOption,
    segment_options,
)
from cdkd_edge.core.labels import Palette
from cdkd_edge.core.output_kinds import CONFIDENCE, LABELS
from cdkd_edge.segment.merges import DEFAULT_MERGE, merge_help, merge_mode

_MADE = "What is made beside the label map"


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
    keep_folders: Annotated[
        bool,
        typer.Option("--keep-folders", help="Below the output directory, keep the folders that scenes are named with."),
    ] = False,
    engine: EngineOption = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    strict: StrictOption = False,
    merge: Annotated[str, typer.Option("--merge", help=merge_help())] = DEFAULT_MERGE,
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
            help="Label only an area: a file of polygons (GeoJSON, GeoPackage, Shapefile), or a box in lon/lat (or the "
            "scene's coordinates).",
            metavar="FILE|MINX,MINY,MAXX,MAXY",
        ),
    ] = None,
    palette: PaletteOption = Palette.DISPLAY,
    readers: Annotated[int, typer.Option("--readers", help="Threads that read the scene.", min=1, max=16)] = 2,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Also write NAME_preview.png: the map over the scene, with a legend.",
            rich_help_panel=_MADE,
        ),
    ] = False,
    vector: Annotated[
        bool,
        typer.Option("--vector", help="Also write NAME.gpkg: polygons of each class.", rich_help_panel=_MADE),
    ] = False,
    min_area: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--min-area",
            help="Leave smaller polygons out, e.g. 100m2, 0.5ha or 20px.",
            metavar="AREA",
            rich_help_panel=_MADE,
        ),
    ] = None,
    simplify: Annotated[
        float,
        typer.Option("--simplify", help="Simplify polygons by so many px.", min=0, rich_help_panel=_MADE),
    ] = 0.0,
    stac: Annotated[
        bool, typer.Option("--stac", help="Also write NAME.stac.json, a STAC Item.", rich_help_panel=_MADE)
    ] = False,
    when: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--datetime",
            help="Time of the images for STAC, e.g. 2026-05-04T10:30:00Z, or START/END.",
            metavar="TIME",
            rich_help_panel=_MADE,
        ),
    ] = None,
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

    from cdkd_edge.cli.show.fleet import live_fleet
    from cdkd_edge.segment.many.run import engine_ref, plan_outputs, segment_many, workers_for
    from cdkd_edge.segment.partial import resume_advice
    from cdkd_edge.segment.products import ProductOptions
    from cdkd_edge.segment.products.polygons import vector_options

    if dask and workers:
        raise typer.BadParameter("choose a scheduler or workers here", param_hint="--workers")
    if worker_engines and not dask:
        raise typer.BadParameter("needs --dask", param_hint="--worker-engines")
    space = workspace_at(workspace)
    options = dataclasses.replace(
        segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range, strict),
        merge=merge,
        confidence=confidence,
        gsd=gsd,
        aoi=aoi,
        palette=palette,
        readers=readers,
    )
    if (min_area or simplify) and not vector:
        raise typer.BadParameter("they are about --vector", param_hint="--min-area, --simplify")
    if when and not stac:
        raise typer.BadParameter("it is for --stac", param_hint="--datetime")
    polygons = vector_options(min_area, simplify) if vector else None
    products = ProductOptions(vector=polygons, preview=preview, stac=stac, when=when)
    names, outputs = plan_outputs(
        scenes,
        output,
        space.root,
        products,
        confidence=confidence,
        keep_folders=keep_folders,
        overwrite=overwrite,
    )
    needed = merge_mode(merge).needs
    kind = CONFIDENCE if confidence and needed == LABELS else needed
    chosen = engine or space.only_engine("cdkd-edge segment SCENE --engine", kind, command_line())
    ref = engine_ref(chosen, threads=threads, worker_folder=worker_engines)
    who, ref = workers_for(ref, dask, workers and min(workers, len(names)))
    with live_fleet(names, as_json) as observer:
        try:
            segment_many(
                names,
                outputs,
                who,
                ref,
                options,
                products,
                overwrite=overwrite,
                report_path=report,
                observer=observer,
            )
        except (KeyboardInterrupt, SystemExit):
            for advice in filter(None, map(resume_advice, outputs)):
                say(advice)
            raise
        finally:
            if as_json:  # also what was finished before a scene failed
                place = {name: number for number, name in enumerate(names)}
                print_json([row.document() for row in sorted(observer.reports, key=lambda row: place[row.scene])])
