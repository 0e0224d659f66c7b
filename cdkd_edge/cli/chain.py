"""The commands of the chain: info, export, segment, bench, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import need, print_json, progress_bar, show, steps, workspace_at
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
def info(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .bin, .ckpt or .safetensors.")],
    tile: Annotated[Optional[int], typer.Option(help="Count for this tile side, px.", min=1)] = None,  # noqa: UP045
    heads: Annotated[Optional[int], typer.Option(help="Attention heads, if not 64 wide.", min=1)] = None,  # noqa: UP045
    as_json: JsonOption = False,
) -> None:
    """What a checkpoint holds: layout, parameters, multiply-accumulates, classes."""
    need("torch", "export", "reading a checkpoint")
    from cdkd_edge.report import describe_checkpoint

    show(describe_checkpoint(checkpoint, tile=tile, heads=heads), as_json)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth, .bin, .ckpt or .safetensors.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="The graph (.onnx). Default: export/NAME.onnx, NAME being the checkpoint's."
        ),
    ] = None,
    schema: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Class names and colors: deepglobe (6), loveda (7), dubai (5), or a .toml file."),
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
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Checkpoint to ONNX graph, checked against PyTorch. Writes export/NAME.onnx, NAME.fp16.onnx, their manifests."""
    need("torch", "export", "exporting a checkpoint")
    from cdkd_edge.export.pipeline import ExportOptions, export_checkpoint
    from cdkd_edge.report import describe_export

    destination = output or workspace_at(workspace).graphs / f"{checkpoint.stem}.onnx"
    if destination.suffix != ".onnx":
        raise typer.BadParameter("a graph is an .onnx file", param_hint="--output")
    options = ExportOptions(tile, batch, opset, schema, heads, norm_eps, fp16)
    with steps() as step:
        result = export_checkpoint(checkpoint, destination, options, step)
    show(describe_export(result), as_json)


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
    from cdkd_edge.report import describe_segment
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


@app.command()
def bench(
    engine: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Engine file. Default: the only one in the workspace."),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds of timed tiles.", min=0.1)] = 20.0,
    warmup: Annotated[float, typer.Option(help="Seconds of warm-up.", min=0)] = 3.0,
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Scene for the end-to-end figure. Default: a drawn one."),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    power_trace: Annotated[
        bool, typer.Option("--power-trace", help="Measure idle and load power, where there is a source.")
    ] = False,
    power_source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--power-source", help="Measure power, and only from jtop, ina3221, nvml or rapl."),
    ] = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure an engine: tiles per second, latency, a scene end to end, power. Writes benchmarks/RUN/."""
    from cdkd_edge.benchmarks.bench import BenchOptions, run_benchmark
    from cdkd_edge.engines.load import load_engine
    from cdkd_edge.report import describe_bench

    space = workspace_at(workspace)
    options = BenchOptions(
        duration=duration,
        warmup=warmup,
        scene=scene,
        segment=segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range),
        power=power_trace,
        power_source=power_source,
    )
    path = engine or space.only_engine("cdkd-edge bench")
    loaded = load_engine(path, threads=threads)
    try:
        folder = space.new_run(loaded.manifest.name)
        with steps() as step:
            summary = run_benchmark(loaded, folder, options, step)
    finally:
        loaded.close()
    show(describe_bench(summary, folder), as_json)


@app.command()
def demo(
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Your own scene. Default: a drawn one of 3000 x 2000 px."),
    ] = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Where the demo writes.", file_okay=False)
    ] = Path("cdkd-edge-demo"),
    as_json: JsonOption = False,
) -> None:
    """The whole chain with a small bundled network: export, build, segment, bench."""
    need("torch", "export", "the demo's export")
    from cdkd_edge.demo.run import run_demo
    from cdkd_edge.report import describe_demo

    options = segment_options(None, bands, stretch, None, None)
    with steps() as step:
        result = run_demo(workspace_at(workspace), scene, options, step)
    show(describe_demo(result), as_json)
