"""``cdkd-edge bench``: measure an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from typer import Argument, BadParameter, Option

from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.cli.options import ENGINE, JSON, OVERLAP, THREADS, WORKSPACE, StretchOptions, chosen_engine, command_line
from cdkd_edge.cli.progress import lines, saying_what_is_kept
from cdkd_edge.cli.report import Console, Listing, Report, cell, say
from cdkd_edge.core.signals import check
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.benchmark.phases import LiveStatus
    from cdkd_edge.benchmark.record import BenchSummary, Protocol
    from cdkd_edge.benchmark.run import BenchOptions


@dataclass(frozen=True)
class PowerOptions:
    """Power and clocks."""

    PANEL: ClassVar[str] = "Power and clocks"

    power_trace: bool = Option(False, help="Measure idle and load power, where there is a source.")
    power_source: str | None = Option(None, help=f"Measure power, with this source only: {', '.join(SOURCES)}.")
    set_mode: str | None = Option(
        None, help="Power mode (nvpmodel) for the run, by name or number; then set back. Needs root.", metavar="MODE"
    )
    max_clocks: bool = Option(False, help="Run jetson_clocks for the run; set back afterwards. Needs root.")


@dataclass(frozen=True)
class TimingOptions:
    """How long is measured."""

    PANEL: ClassVar[str] = "Protocol"

    duration: float | None = Option(None, help="Time under load, seconds. Default: 60.", min=0.1)
    idle: float | None = Option(None, help="Time of each idle phase (with power), seconds. Default: 10.", min=0.1)
    max_warm_up: float | None = Option(
        None, help="Longest warm-up, s; it ends when speed, power and temperature are steady. Default: 120.", min=0
    )
    repeat: int | None = Option(None, help="Rounds of idle, warm-up, load; several give intervals. Default: 1.", min=1)
    paper: bool = Option(False, help="As in the paper: tiles of 1024 px one by one; 60 s idle, 120 s load, 3 repeats.")
    mlperf: bool = Option(False, help="600 s of load, 60 s idle.")

    def checked(self) -> Protocol:
        """The protocol of these options."""
        from cdkd_edge.benchmark.phases import protocol_of

        if self.paper and self.mlperf:
            raise BadParameter("one protocol at a time", param_hint="--paper --mlperf")
        preset: Literal["paper", "mlperf", "default"] = (
            "paper" if self.paper else "mlperf" if self.mlperf else "default"
        )
        longest, repeats = self.max_warm_up, self.repeat
        return protocol_of(preset, idle=self.idle, load=self.duration, warm_up_cap=longest, repeats=repeats)


@dataclass(frozen=True)
class ProtocolOptions(TimingOptions):
    """The same, and what to do with a run that is invalid."""

    keep_invalid: bool = Option(False, help="Give the figures of an invalid run too, and exit with 0.")


@dataclass(frozen=True)
class SceneGroup(StretchOptions):
    """The scene that is timed as a whole."""

    PANEL: ClassVar[str] = "The scene of the end-to-end figure"

    scene: Path | None = Option(None, help="A scene of your own. Default: sample tiles, repeated.")
    overlap: int | None = OVERLAP


def bench(
    artefact: Path | None = Argument(None, metavar="ENGINE", help="Engine file. Default: the workspace's only one."),
    *,
    engine: Path | None = ENGINE,
    output: Path | None = Option(None, "--output", "-o", help="New folder for the run. Default: benchmarks/RUN."),
    power: PowerOptions,
    protocol: ProtocolOptions,
    scene: SceneGroup,
    layers: bool = Option(
        False, help="Then time every layer, beside the roofline, in runs with the runtime's profiler."
    ),
    device: str | None = Option(None, help="Device of the modelled bound (see roofline). Default: this board or GPU."),
    threads: int | None = THREADS,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Measure an engine: tiles per second, latency, idle and load power, a scene. Writes benchmarks/RUN/.

    Idle with the engine loaded, warm-up until steady, load, idle again. A run that was throttled, or whose power
    readings have gaps, is invalid: it has no figures, and the command exits with 19.
    """
    from cdkd_edge.benchmark.record import INVALID
    from cdkd_edge.benchmark.run import BenchOptions
    from cdkd_edge.core.errors import BenchError

    space = Workspace(workspace)
    path = chosen_engine(space, "cdkd-edge bench", artefact, engine)
    options = BenchOptions(
        protocol=protocol.checked(),
        power=power.power_trace,
        power_source=power.power_source,
        keep_invalid=protocol.keep_invalid,
        scene=scene.scene,
        segment=scene.segment_options(overlap=scene.overlap),
        layers=layers,
        device=device,
        graphs=(space.graphs, path.parent),
        command=command_line(),
    )
    summary, folder = _run(space, path, output, options, power, threads)
    describe_bench(summary, folder).show(as_json)
    if summary.verdict.status == INVALID and not protocol.keep_invalid:
        raise BenchError(f"the run is invalid: {summary.verdict.reasons[0]}", hint=f"see {folder}, or --keep-invalid")


def _run(
    space: Workspace, path: Path, output: Path | None, options: BenchOptions, power: PowerOptions, threads: int | None
) -> tuple[BenchSummary, Path]:
    """Measure with the board's mode and clocks set, and give the folder of the run to who owns the workspace."""
    from cdkd_edge.benchmark.run import run_benchmark
    from cdkd_edge.board.modes import changed_board, pending_restore
    from cdkd_edge.core.files import remove_abandoned
    from cdkd_edge.engines.runtimes import load_engine

    if not (power.set_mode or power.max_clocks) and (pending := pending_restore()) is not None:
        say(f"warning: not set back yet: {pending} — {' && '.join(pending.commands)}")
    with changed_board(power.set_mode, power.max_clocks) as change:
        if change.restored:
            say(f"set back first: {change.restored}")
        if change.mode:  # MAXN may have become MAXN_SUPER
            say(f"power mode {change.mode}")
        with load_engine(path, threads=threads) as engine:
            for left in remove_abandoned(space.benchmarks):
                say(f"removed {left}, which a killed run had left")
            with saying_what_is_kept(), live_line() as (note, show):
                folder = output or space.new_run(engine.manifest.name)
                summary = run_benchmark(engine, folder, options, note, show)
            space.hand_over(folder)
    return summary, folder


def describe_bench(summary: BenchSummary, folder: Path) -> Report:
    """A finished run; beside the paper's figures where power was measured."""
    from cdkd_edge.benchmark.describe import PAPER, PAPER_DEVICE, bench_rows, beside_the_paper, layer_tables

    paper = beside_the_paper(summary)
    listings = [Listing(("", "this run", f"{PAPER_DEVICE}, {PAPER}"), paper)] if paper else []
    listings += [Listing(columns, tuple(rows), title) for title, columns, rows in layer_tables(summary)]
    return Report(
        f"benchmark {folder}", [*bench_rows(summary)], {"folder": folder, "summary": summary}, tuple(listings)
    )


@contextlib.contextmanager
def live_line() -> Iterator[tuple[Callable[[str], None], Callable[[LiveStatus], None]]]:
    """A line on stderr that says what is being measured; drawn only when told, so that it takes no time meanwhile."""
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as note:
            yield note, lambda live: note(live_text(live))
        return
    with Live(console=console, auto_refresh=False, transient=True) as line:

        def draw(text: str) -> None:
            check()
            line.update(cell(text), refresh=True)

        yield draw, lambda live: draw(live_text(live))


def live_text(live: LiveStatus) -> str:
    """The line, e.g. ``load 2/3   12.41 tiles/s   18.9 W   61 °C   34 s left``."""
    parts = [live.phase + (f" {min(live.repeat + 1, live.repeats)}/{live.repeats}" if live.repeats > 1 else "")]
    for value, form in (
        (live.tiles_per_second, "{:.2f} tiles/s"),
        (live.watts, "{:.1f} W"),
        (live.celsius, "{:.0f} °C"),
        (live.seconds_left, "{:.0f} s left" if live.phase != "warm-up" else "{:.0f} s left at most"),
    ):
        if value is not None:
            parts.append(form.format(value))
    return "   ".join(parts)
