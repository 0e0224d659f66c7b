"""A benchmark: measure an engine, time a scene, and write a folder with everything that was measured."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window

from cdkd_edge.benchmark.folder import (
    PAGE,
    PICTURE,
    read_run,
    write_conditions,
    write_summary,
    write_tiles,
    write_trace,
)
from cdkd_edge.benchmark.phases import DEFAULT, LiveStatus, Timeline, run_phases
from cdkd_edge.benchmark.picture import write_trace_picture
from cdkd_edge.benchmark.record import INVALID, BenchSummary, EndToEnd, Figures, Protocol, Repeat
from cdkd_edge.benchmark.report_page import write_report_page
from cdkd_edge.benchmark.results import (
    NoFigureError,
    condition_findings,
    figures_of,
    load_conditions,
    rejected,
    repeats_of,
)
from cdkd_edge.benchmark.roofline.devices import load_device
from cdkd_edge.benchmark.roofline.model import modelled_bound
from cdkd_edge.benchmark.verdict import judge
from cdkd_edge.board.conditions import Conditions, ConditionsMonitor
from cdkd_edge.board.jetson import BoardIdentity, describe_board
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.sampler import PowerSampler, find_source
from cdkd_edge.core.errors import PowerError, SceneError, UsageError
from cdkd_edge.core.files import scratch_folder, whole_folder
from cdkd_edge.core.machine import describe_machine, forget_peak_memory, library_versions, peak_memory
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

PAPER_TILE = 1024  # side of a tile in the Mask-CDKD paper's deployment, px
LIBRARIES = ("onnxruntime", "numpy", "rasterio", "tensorrt", "tensorrt-rtx", "pycuda", "cuda-python", "jetson-stats")
RESERVED = ".reserved"  # file that reserves disk space during the measurement
LEAST_TILES, MOST_TILES = 4, 100  # number of tiles in a drawn scene
PICTURE_SIDE = 1024
"""Side of the picture that is repeated in a drawn scene, px. Drawing the whole scene would take gigabytes."""


@dataclass(frozen=True)
class BenchOptions:
    """How a run is made."""

    protocol: Protocol = DEFAULT  # from ``cdkd_edge.benchmark.phases.protocol_of``
    power: bool = False
    power_source: str | None = None  # name of a power source; implies ``power``. Default: the first that answers.
    keep_invalid: bool = False  # complete a run that cannot become valid, and give its figures
    scene: Path | None = None  # scene for the end-to-end time. Default: a drawn one.
    segment: SegmentOptions = SegmentOptions()
    device: str | None = None  # device file for the modelled bound. Default: that of this board or GPU.
    graphs: tuple[Path, ...] = ()  # folders to look for the engine's graph in
    command: str = ""  # the command line, for the record
    root: Path = field(default=Path("/"))  # root of the file tree with ``/sys``, ``/proc`` and ``/etc``

    @property
    def wants_power(self) -> bool:
        """Whether to measure power."""
        return self.power or self.power_source is not None


def run_benchmark(
    engine: Engine,
    folder: Path,
    options: BenchOptions = BenchOptions(),
    note: Callable[[str], None] = lambda text: None,
    show_status: Callable[[LiveStatus], None] = lambda status: None,
) -> BenchSummary:
    """Measure an engine and write the run's folder.

    The folder holds ``summary.json``, ``tiles.csv``, ``conditions.csv``, ``trace.png``, ``report.html`` and, with
    power, ``trace.csv``.

    Args:
        engine: a loaded engine.
        folder: a new folder for the results; it appears when they are complete.
        options: see there.
        note: called with what is done before and after the measurement.
        show_status: called about twice a second during the measurement.

    Raises:
        EngineError: the engine failed.
        SceneError: the scene cannot be read (checked before the measurement; a later failure is a warning).
        PowerError: the named power source does not answer.
        UsageError: the paper's protocol with another tile or batch; no device file of that name.
        OSError: the folder cannot be written, or its disk is too full (checked before the measurement).
    """
    if options.protocol.preset == "paper" and (engine.manifest.tile, engine.manifest.batch) != (PAPER_TILE, 1):
        shape = f"{engine.manifest.batch} x {engine.manifest.tile} px"
        raise UsageError(
            f"--paper needs an engine that takes one tile of {PAPER_TILE} px at a time; this engine takes {shape}",
            hint=f"export --tile {PAPER_TILE} --batch 1, and build that",
        )
    if options.device is not None:
        load_device(options.device)
    with whole_folder(folder) as temporary:
        reserve_space(temporary, options.protocol)
        if options.scene is not None:
            check_scene(engine, options.scene, options.segment)
        fill_inputs(engine)
        summary = _measure(engine, temporary, options, note, show_status)
        note("drawing")
        # Drawn from the files, not from memory: this checks that what was written can be read back.
        run = replace(read_run(temporary, bounded=False), folder=folder)
        write_trace_picture(run, temporary / PICTURE)
        write_report_page(run, temporary / PAGE)
    return summary


def reserve_space(folder: Path, protocol: Protocol) -> None:
    """Reserve the disk space that the tables will need, so that a disk that fills up does not cost the measurement.

    Raises:
        OSError: there is too little space.
    """
    seconds = protocol.repeats * (protocol.load_seconds + protocol.warm_up_cap_seconds + protocol.idle_seconds)
    # 40 readings of 60 bytes and 30 tiles of 40 bytes a second; the pictures and the page.
    size = int(4e6 + seconds * 4000)
    with open(folder / RESERVED, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            error.filename = f"{size / 1e6:.0f} MB in {folder.parent}"
            raise


def fill_inputs(engine: Engine) -> None:
    """Put a different tile into every slot, so that no cache sees the same image twice in a row."""
    tile, batch = engine.manifest.tile, engine.manifest.batch
    (picture,) = sample_tiles(tile, 1)
    for slot in range(engine.slots):
        for index in range(batch):
            shift = (slot * batch + index) * 37 % tile
            engine.input(slot)[index] = np.roll(picture, (shift, shift), (1, 2))


@dataclass(frozen=True)
class _Measured:
    """What the measurement gave."""

    timeline: Timeline
    trace: Trace | None
    no_source: str  # why there is no trace
    readings: tuple[Conditions, ...]
    board: BoardIdentity
    peak_memory_bytes: int


def _measure(
    engine: Engine,
    folder: Path,
    options: BenchOptions,
    note: Callable[[str], None],
    show_status: Callable[[LiveStatus], None],
) -> BenchSummary:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    measured = _run_watched(engine, options, note, show_status)
    timeline, trace, protocol = measured.timeline, measured.trace, options.protocol
    repeats, power_reason = _repeats(measured, protocol, engine.manifest.batch)
    verdict = judge(
        timeline,
        protocol,
        repeats,
        engine.manifest,
        trace,
        power_reason,
        condition_findings(timeline, measured.readings),
        power_wanted=options.wants_power,
    )
    figures: Figures | None = None
    scene: EndToEnd | None = None
    quotable = verdict.status != INVALID or options.keep_invalid
    if repeats and quotable:
        figures = figures_of(repeats, timeline, engine.manifest.tile, trace, power_reason)
        note("a scene end to end")
        scene, warnings = _time_scene(engine, options, protocol.load_seconds * figures.tiles_per_second.mean / 2)
        verdict = replace(verdict, warnings=verdict.warnings + warnings)
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
        phases=timeline.phases,
        repeats=repeats if quotable else (),
        rejected_repeats=() if quotable else tuple(map(rejected, repeats)),
        end_to_end=scene,
        roofline=bound,
        roofline_reason=no_bound,
        machine=describe_machine(),
        board=_board(measured.board),
        conditions=load_conditions(timeline, measured.readings),
        libraries=library_versions(LIBRARIES),
        peak_memory_bytes=measured.peak_memory_bytes,
        started=started,
        origin=timeline.origin,
        command=options.command,
    )
    (folder / RESERVED).unlink()
    write_tiles(folder, timeline.batches)
    if trace is not None:
        write_trace(folder, trace, timeline.phases, timeline.origin)
    if measured.readings:
        write_conditions(folder, [(one.time - timeline.origin, columns(one)) for one in measured.readings])
    write_summary(folder, summary)
    return summary


def _run_watched(
    engine: Engine, options: BenchOptions, note: Callable[[str], None], show_status: Callable[[LiveStatus], None]
) -> _Measured:
    """Run the phases while power and conditions are sampled."""
    with ExitStack() as stack:
        sampler, reason = None, "not asked for (--power-trace)"
        if options.wants_power:
            note("looking for a source of power")
            sampler, reason = _start_sampler(options)
        if sampler is not None:
            stack.enter_context(sampler)
        monitor = stack.enter_context(ConditionsMonitor(options.root))
        board = describe_board(options.root)
        forget_peak_memory()  # preparing may take more than the engine does
        timeline = run_phases(engine, options.protocol, sampler, monitor, show_status, go_on=options.keep_invalid)
        memory = peak_memory()
    return _Measured(timeline, sampler.trace() if sampler else None, reason, monitor.readings(), board, memory)


def _start_sampler(options: BenchOptions) -> tuple[PowerSampler | None, str]:
    """A running sampler, or None and why there is none."""
    try:
        return find_source(options.power_source), ""
    except PowerError as error:
        if options.power_source is not None:
            raise
        return None, error.message


def _repeats(measured: _Measured, protocol: Protocol, batch: int) -> tuple[tuple[Repeat, ...], str]:
    """The repeats, without power if a phase has too few readings; and why there is no power figure."""
    timeline, trace = measured.timeline, measured.trace
    if trace is None:
        return repeats_of(timeline, protocol, batch, None), measured.no_source
    try:
        return repeats_of(timeline, protocol, batch, trace), ""
    except NoFigureError as error:
        return repeats_of(timeline, protocol, batch, None), f"{trace.source.name}: {error}"


def _time_scene(engine: Engine, options: BenchOptions, tiles: float) -> tuple[EndToEnd | None, tuple[str, ...]]:
    """Time of a scene; None and a warning if it fails, because the measurement is still good."""
    try:
        return time_scene(engine, options.scene, options.segment, tiles), ()
    except (SceneError, OSError) as error:
        # Rasterio says "See previous exception": that one is the cause.
        text = error.message if isinstance(error, SceneError) else str(error.__cause__ or error)
        return None, (f"the end-to-end time of a scene is missing: {text} (written to {tempfile.gettempdir()})",)


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


def check_scene(engine: Engine, scene: Path, options: SegmentOptions) -> None:
    """Check that the scene can be read and tiled, before anything is measured.

    Raises:
        SceneError: as the scene's reader does.
    """
    tile = engine.manifest.tile
    TileGrid.over(1, 1, tile, options.overlap_of(tile))
    options.open(scene).close()


def time_scene(engine: Engine, scene: Path | None, options: SegmentOptions, tiles: float) -> EndToEnd:
    """Segment a scene and time it; the label map is discarded.

    Args:
        engine: loaded.
        scene: a raster. Default: a drawn one of about ``tiles`` tiles, at least 4 and at most 100.
        options: how the scene is read and tiled.
        tiles: size of the drawn scene.

    Raises:
        EngineError, SceneError: the engine or the scene failed.
    """
    with scratch_folder() as temporary:
        path = scene
        if path is None:
            path = temporary / "drawn.tif"
            _draw_scene(path, _side(engine.manifest.tile, tiles))
        result = segment_scene(engine, path, temporary / "labels.tif", options)
    computed = result.tiles - result.tiles_without_data
    return EndToEnd(
        scene=scene.name if scene else "drawn",
        width=result.width,
        height=result.height,
        tiles=result.tiles,
        seconds=result.seconds,
        engine_seconds=result.engine_seconds,
        tiles_per_second=computed / result.seconds,
        megapixels_per_second=result.width * result.height / result.seconds / 1e6,
        overhead=result.seconds / result.engine_seconds if result.engine_seconds else None,
    )


def _side(tile: int, tiles: float) -> int:
    """Side of a square scene of about ``tiles`` tiles."""
    overlap = default_overlap(tile)
    across = int(np.clip(round(tiles**0.5), LEAST_TILES**0.5, MOST_TILES**0.5))
    return across * (tile - overlap) + overlap


def _draw_scene(path: Path, side: int) -> None:
    piece = min(side, PICTURE_SIDE)
    (image,) = sample_tiles(piece, 1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        for top in range(0, side, piece):
            for left in range(0, side, piece):
                height, width = min(piece, side - top), min(piece, side - left)
                dataset.write(image[:, :height, :width], window=Window(left, top, width, height))
