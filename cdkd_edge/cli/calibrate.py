"""The command that makes calibration sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import progress_bar, say, show, workspace_at
from cdkd_edge.cli.options import (
    BandsOption,
    JsonOption,
    PercentilesOption,
    RangeOption,
    StretchOption,
    StrictOption,
    WorkspaceOption,
    segment_options,
)


@app.command()
def calibrate(
    scenes: Annotated[list[str], typer.Argument(help="Rasters, folders of rasters, or patterns in quotes.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="Folder of the set. Default: engines/calibration/NAME, after the scene or folder."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Tiles for calibration.", min=1)] = 64,
    check: Annotated[int, typer.Option(help="Tiles kept apart, to judge the quantised graph on.", min=0)] = 8,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Side of a tile, px. Default: that of the workspace's graph, else 1024.", min=32),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--exclude",
            help="Evaluation set that must stay out: folder of images, calibration set, or list (.txt). Repeatable.",
        ),
    ] = None,
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of label maps (NAME_labels.tif, as segment writes): every class gets its part."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same scenes, options and seed give the same set.", min=0)] = 0,
    candidates: Annotated[int, typer.Option(help="Tiles to look at in all scenes together.", min=1)] = 10_000,
    max_nodata: Annotated[float, typer.Option(help="Share of a tile that may have no data.", min=0.0, max=1.0)] = 0.1,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    strict: StrictOption = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Pass over scenes that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing calibration set.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Scenes to a calibration set: tiles that cover the imagery, for INT8 ranges. Writes engines/calibration/NAME/."""
    from cdkd_edge.cli.show.calibration import describe_calibration
    from cdkd_edge.precision.calibration.calibrate import CalibrateOptions, default_folder, default_tile, tile_sides
    from cdkd_edge.precision.calibration.calibrate import calibrate as make_set

    space = workspace_at(workspace)
    if tile and (sides := tile_sides(space)) and tile not in sides:  # `build --int8` would find it after the work
        say(f"note: graphs in {space.graphs} have tiles of {', '.join(map(str, sorted(sides)))} px, not {tile} px")
    options = CalibrateOptions(
        count=count,
        check=check,
        tile=tile or default_tile(space),
        seed=seed,
        candidates=candidates,
        max_nodata=max_nodata,
        reading=segment_options(None, bands, stretch, stretch_percentiles, stretch_range, strict),
        labels=labels,
        exclude=tuple(exclude or ()),
        skip_broken=skip_broken,
    )
    with progress_bar("looking at tiles") as progress:
        result = make_set(scenes, output or default_folder(space, scenes), options, progress, overwrite=overwrite)
    show(describe_calibration(result), as_json)
