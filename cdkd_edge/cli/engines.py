"""The commands around engines: build, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import command_line, say, show, steps, workspace_at
from cdkd_edge.cli.options import EngineOption, JsonOption, SchemaOption, WorkspaceOption, named_engine
from cdkd_edge.engines.runtimes import RUNTIMES, build_engine, choose_runtime

_PANEL = "TensorRT"
_GRAPH = "Making the FP16 or INT8 graph"


@app.command()
def build(
    graph: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Exported graph (.onnx). Default: the only one of that precision in the workspace."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="The engine. Default: engines/NAME.PRECISION.engine, or .cpu.onnx for the CPU."
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Build the FP32 graph (default).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Build the FP16 graph.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Build the INT8 graph.")] = False,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="The engine also gives the probability of each label, in per cent.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The engine also gives the probability of each class.")
    ] = False,
    runtime: Annotated[
        str,
        typer.Option(help=f"{', '.join(RUNTIMES)}, or auto: the first of them that can run here.", metavar="RUNTIME"),
    ] = "auto",
    workspace_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--workspace-size",
            help="Limit of the builder's workspace, e.g. 512M or 2G. Default: less than is free just now.",
            metavar="SIZE",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    opt_level: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--opt-level", help="0: fast build ... 5: more kernels tried.", min=0, max=5, rich_help_panel=_PANEL
        ),
    ] = None,
    timing_cache: Annotated[
        bool,
        typer.Option(
            "--timing-cache/--no-timing-cache",
            help="Keep kernel timings in the user's cache folder, one file per TensorRT and GPU.",
            rich_help_panel=_PANEL,
        ),
    ] = True,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Allow 2:4 sparse kernels where weights are so.", rich_help_panel=_PANEL)
    ] = False,
    weakly_typed: Annotated[
        bool,
        typer.Option(
            "--weakly-typed", help="Fallback for TensorRT 10.x: precisions by builder flags.", rich_help_panel=_PANEL
        ),
    ] = False,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--target",
            help="Compile for this compute capability (e.g. sm86) without its GPU; repeatable. TensorRT-RTX only.",
            metavar="SM",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show all that TensorRT logs.", rich_help_panel=_PANEL)
    ] = False,
    calibration: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--calibration",
            help="Calibration set (see calibrate). Default for INT8: the workspace's only one; for FP16: drawn tiles.",
            file_okay=False,
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    calibrator: Annotated[
        str, typer.Option(help="Ranges of activations: percentile, max or mse.", rich_help_panel=_GRAPH)
    ] = "percentile",
    percentile: Annotated[
        float, typer.Option(help="Of magnitudes, kept by the percentile calibrator.", rich_help_panel=_GRAPH)
    ] = 99.999,
    alpha: Annotated[
        float, typer.Option(help="SmoothQuant's exponent; 0 leaves activations as they are.", rich_help_panel=_GRAPH)
    ] = 0.5,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Keep the noisiest layers in FP16 until the gate passes.", rich_help_panel=_GRAPH),
    ] = False,
    keep: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Keep this layer in FP16, e.g. blocks.0.mlp.fc2; repeatable.", rich_help_panel=_GRAPH),
    ] = None,
    min_agreement: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Gate: per cent of the check tiles' pixels that keep their label. Default: 98 for INT8, all but ties "
            "for FP16.",
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="Gate: points of mIoU that may be lost on --data.", rich_help_panel=_GRAPH)
    ] = 0.5,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--data", help="Labelled images to measure mIoU on, as for evaluate.", rich_help_panel=_GRAPH),
    ] = None,
    schema: SchemaOption = None,
    scenes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of --data, these scenes only, e.g. tile5.", metavar="A,B", rich_help_panel=_GRAPH),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Make the FP16 or INT8 graph even if there is one.", rich_help_panel=_GRAPH)
    ] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Graph to engine for this machine (TensorRT, or ONNX Runtime on the CPU). Writes engines/ and a manifest.

    An FP16 or INT8 graph that is missing is made from the FP32 graph first, and checked; so is one with confidence.
    """
    from cdkd_edge.cli.show.engines import describe_build
    from cdkd_edge.core.output_kinds import CONFIDENCE, PROBABILITIES
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions, parse_size, parse_target
    from cdkd_edge.graph.int8 import CalibrationOptions
    from cdkd_edge.precision.choose import GraphRequest, compare_speed, engine_path, prepare_graph
    from cdkd_edge.precision.int8 import Int8Options
    from cdkd_edge.precision.int8_gate import Int8Gate, labelled_data

    asked = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if given]
    if len(asked) > 1:
        raise typer.BadParameter("one precision at a time", param_hint=" ".join(f"--{name}" for name in asked))
    if confidence and probabilities:
        raise typer.BadParameter("probabilities include confidence", param_hint="--confidence --probabilities")
    kind = CONFIDENCE if confidence else PROBABILITIES if probabilities else None
    options = TensorRTOptions(
        workspace_bytes=parse_size(workspace_size) if workspace_size is not None else None,
        optimization_level=opt_level,
        timing_cache=timing_cache,
        sparse=sparse,
        verbose=verbose,
        weakly_typed=weakly_typed,
        targets=tuple(dict.fromkeys(map(parse_target, target or ()))),
    )
    chosen = choose_runtime(runtime, targets=options.targets)
    if not chosen.has_options and options != TensorRTOptions():
        wrong = f"{chosen.title} has none of TensorRT's options"
        raise typer.BadParameter(wrong, param_hint=f"--runtime {chosen.name}")
    space = workspace_at(workspace)
    ranges = CalibrationOptions(calibrator, percentile, alpha or None)
    least = None if min_agreement is None else min_agreement / 100
    request = GraphRequest(
        calibration,
        Int8Options(ranges, Int8Gate(loss=max_loss), auto, tuple(keep or ())),
        labelled_data(data, schema, scenes) if data else None,
        again,
        least,
    )
    if (schema or scenes) and not data:
        raise typer.BadParameter("they say how to read --data", param_hint="--schema, --scenes")
    with steps() as step:
        prepared = prepare_graph(space, graph, asked[0] if asked else None, request, step, kind, chosen)
    source = prepared.path
    destination = output or engine_path(space, source, chosen)
    suffix = "." + chosen.suffix.rpartition(".")[2]
    if destination.suffix != suffix:
        raise typer.BadParameter(f"an engine for {chosen.title} is an {suffix} file", param_hint="--output")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise typer.BadParameter("the engine would overwrite its graph", param_hint="--output")
    with steps() as step:
        step(f"building from {source.name}")
        manifest = build_engine(source, destination, chosen, options, step, _tell if verbose else _ignore)
        rival = compare_speed(destination, manifest, step)
    show(describe_build(destination, manifest, prepared, rival), as_json)


@app.command()
def inspect(
    artefact: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Engine (.engine, .cpu.onnx) or graph (.onnx). Default: the only engine in the workspace."),
    ] = None,
    engine: EngineOption = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer, not only those that move most.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """What is inside a graph or an engine: layers, precisions, memory, fused attention. Runs nothing."""
    from cdkd_edge.cli.show.engines import describe_inspection
    from cdkd_edge.engines.inspect import inspect_artefact

    space = workspace_at(workspace)
    path = named_engine(artefact, engine) or space.only_engine("cdkd-edge inspect", typed=command_line())
    show(describe_inspection(inspect_artefact(path), every=every), as_json)


def _tell(severity: str, text: str) -> None:
    """A line of TensorRT's log."""
    for line in text.splitlines():
        say(f"{severity}: {line}")


def _ignore(severity: str, text: str) -> None:
    pass
