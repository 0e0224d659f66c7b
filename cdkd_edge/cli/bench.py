"""The command that measures an engine: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import show, steps, workspace_at
from cdkd_edge.cli.options import (
    BandsOption,
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
    from cdkd_edge.report.bench import describe_bench

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
