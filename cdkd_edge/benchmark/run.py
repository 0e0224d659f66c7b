"""A benchmark: measure an engine, time a scene, and write a folder with everything that was measured."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import rasterio
from rasterio.windows import Window

from cdkd_edge.benchmark import folder as files
from cdkd_edge.benchmark import results
from cdkd_edge.benchmark.layer_times import kernel_rows, layer_profile, modelled_shares, time_kernels
from cdkd_edge.benchmark.phases import DEFAULT, LiveStatus, PhaseRunner
from cdkd_edge.benchmark.record import INVALID, BenchSummary, EndToEnd, Figures, LayerProfile, Protocol
from cdkd_edge.benchmark.roofline.bound import model_of
from cdkd_edge.benchmark.roofline.devices import load_device
from cdkd_edge.benchmark.verdict import judge
from cdkd_edge.board.conditions import Conditions, ConditionsMonitor
from cdkd_edge.board.jetson import describe_board
from cdkd_edge.board.power.sampler import PowerSampler, find_source
from cdkd_edge.core.errors import EngineError, ManifestError, PowerError, SceneError, UsageError
from cdkd_edge.core.files import scratch_folder, whole_folder
from cdkd_edge.core.machine import describe_machine, forget_peak_memory, library_versions, peak_memory
from cdkd_edge.core.sample import sample_tiles
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.raster.grid import TileGrid, default_overlap
from cdkd_edge.segmentation.options import SegmentOptions
from cdkd_edge.segmentation.pipeline import segment_scene

PAPER_TILE = 1024  # side of a tile in the Mask-CDKD paper's deployment, px
LIBRARIES = (
    "onnxruntime", "openvino", "numpy", "rasterio", "tensorrt", "tensorrt-rtx", "pycuda", "cuda-python", "jetson-stats",
)  # fmt: skip
RESERVED = ".reserved"  # file that reserves disk space during the measurement
LEAST_TILES, MOST_TILES = 4, 100  # number of tiles in a drawn scene
PICTURE_SIDE = 1024  # of the picture that is repeated in a drawn scene, px: drawing all of it would take gigabytes


@dataclass(frozen=True)
class BenchOptions:
    """How a run is made."""

    protocol: Protocol = DEFAULT  # from ``cdkd_edge.benchmark.phases.protocol_of``
    power: bool = False
    power_source: str | None = None  # name of a power source; implies ``power``. Default: the first that answers.
    keep_invalid: bool = False  # complete a run that cannot become valid, and give its figures
    scene: Path | None = None  # scene for the end-to-end time. Default: a drawn one.
    segment: SegmentOptions = SegmentOptions()
    layers: bool = False  # time every layer as well, after the rest
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
    """Measure an engine and write the run's folder: ``summary.json``, tables, ``trace.png`` and ``report.html``.

    Args:
        engine: a loaded engine.
        folder: a new folder for the results; it appears when they are complete.
        options: see there.
        note: called with what is done before and after the measurement.
        show_status: called about twice a second during the measurement.

    Raises:
        EngineError, PowerError: the engine failed; the named power source does not answer.
        SceneError, OSError: before the measurement: the scene cannot be read; the disk is too full. Later on, a scene
            that fails is a warning.
        UsageError: the paper's protocol with another tile or batch; no device file of that name.
    """
    tile, batch = engine.manifest.tile, engine.manifest.batch
    if options.protocol.preset == "paper" and (tile, batch) != (PAPER_TILE, 1):
        raise UsageError(
            f"--paper needs an engine that takes one tile of {PAPER_TILE} px at a time; this engine takes "
            f"{batch} x {tile} px",
            hint=f"export --tile {PAPER_TILE} --batch 1, and build that",
        )
    if options.device is not None:
        load_device(options.device)
    with whole_folder(folder) as temporary:
        reserve_space(temporary, options.protocol)
        if options.scene is not None:  # can it be read and tiled?
            TileGrid.over(1, 1, tile, options.segment.overlap_of(tile))
            options.segment.open(options.scene).close()
        fill_inputs(engine)
        summary = _measure(engine, temporary, options, note, show_status)
        note("drawing")
        from cdkd_edge.benchmark.picture import write_trace_picture  # imports matplotlib: not before the measurement
        from cdkd_edge.benchmark.report_page import write_report_page

        # Drawn from the files, not from memory: this checks that what was written can be read back.
        run = replace(files.read_run(temporary, bounded=False), folder=folder)
        write_trace_picture(run, temporary / files.PICTURE)
        write_report_page(run, temporary / files.PAGE)
    return summary


def reserve_space(folder: Path, protocol: Protocol) -> None:
    """Reserve the disk space that the tables will need, so that a disk that fills up does not cost the measurement."""
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


def _measure(
    engine: Engine,
    folder: Path,
    options: BenchOptions,
    note: Callable[[str], None],
    show_status: Callable[[LiveStatus], None],
) -> BenchSummary:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    protocol, manifest, wanted = options.protocol, engine.manifest, options.wants_power
    with ExitStack() as stack:
        sampler, power_reason = _start_sampler(options, note)
        if sampler is not None:
            stack.enter_context(sampler)
        monitor = stack.enter_context(ConditionsMonitor(options.root))
        board = describe_board(options.root)
        forget_peak_memory()  # preparing may take more than the engine does
        timeline = PhaseRunner(engine, protocol, sampler, monitor, show_status, options.keep_invalid).run()
        memory = peak_memory()
    trace, readings = sampler.trace() if sampler else None, monitor.readings()
    try:
        repeats = results.repeats_of(timeline, protocol, manifest.batch, trace)
    except results.NoFigureError as error:
        repeats, power_reason = results.repeats_of(timeline, protocol, manifest.batch, None), str(error)
    findings = results.condition_findings(timeline, readings, board, repeats)
    verdict = judge(timeline, protocol, repeats, manifest, trace, power_reason, findings, power_wanted=wanted)
    if engine.warning:
        verdict = replace(verdict, warnings=(engine.warning, *verdict.warnings))
    figures: Figures | None = None
    scene: EndToEnd | None = None
    quotable = verdict.status != INVALID or options.keep_invalid
    if repeats and quotable:
        figures = results.figures_of(repeats, timeline, manifest.tile, trace, power_reason)
        note("a scene end to end")
        tiles = protocol.load_seconds * figures.tiles_per_second.mean / 2
        try:
            scene = time_scene(engine, options.scene, options.segment, tiles)
        except (SceneError, OSError) as error:  # the measurement is still good
            # Rasterio says "See previous exception": that one is the cause.
            text = error.message if isinstance(error, SceneError) else str(error.__cause__ or error)
            warning = f"the end-to-end time of a scene is missing: {text} (written to {tempfile.gettempdir()})"
            verdict = replace(verdict, warnings=(*verdict.warnings, warning))
    speed = figures.tiles_per_second.mean if figures else None
    mode, root = board.power_mode.name if board.power_mode else None, options.root
    model, no_model = model_of(manifest, options.graphs, device=options.device, mode=mode, root=root)
    layers: LayerProfile | None = None
    no_layers = "the run is invalid" if options.layers else "not asked for (--layers)"
    if options.layers and figures:
        note("the time of every layer")
        try:
            times = time_kernels(engine, figures.latency_ms.p50 / 1e3)
            modelled = modelled_shares(manifest, options.graphs, model, no_model)
            layers, no_layers = layer_profile(times, modelled), ""
            files.write_layers(folder, kernel_rows(times))
        except (EngineError, ManifestError) as error:
            no_layers = error.message
            verdict = replace(verdict, warnings=(*verdict.warnings, f"no times of layers: {no_layers}"))
    summary = BenchSummary(
        verdict=verdict, figures=figures, engine=manifest, protocol=protocol, phases=timeline.phases,
        repeats=repeats if quotable else (),
        rejected_repeats=() if quotable else tuple(map(results.rejected, repeats)),
        end_to_end=scene, roofline=model.bound(speed) if model else None, roofline_reason=no_model,
        layers=layers, layers_reason=no_layers, machine=describe_machine(),
        board=msgspec.to_builtins(board) if board.jetson else None,
        conditions=results.load_conditions(timeline, readings), libraries=library_versions(LIBRARIES),
        peak_memory_bytes=memory, started=started, origin=timeline.origin, command=options.command,
    )  # fmt: skip
    (folder / RESERVED).unlink()
    files.write_tiles(folder, timeline.batches)
    if trace is not None:
        files.write_trace(folder, trace, timeline.phases, timeline.origin)
    if readings:
        files.write_conditions(folder, [(one.time - timeline.origin, columns(one)) for one in readings])
    files.write_summary(folder, summary)
    return summary


def _start_sampler(options: BenchOptions, note: Callable[[str], None]) -> tuple[PowerSampler | None, str]:
    """A running sampler, or None and why there is none."""
    if not options.wants_power:
        return None, "not asked for (--power-trace)"
    note("looking for a source of power")
    try:
        return find_source(options.power_source), ""
    except PowerError as error:
        if options.power_source is not None:
            raise
        return None, error.message


def columns(reading: Conditions) -> dict[str, float]:
    """A reading as columns of ``conditions.csv``; names end in their units."""
    return {
        **{f"{name.removesuffix('-thermal')}_celsius": value for name, value in reading.temperatures.items()},
        **{f"{name}_mhz": value for name, value in reading.clocks_mhz.items()},
        **{f"fan_{name}": value for name, value in reading.fan.items()},
    }


def time_scene(engine: Engine, scene: Path | None, options: SegmentOptions, tiles: float) -> EndToEnd:
    """Segment a scene and time it; without one, a drawn scene of about ``tiles`` tiles. The label map is discarded.

    Raises:
        EngineError, SceneError: the engine or the scene failed.
    """
    with scratch_folder() as temporary:
        path = scene or temporary / "drawn.tif"
        if scene is None:
            tile = engine.manifest.tile
            across = int(np.clip(round(tiles**0.5), LEAST_TILES**0.5, MOST_TILES**0.5))
            _draw_scene(path, across * (tile - default_overlap(tile)) + default_overlap(tile))
        result = segment_scene(engine, path, temporary / "labels.tif", options)
    computed = result.tiles - result.tiles_without_data
    return EndToEnd(
        scene=scene.name if scene else "drawn", width=result.width, height=result.height, tiles=result.tiles,
        seconds=result.seconds, engine_seconds=result.engine_seconds, tiles_per_second=computed / result.seconds,
        megapixels_per_second=result.width * result.height / result.seconds / 1e6,
        overhead=result.seconds / result.engine_seconds if result.engine_seconds else None,
    )  # fmt: skip


def _draw_scene(path: Path, side: int) -> None:
    piece = min(side, PICTURE_SIDE)
    (image,) = sample_tiles(piece, 1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        for top in range(0, side, piece):
            for left in range(0, side, piece):
                height, width = min(piece, side - top), min(piece, side - left)
                dataset.write(image[:, :height, :width], window=Window(left, top, width, height))
