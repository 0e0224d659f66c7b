"""``cdkd-edge sweep``: which graph, precision, tile, batch and power mode?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typer import Argument, BadParameter, Option

from cdkd_edge.board.power.sources import SOURCES
from cdkd_edge.cli.bench import TimingOptions, live_line
from cdkd_edge.cli.options import JSON, OVERLAP, SCENES, SCHEMA, THREADS, WORKSPACE, command_line, split_names
from cdkd_edge.cli.progress import saying_what_is_kept
from cdkd_edge.cli.report import Listing, Report, Rows
from cdkd_edge.core.errors import BenchError
from cdkd_edge.core.process import module_command
from cdkd_edge.core.workspace import Workspace
from cdkd_edge.engines.runtimes import RUNTIMES, choose_runtime

if TYPE_CHECKING:
    from cdkd_edge.benchmark.sweep_table import Sweep
    from cdkd_edge.board.jetson import PowerMode
    from cdkd_edge.quality.datasets import Dataset


@dataclass(frozen=True)
class CrossOptions:
    """What is crossed."""

    PANEL: ClassVar[str] = "What is crossed"

    precision: str | None = Option(
        None, help="fp32, fp16, bf16, int8, with commas. Default: all that the runtime can run.", metavar="A,B"
    )
    tile: str | None = Option(
        None, help="Sides of tiles, px, with commas; needs a checkpoint. Default: its own.", metavar="N,M"
    )
    batch: str | None = Option(
        None, help="Tiles per batch, with commas; needs a checkpoint. Default: 1.", metavar="N,M"
    )
    power_mode: str | None = Option(
        None, help="Power modes (nvpmodel), by name or number, with commas. Needs root.", metavar="A,B"
    )

    def modes(self) -> tuple[PowerMode | None, ...]:
        """The power modes; None is the one that the machine is in."""
        from cdkd_edge.board.jetson import read_modes
        from cdkd_edge.board.modes import ROOT, find_mode, require_changeable

        names = split_names(self.power_mode)
        if not names:
            return (None,)
        modes = tuple(dict.fromkeys(find_mode(read_modes(ROOT), name) for name in names))
        require_changeable()
        return modes


@dataclass(frozen=True)
class SweepDataOptions:
    """Which labelled images mIoU is measured on."""

    PANEL: ClassVar[str] = "Accuracy"

    data: Path | None = Option(None, help="Labelled images to measure mIoU on, laid out as for evaluate.")
    schema: str | None = SCHEMA
    scenes: str | None = SCENES
    max_loss: float = Option(0.5, help="Points of mIoU that the chosen point may lie below the best one.", min=0)

    def dataset(self) -> Dataset | None:
        """The images, None without ``--data``."""
        from cdkd_edge.quality.datasets import find_dataset

        if self.data is None:
            if self.schema or self.scenes:
                raise BadParameter("they say how to read --data", param_hint="--schema, --scenes")
            return None
        found = find_dataset(self.data)
        return found.of_scenes(split_names(self.scenes)) if self.scenes else found


@dataclass(frozen=True)
class SweepPowerOptions:
    """Power and clocks."""

    PANEL: ClassVar[str] = "Power and clocks"

    power_trace: bool = Option(False, help="Measure idle and load power, where there is a source.")
    power_source: str | None = Option(None, help=f"Measure power, with this source only: {', '.join(SOURCES)}.")
    max_clocks: bool = Option(False, help="Run jetson_clocks for each benchmark; set back afterwards. Needs root.")


@dataclass(frozen=True)
class SweepTimingOptions(TimingOptions):
    """How long each point is measured."""

    PANEL: ClassVar[str] = "Protocol of each point"


def sweep(
    artefacts: list[Path] = Argument(..., metavar="CKPT|GRAPH...", help="Checkpoints, and graphs of any precision."),
    *,
    output: Path | None = Option(
        None,
        "--output",
        "-o",
        help="Folder of the sweep, new or to go on with. Default: benchmarks/sweep.",
    ),
    cross: CrossOptions,
    accuracy: SweepDataOptions,
    power: SweepPowerOptions,
    timing: SweepTimingOptions,
    runtime: str = Option("auto", help=f"{', '.join(RUNTIMES)}, or auto: what build chooses for each engine."),
    calibration: list[Path] | None = Option(
        None,
        help="Calibration set for INT8; repeatable, for tiles of several sizes. Default: the workspace's.",
    ),
    overlap: int | None = OVERLAP,
    threads: int | None = THREADS,
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Build, evaluate and measure every combination, and say which one to take.

    Writes sweep.json and sweep.html with one table, a picture of what no other point beats, and the command that
    rebuilds each point. What is measured is kept: the same command goes on after an interruption, and tries again what
    failed. Exits with 19 if a point failed.
    """
    from cdkd_edge.benchmark.report_page import write_sweep_page
    from cdkd_edge.benchmark.sweep import SweepOptions, open_sources, run_sweep
    from cdkd_edge.benchmark.sweep_table import PAGE, failures, kept

    timing.checked()
    choose_runtime(runtime)  # raises the error for one that there is not
    space = Workspace(workspace)
    folder = output or space.benchmarks / "sweep"
    shared = words_of(overlap=overlap, threads=threads)
    options = SweepOptions(
        runtime=runtime,
        precisions=tuple(dict.fromkeys(split_names(cross.precision))),
        tiles=_numbers(cross.tile, "--tile"),
        batches=_numbers(cross.batch, "--batch"),
        modes=cross.modes(),
        calibrations=tuple(calibration or ()),
        overlap=overlap,
        dataset=accuracy.dataset(),
        evaluate=(*words_of(data=accuracy.data, schema=accuracy.schema, scenes=accuracy.scenes), *shared),
        bench=(*words_of(**dataclasses.asdict(power), **dataclasses.asdict(timing)), *shared),
        loss=accuracy.max_loss,
        step=module_command("cdkd_edge.cli.step"),
    )
    sources = open_sources(artefacts)
    with saying_what_is_kept(lambda: kept(folder)), live_line() as (note, _):
        found = run_sweep(sources, folder, space, options, command_line(), note)
        note("drawing")
        write_sweep_page(found, folder / PAGE)
    space.hand_over(folder)
    describe_sweep(found, folder).show(as_json)
    if failed := failures(found):
        reason = failed[0].reason or failed[0].mean_iou_reason
        hint = "mend it and run the same command again; what is measured is kept"
        raise BenchError(f"{len(failed)} of {len(found.points)} points failed: {reason}", hint=hint)


def words_of(**options: Any) -> tuple[str, ...]:
    """The words of options on a command line; None and False are left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return tuple(words)


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once."""
    names = split_names(text)
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise BadParameter(f"whole numbers with commas, e.g. 512,1024, not {text!r}", param_hint=option)
    return tuple(dict.fromkeys(map(int, names)))


def describe_sweep(found: Sweep, folder: Path) -> Report:
    """One table of all points; above it what to take, how to rebuild it, and why other points have no figures."""
    from cdkd_edge.benchmark.sweep_table import PAGE, sources, table, troubles

    header, cells = table(found)
    rows: Rows = [("page", str(folder / PAGE)), *(("graph", f"{name}: {text}") for name, text in sources(found))]
    for point in found.points:
        if point.number == found.chosen:
            rows.append(("take", f"point {point.number}: {found.rule}"))
            rows.append(("rebuild", " && ".join(point.rebuild)))
    rows += troubles(found)
    return Report(f"sweep of {len(cells)} points on {found.device}", rows, found, (Listing(header, cells),))
