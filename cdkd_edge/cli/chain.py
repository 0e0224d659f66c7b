"""The commands at both ends of the chain: info, export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import need, show, stem_of, steps, workspace_at
from cdkd_edge.cli.options import (
    BandsOption,
    JsonOption,
    PaletteOption,
    StretchOption,
    WeightsOption,
    WorkspaceOption,
    segment_options,
)
from cdkd_edge.core.labels import BUILTIN_SCHEMAS, Palette


@app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: what torch.save wrote, or safetensors.")],
    tile: Annotated[Optional[int], typer.Option(help="Count for this tile side, px.", min=1)] = None,  # noqa: UP045
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a checkpoint holds: layout, parameters, multiply-accumulates, classes."""
    need("torch", "export", "reading a checkpoint")
    from cdkd_edge.cli.show.chain import describe_checkpoint

    show(describe_checkpoint(checkpoint, tile=tile, heads=heads, weights=weights), as_json)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: what torch.save wrote, or safetensors.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="The graph (.onnx). Default: export/NAME.onnx, NAME being the checkpoint's."
        ),
    ] = None,
    schema: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Class names and colors: "
            + "".join(f"{name} ({len(schema)}), " for name, schema in BUILTIN_SCHEMAS.items())
            + "or a .toml file."
        ),
    ] = None,
    tile: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tile side, px. Default: the checkpoint's.", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Tiles per run (static).", min=1)] = 1,
    opset: Annotated[int, typer.Option(help="ONNX opset.", min=17, max=20)] = 20,
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    norm_eps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="LayerNorm epsilon, if not the layout's own."),
    ] = None,
    fp16: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--fp16/--no-fp16", help="Also write NAME.fp16.onnx. Default: if it passes its check."),
    ] = None,
    min_agreement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Per cent of labels that FP16 must keep. Default: all but ties, as rounding explains them."),
    ] = None,
    qgis: Annotated[
        bool, typer.Option("--qgis", help="Also write NAME.qgis.onnx for the QGIS plugin Deepness; needs --gsd.")
    ] = False,
    stac: Annotated[
        bool, typer.Option("--stac", help="Also write NAME.stac.json: a STAC item with the MLM extension.")
    ] = False,
    gsd: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Ground sample distance of the training imagery, for --qgis and --stac.", metavar="METRES"),
    ] = None,
    weights: WeightsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to ONNX graph, checked against PyTorch. Writes export/NAME.onnx, NAME.fp16.onnx, their manifests."""
    need("torch", "export", "exporting a checkpoint")
    from cdkd_edge.cli.show.chain import describe_export
    from cdkd_edge.graph.export import ExportOptions, export_checkpoint
    from cdkd_edge.precision.int8_gate import Int8Gate

    destination = output or workspace_at(workspace).graphs / f"{stem_of(checkpoint)}.onnx"
    if destination.suffix != ".onnx":
        raise typer.BadParameter("a graph is an .onnx file", param_hint="--output")
    if gsd is not None and not (qgis or stac):
        raise typer.BadParameter("it is written into what --qgis and --stac make", param_hint="--gsd")
    if min_agreement is not None and fp16 is False:
        raise typer.BadParameter("it is about the FP16 graph", param_hint="--min-agreement")
    least = None if min_agreement is None else Int8Gate(min_agreement / 100).agreement
    options = ExportOptions(tile, batch, opset, schema, heads, norm_eps, fp16, least, qgis, stac, gsd, weights)
    with steps() as step:
        result = export_checkpoint(checkpoint, destination, options, step)
    show(describe_export(result), as_json)


@app.command()
def demo(
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Your own scene. Default: a drawn one of 3000 x 2000 px."),
    ] = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    palette: PaletteOption = Palette.DISPLAY,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Where the demo writes.", file_okay=False)
    ] = Path("cdkd-edge-demo"),
    as_json: JsonOption = False,
) -> None:
    """The whole chain with a small bundled network: export, build, segment, bench.

    Without PyTorch, as on a board, the check against it is skipped.
    """
    import dataclasses

    from cdkd_edge.cli.show.chain import describe_demo
    from cdkd_edge.demo.run import run_demo

    options = dataclasses.replace(segment_options(None, bands, stretch, None, None), palette=palette)
    with steps() as step:
        result = run_demo(workspace_at(workspace), scene, options, step)
    show(describe_demo(result), as_json)
