"""The commands around engines: build, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import show, steps, workspace_at
from cdkd_edge.cli.options import JsonOption, WorkspaceOption

_PANEL = "TensorRT"


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
    runtime: Annotated[
        str,
        typer.Option(help="cpu, tensorrt, or auto: TensorRT where it is installed and has a GPU.", metavar="RUNTIME"),
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
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Graph to engine for this machine (TensorRT, or ONNX Runtime on the CPU). Writes engines/ and a manifest."""
    from cdkd_edge.engines.plan import CPU, build_engine, choose_runtime, engine_path, graph_to_build
    from cdkd_edge.engines.tensorrt.options import TensorRTOptions, parse_size, parse_target
    from cdkd_edge.report.engines import describe_engine

    asked = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if given]
    if len(asked) > 1:
        raise typer.BadParameter("one precision at a time", param_hint=" ".join(f"--{name}" for name in asked))
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
    if chosen == CPU and options != TensorRTOptions():
        raise typer.BadParameter("the CPU engine has none of TensorRT's options", param_hint="--runtime cpu")
    space = workspace_at(workspace)
    source = graph_to_build(space, graph, asked[0] if asked else None)
    destination = output or engine_path(space, source, chosen)
    if destination.suffix != (".onnx" if chosen == CPU else ".engine"):
        kind = "a CPU engine is an .onnx file" if chosen == CPU else "a TensorRT engine is an .engine file"
        raise typer.BadParameter(kind, param_hint="--output")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise typer.BadParameter("the engine would overwrite its graph", param_hint="--output")
    with steps() as step:
        step(f"building from {source.name}")
        manifest = build_engine(source, destination, chosen, options, step, _tell if verbose else _ignore)
    show(describe_engine(destination, manifest), as_json)


@app.command()
def inspect(
    artefact: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Engine (.engine, .cpu.onnx) or graph (.onnx). Default: the only engine in the workspace."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer, not only those that move most.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """What is inside a graph or an engine: layers, precisions, memory, fused attention. Runs nothing."""
    from cdkd_edge.engines.inspection import inspect_artefact
    from cdkd_edge.report.engines import describe_inspection

    path = artefact or workspace_at(workspace).only_engine("cdkd-edge inspect")
    show(describe_inspection(inspect_artefact(path), every=every), as_json)


def _tell(severity: str, text: str) -> None:
    """A line of TensorRT's log, without what would steer the terminal."""
    for line in text.splitlines():
        typer.echo(f"{severity}: " + "".join(char if char.isprintable() else " " for char in line), err=True)


def _ignore(severity: str, text: str) -> None:
    pass
