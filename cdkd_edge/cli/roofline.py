"""The command that models speed: roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import show, workspace_at
from cdkd_edge.cli.options import JsonOption, WorkspaceOption


@app.command()
def roofline(
    graph: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Exported graph (.onnx). Default: the only FP32 graph in the workspace."),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device",
            help="orin-nx-16gb, orin-nx-8gb, orin-nano-8gb, orin-nano-4gb, agx-orin-64gb, agx-orin-32gb, "
            "rtx-3060-12gb, rtx-4090, h200, or a .toml file. Default: this board, else orin-nx-16gb.",
            metavar="DEVICE",
        ),
    ] = None,
    mode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--mode", help="Power mode, e.g. MAXN; lists its kernels too. Default: all modes.", metavar="MODE"
        ),
    ] = None,
    precision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--precision", help="fp32, fp16 or int8. Default: all that the graph can be had in."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every kernel, not only those that take longest.")] = False,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """How fast a graph could be on a device, from operators and data sheets. Modelled; runs and measures nothing."""
    from cdkd_edge.bench.roofline.devices import RATES, default_device, load_device
    from cdkd_edge.bench.roofline.model import roofline as model
    from cdkd_edge.cli.show.roofline import describe_roofline

    if precision is not None and precision not in RATES:
        raise typer.BadParameter(f"one of {', '.join(RATES)}", param_hint="--precision")
    chosen = load_device(device) if device is not None else default_device()
    if mode is not None:
        chosen.mode(mode)
    path = graph or workspace_at(workspace).only_graph()
    show(describe_roofline(model(path, chosen, mode=mode, precision=precision), every=every), as_json)
