"""The benchmark: warm-up, timed tiles, a scene end to end, and power where there is a source for it."""

from __future__ import annotations

import csv
import datetime
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

from cdkd_edge import __version__
from cdkd_edge.benchmarks.statistics import Latency, latency_of
from cdkd_edge.engines.protocol import Engine
from cdkd_edge.errors import PowerError
from cdkd_edge.files import whole_folder, write_text
from cdkd_edge.machine import Machine, describe_machine
from cdkd_edge.manifest import EngineManifest, library_versions
from cdkd_edge.power.energy import LoadEnergy, load_energy
from cdkd_edge.power.find import find_source
from cdkd_edge.power.protocol import JOULES, WATTS
from cdkd_edge.power.sampler import PowerSampler
from cdkd_edge.power.trace import Phase, Trace
from cdkd_edge.scene.grid import TileGrid, default_overlap
from cdkd_edge.scene.pipeline import SegmentOptions, segment_scene
from cdkd_edge.scene.reader import SceneReader
from cdkd_edge.scenery import draw_scene

SUMMARY_VERSION = 1
IDLE_SECONDS = 5.0
LEAST_COVERAGE = 0.98
"""Share of a phase that must lie between readings for it to have a figure."""


@dataclass(frozen=True)
class BenchOptions:
    """How long and on what."""

    duration: float = 20.0
    """Seconds of timed tiles."""
    warmup: float = 3.0
    """Seconds of untimed tiles before them."""
    min_batches: int = 5
    """Batches timed at least, however slow the engine."""
    scene: Path | None = None
    """Scene for the end-to-end figure. Default: one that is drawn."""
    segment: SegmentOptions = SegmentOptions()
    power: bool = False
    power_source: str | None = None
    """One of ``cdkd_edge.power.protocol.SOURCES``. Default: the first that answers."""


@dataclass(frozen=True)
class EngineOnly:
    """Tiles from memory through the engine, one batch after the other."""

    tiles: int
    seconds: float
    tiles_per_second: float
    megapixels_per_second: float
    latency_ms: Latency


@dataclass(frozen=True)
class EndToEnd:
    """A scene from file to finished label map."""

    scene: str
    width: int
    height: int
    tiles: int
    seconds: float
    engine_seconds: float
    tiles_per_second: float
    megapixels_per_second: float
    """Scene pixels; overlaps and padding count as work but not as result."""
    overhead: float | None
    """Seconds over engine seconds; 1 means that reading and writing cost nothing. None: no tile was computed."""


@dataclass(frozen=True)
class Power:
    """Mean power over the idle and the load phase."""

    source: str
    scope: str
    idle_watts: dict[str, float]
    load_watts: dict[str, float]
    net_joules_per_tile: dict[str, float]
    gross_joules_per_tile: dict[str, float]
    readings_per_second: float
    problems: tuple[str, ...]
    """That the sampling met; it may have got over them."""


@dataclass(frozen=True)
class BenchSummary:
    """One run, as written to ``summary.json``."""

    engine: EngineManifest
    engine_only: EngineOnly
    end_to_end: EndToEnd
    power: Power | None
    power_reason: str
    """Why there is no power figure; empty where there is one."""
    machine: Machine
    libraries: dict[str, str]
    peak_memory_bytes: int
    """Largest resident size of the process so far."""
    started: str
    tool: str = f"cdkd-edge {__version__}"
    summary_version: int = SUMMARY_VERSION


def run_benchmark(
    engine: Engine,
    folder: Path,
    options: BenchOptions = BenchOptions(),
    progress: Callable[[str], None] = lambda phase: None,
) -> BenchSummary:
    """Measure an engine and write ``summary.json``, ``tiles.csv`` (and ``trace.csv`` with power).

    Args:
        engine: a loaded engine.
        folder: a new folder for the results; it appears when they are complete.
        options: durations, scene, power.
        progress: called with the name of each phase.

    Raises:
        EngineError, SceneError: the engine or the scene failed.
        PowerError: the source of power that was asked for by name does not answer.
        OSError: the folder cannot be written; known before anything is measured.
    """
    with whole_folder(folder) as temporary:
        return _measure(engine, temporary, options, progress)


def _measure(engine: Engine, folder: Path, options: BenchOptions, progress: Callable[[str], None]) -> BenchSummary:
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if options.scene is not None:
        _check_scene(engine, options.scene, options.segment)
    _fill_inputs(engine)
    power = None
    sampler, reason = _sampler(options)
    if sampler is None:
        samples, _ = _load_phase(engine, options, progress)
    else:
        samples, power, reason = _load_phase_with_power(engine, sampler, folder, options, progress)
    engine_only = _engine_only(engine, samples)
    progress("scene end to end")
    end_to_end = _end_to_end(engine, options, engine_only.tiles_per_second)

    summary = BenchSummary(
        engine=engine.manifest,
        engine_only=engine_only,
        end_to_end=end_to_end,
        power=power,
        power_reason=reason,
        machine=describe_machine(),
        libraries=library_versions(("onnxruntime", "numpy", "rasterio")),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        started=started,
    )
    _write_tiles(folder / "tiles.csv", samples)
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(summary), indent=2).decode()
    write_text(folder / "summary.json", text + "\n")
    return summary


def _load_phase(
    engine: Engine, options: BenchOptions, progress: Callable[[str], None]
) -> tuple[list[tuple[float, float]], float]:
    """Warm-up, then timed batches; also the moment the timing began."""
    progress("warm-up")
    _run_for(engine, options.warmup, 1)
    progress("timed tiles")
    began = time.perf_counter()
    return _run_for(engine, options.duration, options.min_batches), began


def _sampler(options: BenchOptions) -> tuple[PowerSampler | None, str]:
    """A running sampler, or None and why there is none."""
    if not options.power and options.power_source is None:
        return None, "not asked for (--power-trace)"
    try:
        return find_source(options.power_source), ""
    except PowerError as error:
        if options.power_source is not None:
            raise
        return None, error.message


def _load_phase_with_power(
    engine: Engine, sampler: PowerSampler, folder: Path, options: BenchOptions, progress: Callable[[str], None]
) -> tuple[list[tuple[float, float]], Power | None, str]:
    """An idle phase with the engine loaded, then the load phase, while power is sampled in another process."""
    with sampler:
        progress("idle")
        some = 3 * sampler.trace().source.nominal_interval
        time.sleep(some)  # for readings before the phase
        with sampler.phase("idle"):
            time.sleep(IDLE_SECONDS)  # the measurement itself: nothing may run now
        samples, load_from = _load_phase(engine, options, progress)
        load = Phase("load", load_from, time.perf_counter())
        time.sleep(some)  # for readings after the last tile
    trace = sampler.trace()
    idle = trace.phase("idle")
    _write_trace(folder / "trace.csv", trace, (idle, load))
    return (samples, *_power(trace, idle, load, len(samples) * engine.manifest.batch))


def _power(trace: Trace, idle: Phase, load: Phase, tiles: int) -> tuple[Power | None, str]:
    """Figures of both phases, or None and why there are none."""
    name = trace.source.name
    ended = [problem.message for problem in trace.problems if problem.kind in ("lost", "died")]
    if ended:
        return None, f"{name} stopped answering: {ended[0]}"
    energies: dict[str, LoadEnergy] = {}
    for rail in trace.source.rails:
        energy = load_energy(trace, rail, idle, load)
        if energy is None or min(energy.idle.readings, energy.load.readings) < 2:
            short = min(idle, load, key=lambda phase: phase.seconds)
            return None, f"{name}: too few readings of {rail} in {short.seconds:.1f} s of {short.name}"
        covered = min(energy.idle.coverage, energy.load.coverage)
        if covered < LEAST_COVERAGE:
            why = "".join(f"; {problem.message}" for problem in trace.problems)
            return None, f"{name}: readings of {rail} are missing in {1 - covered:.0%} of a phase{why}"
        energies[rail] = energy
    # Time that is not covered took what the rest of the load took: at most 1 - LEAST_COVERAGE of it.
    per_tile = load.seconds / tiles
    power = Power(
        source=name,
        scope=trace.source.scope,
        idle_watts={rail: energy.idle.watts for rail, energy in energies.items()},
        load_watts={rail: energy.load.watts for rail, energy in energies.items()},
        net_joules_per_tile={rail: energy.net_watts * per_tile for rail, energy in energies.items()},
        gross_joules_per_tile={rail: energy.load.watts * per_tile for rail, energy in energies.items()},
        readings_per_second=trace.rate or 0.0,
        problems=tuple(problem.message for problem in trace.problems),
    )
    return power, ""


def _check_scene(engine: Engine, scene: Path, options: SegmentOptions) -> None:
    """Find what is wrong with the scene now, not after the measurement."""
    tile = engine.manifest.tile
    TileGrid.over(1, 1, tile, default_overlap(tile) if options.overlap is None else options.overlap)
    SceneReader(scene, bands=options.bands, stretch=options.stretch).close()


def _fill_inputs(engine: Engine) -> None:
    """Different drawn tiles in every slot, so that no cache sees the same image twice in a row."""
    tile, batch = engine.manifest.tile, engine.manifest.batch
    scene = draw_scene(tile * 2, tile * 2, seed=3).image
    for slot in range(engine.slots):
        for index in range(batch):
            shift = (slot * batch + index) * 37 % tile
            engine.input(slot)[index] = scene[shift : shift + tile, shift : shift + tile].transpose(2, 0, 1)


def _run_for(engine: Engine, seconds: float, at_least: int) -> list[tuple[float, float]]:
    """Run batches for a time; (start, latency) of each, in seconds since the first."""
    samples: list[tuple[float, float]] = []
    origin = time.perf_counter()
    while len(samples) < at_least or time.perf_counter() - origin < seconds:
        slot = len(samples) % engine.slots
        begin = time.perf_counter()
        engine.launch(slot)
        engine.wait(slot)
        samples.append((begin - origin, time.perf_counter() - begin))
    return samples


def _engine_only(engine: Engine, samples: list[tuple[float, float]]) -> EngineOnly:
    tile, batch = engine.manifest.tile, engine.manifest.batch
    seconds = samples[-1][0] + samples[-1][1]
    rate = len(samples) * batch / seconds
    return EngineOnly(
        tiles=len(samples) * batch,
        seconds=seconds,
        tiles_per_second=rate,
        megapixels_per_second=rate * tile * tile / 1e6,
        latency_ms=latency_of([latency for _, latency in samples]),
    )


def _end_to_end(engine: Engine, options: BenchOptions, tiles_per_second: float) -> EndToEnd:
    with tempfile.TemporaryDirectory(prefix="cdkd-edge-bench-") as temporary:
        scene = options.scene
        if scene is None:
            scene = Path(temporary) / "drawn.tif"
            _draw_to(scene, _scene_side(engine, options.duration * tiles_per_second / 2))
        result = segment_scene(engine, scene, Path(temporary) / "labels.tif", options.segment)
    computed = result.tiles - result.tiles_without_data
    return EndToEnd(
        scene=options.scene.name if options.scene else "drawn",
        width=result.width,
        height=result.height,
        tiles=result.tiles,
        seconds=result.seconds,
        engine_seconds=result.engine_seconds,
        tiles_per_second=computed / result.seconds,
        megapixels_per_second=result.width * result.height / result.seconds / 1e6,
        overhead=result.seconds / result.engine_seconds if result.engine_seconds else None,
    )


def _scene_side(engine: Engine, tiles: float) -> int:
    """Side of a square scene of about ``tiles`` tiles, 4 to 100 of them."""
    tile = engine.manifest.tile
    overlap = default_overlap(tile)
    across = int(np.clip(round(tiles**0.5), 2, 10))
    side = across * (tile - overlap) + overlap
    assert len(TileGrid.over(side, side, tile, overlap)) == across**2
    return side


def _draw_to(path: Path, side: int) -> None:
    image = draw_scene(side, side, seed=5).image
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=256, blockysize=256) as dataset:
        dataset.write(image.transpose(2, 0, 1))


def _write_tiles(path: Path, samples: list[tuple[float, float]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["batch", "start_s", "latency_ms"])
        writer.writerows((i, f"{start:.6f}", f"{latency * 1e3:.3f}") for i, (start, latency) in enumerate(samples))


def _write_trace(path: Path, trace: Trace, phases: tuple[Phase, ...]) -> None:
    """Every reading, in the source's own quantity; an empty field is a rail that could not be read."""
    unit = {WATTS: "w", JOULES: "j"}[trace.source.quantity]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time_s", "uncertainty_s", "phase", *(f"{rail}_{unit}" for rail in trace.source.rails)])
        for sample in trace.samples:
            phase = next((phase.name for phase in phases if phase.start <= sample.time < phase.stop), "")
            values = (f"{sample.values[rail]:.6f}" if rail in sample.values else "" for rail in trace.source.rails)
            writer.writerow([f"{sample.time - trace.start:.6f}", f"{sample.uncertainty:.6f}", phase, *values])
