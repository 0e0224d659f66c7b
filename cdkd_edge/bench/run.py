"""The benchmark: a course of idle, warm-up and load, a scene end to end, and a folder with all that was measured."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cdkd_edge.bench.course import Course, Live, run_course
from cdkd_edge.bench.end_to_end import RESERVED, check_scene, fill_inputs, reserve_room, time_scene
from cdkd_edge.bench.figures import NoFigureError, figures_of, rejected, repeats_of
from cdkd_edge.bench.folder import PAGE, PICTURE, read_run, write_conditions, write_summary, write_tiles, write_trace
from cdkd_edge.bench.page.report import write_report_page
from cdkd_edge.bench.plot import write_trace_picture
from cdkd_edge.bench.protocols import DEFAULT
from cdkd_edge.bench.record import INVALID, LOAD, WARM_UP, BenchSummary, EndToEnd, Figures, Protocol, Repeat
from cdkd_edge.bench.roofline.bound import modelled_bound
from cdkd_edge.bench.roofline.devices import load_device
from cdkd_edge.bench.verdict import judge
from cdkd_edge.board.conditions import Conditions, ConditionsMonitor
from cdkd_edge.board.identity import BoardIdentity, describe_board
from cdkd_edge.board.power.sampler import PowerSampler
from cdkd_edge.board.power.sources import find_source
from cdkd_edge.board.power.trace import Trace
from cdkd_edge.board.throttling import judge_conditions, judge_other_programs, judge_power_mode, others_share, summarise
from cdkd_edge.core.errors import PowerError, SceneError, UsageError
from cdkd_edge.core.files import whole_folder
from cdkd_edge.core.machine import describe_machine, forget_peak_memory, peak_memory
from cdkd_edge.core.manifest import library_versions
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.segment.options import SegmentOptions

PAPER_TILE = 1024
"""Side of a tile in the Mask-CDKD paper's deployment, px."""
LIBRARIES = ("onnxruntime", "numpy", "rasterio", "tensorrt", "tensorrt-rtx", "pycuda", "cuda-python", "jetson-stats")


@dataclass(frozen=True)
class BenchOptions:
    """How a run is made."""

    protocol: Protocol = DEFAULT
    """From :func:`~cdkd_edge.bench.protocols.protocol_of`."""
    power: bool = False
    power_source: str | None = None
    """One of ``cdkd_edge.board.power.protocol.SOURCES``; implies ``power``. Default: the first that answers."""
    keep_invalid: bool = False
    """Go on with a run that cannot become valid, and give its figures."""
    scene: Path | None = None
    """Scene for the end-to-end figure. Default: one that is drawn."""
    segment: SegmentOptions = SegmentOptions()
    device: str | None = None
    """Device file for the modelled bound. Default: that of this board or GPU."""
    graphs: tuple[Path, ...] = ()
    """Folders where the engine's graph may be."""
    command: str = ""
    """What was typed, for the record."""
    root: Path = field(default=Path("/"))
    """Of the file tree with ``/sys``, ``/proc`` and ``/etc`` that clocks and temperatures are read from."""

    @property
    def wants_power(self) -> bool:
        """Whether power is to be measured."""
        return self.power or self.power_source is not None


def run_benchmark(
    engine: Engine,
    folder: Path,
    options: BenchOptions = BenchOptions(),
    progress: Callable[[str], None] = lambda step: None,
    tell: Callable[[Live], None] = lambda live: None,
) -> BenchSummary:
    """Measure an engine and write the run's folder.

    ``summary.json``, ``tiles.csv``, ``conditions.csv``, with power ``trace.csv``; ``trace.png`` and ``report.html``.

    Args:
        engine: a loaded engine.
        folder: a new folder for the results; it appears when they are complete.
        options: see there.
        progress: called with what is done besides the measurement.
        tell: called about twice a second during it.

    Raises:
        EngineError: the engine failed.
        SceneError: the scene cannot be read; known before anything is measured. If it fails later, that is a warning.
        PowerError: the source of power that was asked for by name does not answer.
        UsageError: the paper's protocol with another tile or batch; no device file of that name.
        OSError: the folder cannot be written, or has no room; known before anything is measured.
    """
    if options.protocol.preset == "paper" and (engine.manifest.tile, engine.manifest.batch) != (PAPER_TILE, 1):
        shape = f"{engine.manifest.batch} x {engine.manifest.tile} px"
        raise UsageError(
            f"the paper measured one tile of {PAPER_TILE} px at a time; this engine takes {shape}",
            hint=f"export --tile {PAPER_TILE} --batch 1, and build that",
        )
    if options.device is not None:
        load_device(options.device)
    with whole_folder(folder) as temporary:
        reserve_room(temporary, options.protocol)
        if options.scene is not None:
            check_scene(engine, options.scene, options.segment)
        fill_inputs(engine)
        summary = _measure(engine, temporary, options, progress, tell)
        progress("drawing")
        run = replace(read_run(temporary, bounded=False), folder=folder)
        write_trace_picture(run, temporary / PICTURE)
        write_report_page(run, temporary / PAGE)
    return summary


@dataclass(frozen=True)
class _Measured:
    """What there is when the course is over."""

    course: Course
    trace: Trace | None
    no_source: str
    """Why there is no trace."""
    readings: tuple[Conditions, ...]
    board: BoardIdentity
    peak_memory_bytes: int


def _measure(
    engine: Engine,
    folder: Path,
    options: BenchOptions,
    progress: Callable[[str], None],
    tell: Callable[[Live], None],
) -> BenchSummary:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    measured = _run(engine, options, progress, tell)
    course, trace, protocol = measured.course, measured.trace, options.protocol
    repeats, power_reason = _repeats(measured, protocol, engine.manifest.batch)
    loads = [span for span in course.phases if span.name == LOAD]
    findings = [
        finding
        for span in loads
        for finding in judge_conditions(measured.readings, course.origin + span.start, course.origin + span.stop)
    ]
    restless = [repeat for repeat, steady in enumerate(course.steady) if not steady]
    findings += [
        finding
        for span in course.spans
        if span.name == LOAD or (span.name == WARM_UP and span.repeat in restless)
        for finding in judge_other_programs(
            measured.readings, course.origin + span.start, course.origin + span.stop, f"{span.name} {span.repeat + 1}"
        )
    ]
    if loads:  # idle is taken off what the load took: a mode for both
        whole = (course.origin + course.phases[0].start, course.origin + course.phases[-1].stop)
        findings += judge_power_mode(measured.readings, *whole)
    verdict = judge(
        course,
        protocol,
        repeats,
        engine.manifest,
        trace,
        power_reason,
        findings,
        power_wanted=options.wants_power,
    )
    figures: Figures | None = None
    end_to_end: EndToEnd | None = None
    quotable = verdict.status != INVALID or options.keep_invalid
    if repeats and quotable:
        figures = figures_of(repeats, course, engine.manifest.tile, trace, power_reason)
        progress("a scene end to end")
        tiles = protocol.load_seconds * figures.tiles_per_second.mean / 2
        try:
            end_to_end = time_scene(engine, options.scene, options.segment, tiles)
        except (SceneError, OSError) as error:  # a full disk, a damaged block: what was measured stands all the same
            # Rasterio's "See previous exception" is the cause.
            said = error.message if isinstance(error, SceneError) else str(error.__cause__ or error)
            warning = f"the scene end to end has no figure: {said} (it is written to {tempfile.gettempdir()})"
            verdict = replace(verdict, warnings=(*verdict.warnings, warning))

    mode = measured.board.power_mode
    bound, no_bound = modelled_bound(
        engine.manifest,
        options.graphs,
        figures.tiles_per_second.mean if figures else None,
        device=options.device,
        mode=mode.name if mode else None,
        root=options.root,
    )
    summary = BenchSummary(
        verdict=verdict,
        figures=figures,
        engine=engine.manifest,
        protocol=protocol,
        phases=course.phases,
        repeats=repeats if quotable else (),
        rejected_repeats=() if quotable else tuple(map(rejected, repeats)),
        end_to_end=end_to_end,
        roofline=bound,
        roofline_reason=no_bound,
        machine=describe_machine(),
        board=_board(measured.board),
        conditions=_conditions(measured, loads),
        libraries=library_versions(LIBRARIES),
        peak_memory_bytes=measured.peak_memory_bytes,
        started=started,
        origin=course.origin,
        command=options.command,
    )
    (folder / RESERVED).unlink()
    write_tiles(folder, course.batches)
    if trace is not None:
        write_trace(folder, trace, course.phases, course.origin)
    if measured.readings:
        write_conditions(folder, [(one.time - course.origin, columns(one)) for one in measured.readings])
    write_summary(folder, summary)
    return summary


def _run(
    engine: Engine, options: BenchOptions, progress: Callable[[str], None], tell: Callable[[Live], None]
) -> _Measured:
    """The course, with whatever watches it."""
    with ExitStack() as stack:
        sampler, reason = None, "not asked for (--power-trace)"
        if options.wants_power:
            progress("looking for a source of power")
            sampler, reason = _sampler(options)
        if sampler is not None:
            stack.enter_context(sampler)
        monitor = stack.enter_context(ConditionsMonitor(options.root))
        board = describe_board(options.root)
        forget_peak_memory()  # drawing tiles may take more than the engine does
        course = run_course(engine, options.protocol, sampler, monitor, tell, go_on=options.keep_invalid)
        memory = peak_memory()
    return _Measured(course, sampler.trace() if sampler else None, reason, monitor.readings(), board, memory)


def _sampler(options: BenchOptions) -> tuple[PowerSampler | None, str]:
    """A running sampler, or None and why there is none."""
    try:
        return find_source(options.power_source), ""
    except PowerError as error:
        if options.power_source is not None:
            raise
        return None, error.message


def _repeats(measured: _Measured, protocol: Protocol, batch: int) -> tuple[tuple[Repeat, ...], str]:
    """With power where that has figures, else without; and why it has none."""
    course, trace = measured.course, measured.trace
    if trace is None:
        return repeats_of(course, protocol, batch, None), measured.no_source
    try:
        return repeats_of(course, protocol, batch, trace), ""
    except NoFigureError as error:
        return repeats_of(course, protocol, batch, None), f"{trace.source.name}: {error}"


def columns(reading: Conditions) -> dict[str, float]:
    """A reading as columns of ``conditions.csv``; names end in their units."""
    return {
        **{f"{name.removesuffix('-thermal')}_celsius": value for name, value in reading.temperatures.items()},
        **{f"{name}_mhz": value for name, value in reading.clocks_mhz.items()},
        **{f"fan_{name}": value for name, value in reading.fan.items()},
    }


def _board(board: BoardIdentity) -> dict[str, Any] | None:
    import msgspec

    data: dict[str, Any] = msgspec.to_builtins(board)
    return data if board.jetson else None


def _conditions(measured: _Measured, loads: list[Any]) -> dict[str, Any]:
    """Over all loads, what lies between them left out."""
    origin = measured.course.origin
    if not loads:
        return {}
    within = [
        one for one in measured.readings if any(origin + span.start <= one.time <= origin + span.stop for span in loads)
    ]
    found = summarise(within, origin + loads[0].start, origin + loads[-1].stop)
    # As the verdict sees them: from the last reading before a load to the first one after it.
    risen = [summarise(measured.readings, origin + span.start, origin + span.stop)["throttle_events"] for span in loads]
    found["throttle_events"] = {name: sum(one.get(name, 0) for one in risen) for name in sorted(set().union(*risen))}
    shares = [others_share(measured.readings, origin + span.start, origin + span.stop) for span in loads]
    known = [share for share in shares if share is not None]
    found["other_programs_percent"] = 100 * max(known) if known else None
    return found
