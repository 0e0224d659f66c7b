"""The command that measures an engine: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cdkd_edge.cli.app import app
from cdkd_edge.cli.helpers import command_line, say, show, telling_what_is_kept, workspace_at
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
    named_engine,
    segment_options,
)

_PROTOCOL = "Protocol"
_POWER = "Power and clocks"
_SCENE = "The scene of the end-to-end figure"


@app.command()
def bench(
    engine: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Engine file. Default: the only one in the workspace."),
    ] = None,
    option: EngineOption = None,
    power_trace: Annotated[
        bool,
        typer.Option(
            "--power-trace", help="Measure idle and load power, where there is a source.", rich_help_panel=_POWER
        ),
    ] = False,
    power_source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--power-source",
            help="Measure power, and only from jtop, ina3221, nvml or rapl.",
            rich_help_panel=_POWER,
        ),
    ] = None,
    set_mode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--set-mode",
            help="nvpmodel's power mode for the run, by name or number; put back afterwards. Needs root.",
            metavar="MODE",
            rich_help_panel=_POWER,
        ),
    ] = None,
    max_clocks: Annotated[
        bool,
        typer.Option(
            "--max-clocks", help="jetson_clocks for the run; put back afterwards. Needs root.", rich_help_panel=_POWER
        ),
    ] = False,
    duration: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds of load, timed. Default: 60.", min=0.1, rich_help_panel=_PROTOCOL),
    ] = None,
    idle: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds of each idle phase (with power). Default: 10.", min=0.1, rich_help_panel=_PROTOCOL),
    ] = None,
    max_warm_up: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--max-warm-up",
            help="Warm-up ends when speed, power and temperature are steady, or after so many seconds. Default: 120.",
            min=0,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    repeat: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--repeat",
            help="Idle, warm-up and load so many times: gives intervals. Default: 1.",
            min=1,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="As in the paper: one tile of 1024 px at a time; 60 s idle, 120 s load, 3 repeats.",
            rich_help_panel=_PROTOCOL,
        ),
    ] = False,
    mlperf: Annotated[
        bool,
        typer.Option("--mlperf", help="600 s of load, 60 s idle.", rich_help_panel=_PROTOCOL),
    ] = False,
    keep_invalid: Annotated[
        bool,
        typer.Option(
            "--keep-invalid", help="Give the figures of an invalid run, and exit with 0.", rich_help_panel=_PROTOCOL
        ),
    ] = False,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--device", help="Device file of the modelled bound (see roofline). Default: that of this board or GPU."
        ),
    ] = None,
    scene: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Default: a drawn one.", rich_help_panel=_SCENE),
    ] = None,
    overlap: OverlapOption = None,
    bands: BandsOption = None,
    stretch: StretchOption = False,
    stretch_percentiles: PercentilesOption = None,
    stretch_range: RangeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure an engine: tiles per second, latency, idle and load power, a scene. Writes benchmarks/RUN/.

    Idle with the engine loaded, warm-up until steady, load, idle again. A run that was throttled, or whose power
    readings have gaps, is invalid: it has no figures, and the command exits with 19.
    """
    from cdkd_edge.bench.phases import protocol_of
    from cdkd_edge.bench.record import INVALID
    from cdkd_edge.bench.run import BenchOptions, run_benchmark
    from cdkd_edge.board.modes import changed_board, pending_restore
    from cdkd_edge.cli.show.bench import describe_bench, live_bench
    from cdkd_edge.core.errors import BenchError
    from cdkd_edge.core.files import remove_abandoned
    from cdkd_edge.engines.runtimes import load_engine

    if paper and mlperf:
        raise typer.BadParameter("one protocol at a time", param_hint="--paper --mlperf")
    space = workspace_at(workspace)
    path = named_engine(engine, option) or space.only_engine("cdkd-edge bench", typed=command_line())
    options = BenchOptions(
        protocol=protocol_of(
            "paper" if paper else "mlperf" if mlperf else "default",
            idle=idle,
            load=duration,
            warm_up_cap=max_warm_up,
            repeats=repeat,
        ),
        power=power_trace,
        power_source=power_source,
        keep_invalid=keep_invalid,
        scene=scene,
        segment=segment_options(overlap, bands, stretch, stretch_percentiles, stretch_range),
        device=device,
        graphs=(space.graphs, path.parent),
        command=command_line(),
    )
    if not (set_mode or max_clocks) and (pending := pending_restore()) is not None:
        say(f"warning: not put back yet: {pending} — {' && '.join(pending.commands)}")
    with changed_board(set_mode, max_clocks) as change:
        if change.restored:
            say(f"put back first: {change.restored}")
        loaded = load_engine(path, threads=threads)
        try:
            for left in remove_abandoned(space.benchmarks):
                say(f"removed {left}, which a killed run had left")
            with telling_what_is_kept(), live_bench() as (note, show_status):
                folder = space.new_run(loaded.manifest.name)
                summary = run_benchmark(loaded, folder, options, note, show_status)
            space.hand_over(folder)
        finally:
            loaded.close()
    show(describe_bench(summary, folder), as_json)
    if summary.verdict.status == INVALID and not keep_invalid:
        raise BenchError(f"the run is invalid: {summary.verdict.reasons[0]}", hint=f"see {folder}, or --keep-invalid")
