"""The command parity: an engine against its network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import command_line, new_folder, progress_bar, show, stem_of, workspace_at, write_json
from cdkd_edge.cli.options import (
    BandsOption,
    DataOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    OverlapOption,
    PercentilesOption,
    PrecisionOption,
    RangeOption,
    SchemaOption,
    StretchOption,
    StrictOption,
    ThreadsOption,
    WeightsOption,
    WorkspaceOption,
    chosen_images,
    named_engine,
    segment_options,
)


@app.command()
def parity(
    reference: Annotated[
        Path, typer.Argument(metavar="CKPT", help="What the labels should be: a checkpoint, or a graph or engine.")
    ],
    data: DataOption,
    artefact: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            metavar="ENGINE",
            help="What is to be proved: an engine, or a graph or checkpoint. Default: the workspace's only engine.",
        ),
    ] = None,
    engine: EngineOption = None,
    schema: SchemaOption = None,
    scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Compare on these scenes only, e.g. tile5 or Val. Default: every image.", metavar="A,B"),
    ] = None,
    image_list: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--list", help="Compare on the images that this text file names, one a line."),
    ] = None,
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Largest loss of mIoU, percentage points. Default: 0.02; 0.5 for an INT8 candidate.", min=0, max=100
        ),
    ] = None,
    min_agreement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Smallest share of pixels with the same label, per cent. Default: 99.9; 98 for an INT8 candidate.",
            min=0,
            max=100,
        ),
    ] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Keep both label maps, and pictures of where they differ.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder for parity.json, and for maps. Default: benchmarks/RUN, for maps."),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    weights: WeightsOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Does an engine label as its network does? Scores of both on labelled images, tile for tile, and a verdict.

    Leaves with 0 if it passes and with 14 if it does not; any other code means that nothing was decided.
    """
    from cdkd_edge.cli.show.accuracy import describe_parity
    from cdkd_edge.core.errors import ParityError
    from cdkd_edge.quality.artefacts import open_artefacts
    from cdkd_edge.quality.evaluate import data_schema
    from cdkd_edge.quality.parity import ParityGate, measure_parity

    if min_agreement is not None and 0 < min_agreement <= 1:
        raise typer.BadParameter("a share in per cent, e.g. 98", param_hint="--min-agreement")
    options = segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range, strict)
    space = workspace_at(workspace)
    candidate = named_engine(artefact, engine) or space.only_engine(
        f"cdkd-edge parity {reference}", typed=command_line()
    )
    dataset = chosen_images(data, scenes, image_list)
    folder = output or (space.new_run(f"{stem_of(candidate)}-parity") if save_maps else None)
    pair = open_artefacts(
        reference, candidate, schema=schema, device=device, precision=precision, threads=threads, weights=weights
    )
    with pair as (ours, theirs), new_folder(folder) as place, progress_bar(candidate.name) as progress:
        gate = ParityGate.of(theirs.precision, tolerance, None if min_agreement is None else min_agreement / 100)
        named = next((one.labeller.schema for one in (theirs, ours) if not one.labeller.schema.numbered), None)
        result = measure_parity(
            ours.labeller,
            theirs.labeller,
            dataset,
            data_schema(dataset, schema, named),
            gate,
            options=options,
            maps=place / "maps" if place and save_maps else None,
            trained_on=ours.training or theirs.training,
            progress=progress,
        )
        report = describe_parity(ours, theirs, dataset, result, folder)
        if place:
            write_json(place / "parity.json", report.data)
    show(report, as_json)
    if result.failures:
        raise ParityError(f"{candidate.name} does not keep to {reference.name}: {'; '.join(result.failures)}")
