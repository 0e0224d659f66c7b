"""Benchmarks: what was measured is what is written, all of it, and what was not measured says why."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import msgspec
import numpy as np
import pytest
from board import CHIP, HWMON, VOLTS, make_tree, write
from hypothesis import given
from hypothesis import strategies as st
from scene_helpers import FakeEngine, names_in, noise, pipeline_threads, relaxed, write_raster

from cdkd_edge.benchmarks import bench
from cdkd_edge.benchmarks.bench import BenchOptions, BenchSummary, run_benchmark
from cdkd_edge.benchmarks.statistics import latency_of
from cdkd_edge.errors import EngineError, PowerError, SceneError
from cdkd_edge.power.find import find_source
from cdkd_edge.power.sampler import PowerSampler
from cdkd_edge.report.bench import describe_bench

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Six tiles."""
    return write_raster(tmp_path / "six tiles.tif", noise(112, 160))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the results will be; not yet there."""
    return tmp_path / "runs" / "run"


def latencies(folder: Path) -> list[float]:
    with open(folder / "tiles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["batch"]) for row in rows] == list(range(len(rows)))
    starts = [float(row["start_s"]) for row in rows]
    assert starts == sorted(starts)
    return [float(row["latency_ms"]) for row in rows]


# --- statistics -----------------------------------------------------------------------------------


@relaxed
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_percentiles_are_observed_samples(seconds: list[float]) -> None:
    latency = latency_of(seconds)
    ordered = sorted(second * 1e3 for second in seconds)
    assert latency.samples == len(seconds)
    for value, percent in ((latency.p50, 50), (latency.p90, 90), (latency.p99, 99)):
        assert value == ordered[math.ceil(len(ordered) * percent / 100) - 1], "nearest rank"
    assert (latency.minimum, latency.maximum) == (ordered[0], ordered[-1])
    assert latency.mean == pytest.approx(statistics.fmean(ordered))


def test_an_outlier_is_a_sample_like_any_other() -> None:
    latency = latency_of([0.010] * 98 + [0.5, 9.0])
    assert (latency.p50, latency.p90, latency.p99, latency.maximum) == (10, 10, 500, 9000)
    assert latency.mean == pytest.approx(10 * 0.98 + 95)


def test_without_a_sample_there_is_no_statistic() -> None:
    with pytest.raises(ValueError, match="no latency"):
        latency_of([])


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "slots"), [(1, 3), (4, 1)])
def test_speed_of_an_engine_of_known_speed(folder: Path, scene: Path, batch: int, slots: int) -> None:
    engine = FakeEngine(batch=batch, slots=slots, delay=0.010)
    phases: list[str] = []
    summary = run_benchmark(engine, folder, BenchOptions(0.4, 0.1, scene=scene), phases.append)
    assert phases == ["warm-up", "timed tiles", "scene end to end"]
    only, latency = summary.engine_only, summary.engine_only.latency_ms
    assert 0.4 <= only.seconds < 2
    assert only.tiles == latency.samples * batch
    assert only.tiles_per_second == pytest.approx(only.tiles / only.seconds)
    assert 10 * batch < only.tiles_per_second <= 100 * batch
    assert only.megapixels_per_second == pytest.approx(only.tiles_per_second * 64 * 64 / 1e6)
    assert 10 <= latency.minimum <= latency.p50 <= latency.p90 <= latency.p99 <= latency.maximum
    assert latency.p50 < 50

    end = summary.end_to_end
    assert (end.scene, end.width, end.height, end.tiles) == ("six tiles.tif", 160, 112, 6)
    assert end.engine_seconds >= 0.010 * math.ceil(6 / batch)
    assert end.seconds >= end.engine_seconds
    assert end.overhead == pytest.approx(end.seconds / end.engine_seconds)
    assert end.tiles_per_second == pytest.approx(6 / end.seconds)
    assert end.megapixels_per_second == pytest.approx(112 * 160 / end.seconds / 1e6)


def test_what_is_written_is_what_was_measured(folder: Path, scene: Path) -> None:
    delays = iter([0.004, 0.150, 0.002, 0.008, 0.030, 0.001])
    engine = FakeEngine(delay=lambda _: next(delays, 0.001))
    summary = run_benchmark(engine, folder, BenchOptions(0.01, 0, min_batches=5, scene=scene))
    measured = latencies(folder)
    latency = summary.engine_only.latency_ms
    # one batch of warm-up takes the first delay
    assert len(measured) == latency.samples == 5
    for found, least in zip(measured, (150, 2, 8, 30, 1), strict=True):
        assert least <= found < least + 100
    assert latency.maximum == pytest.approx(max(measured), abs=1e-3)
    assert latency.maximum >= 150, "the outlier counts"
    for percentile in (latency.minimum, latency.p50, latency.p90, latency.p99):
        assert min(abs(percentile - sample) for sample in measured) <= 1e-3
    assert latency.mean == pytest.approx(statistics.fmean(measured), abs=1e-2)
    assert summary.engine_only.seconds >= sum(measured) / 1e3 - 1e-3


@pytest.mark.parametrize("min_batches", [1, 7])
def test_slow_engines_are_timed_over_a_least_number_of_tiles(folder: Path, scene: Path, min_batches: int) -> None:
    summary = run_benchmark(FakeEngine(delay=0.02), folder, BenchOptions(0.001, 0, min_batches, scene))
    assert summary.engine_only.latency_ms.samples == min_batches == len(latencies(folder))


def test_every_slot_takes_its_turn_and_holds_another_picture(folder: Path, scene: Path) -> None:
    engine = FakeEngine(batch=2, slots=3)
    seen: list[bytes] = []
    engine._function = lambda tiles: seen.extend(tile.tobytes() for tile in tiles) or tiles[:, 0] // 64
    run_benchmark(engine, folder, BenchOptions(0.001, 0, 6, scene))
    timed = seen[2:14]  # after the one batch of warm-up
    assert len(set(timed)) == 6


def test_the_summary_is_json_with_everything_to_repeat_it(folder: Path, scene: Path) -> None:
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(0.05, 0, scene=scene))
    assert names_in(folder) == ["summary.json", "tiles.csv"]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "summary.json").read_text()
    document = json.loads(text, parse_constant=no_constant)
    assert document["power"] is None
    assert document["power_reason"] == "not asked for (--power-trace)"
    assert document["summary_version"] == 1
    assert document["engine"]["artefact"]["sha256"] == "ab" * 32
    assert document["machine"]["cores"] >= 1
    assert set(document["libraries"]) >= {"python", "onnxruntime", "numpy", "rasterio"}
    assert document["peak_memory_bytes"] > 10e6
    assert document["started"].endswith("+00:00")
    assert msgspec.json.decode(text, type=BenchSummary) == summary
    assert json.loads(json.dumps(describe_bench(summary, folder).data))["summary"] == document


def test_without_a_scene_one_is_drawn(folder: Path) -> None:
    summary = run_benchmark(FakeEngine(delay=0.001), folder, BenchOptions(0.02, 0))
    end = summary.end_to_end
    assert end.scene == "drawn"
    assert end.width == end.height
    assert (end.width - 16) % 48 == 0, "no part of a tile is padding"
    assert 4 <= end.tiles == ((end.width - 16) // 48) ** 2 <= 100


def test_an_empty_scene_has_no_overhead_and_still_a_summary(folder: Path, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "empty.tif", np.zeros((3, 100, 100), np.uint8), nodata=0)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(0.01, 0, scene=path))
    assert json.loads((folder / "summary.json").read_text())["end_to_end"]["overhead"] is None
    assert summary.end_to_end.tiles_per_second == 0
    data = json.dumps(describe_bench(summary, folder).data)
    assert "NaN" not in data, "--json gives JSON"


# --- power ----------------------------------------------------------------------------------------


IDLE, LOAD = 100.0, 150.0


class Hungry(FakeEngine):
    """Takes 150 W from its first tile on, and 100 W before, on an emulated board's INA3221."""

    def __init__(self, tree: Path, **options: Any) -> None:
        super().__init__(**options)
        self._tree = tree

    def launch(self, slot: int) -> None:
        if not self.launches:
            write(self._tree / HWMON / "curr1_input", round(LOAD / VOLTS * 1000))
        super().launch(slot)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sysfs of a board, the only source of power there is; the idle phase is short."""
    root = make_tree(tmp_path / "sys", (IDLE, 10.0, 5.0))

    def find(forced: str | None = None) -> PowerSampler:
        return find_source(forced or "ina3221", 0.02, sys_root=root)

    monkeypatch.setattr(bench, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(bench, "find_source", find)
    yield root
    assert pipeline_threads() == []


@pytest.mark.parametrize("batch", [1, 2])
def test_power_and_energy_per_tile(folder: Path, scene: Path, tree: Path, batch: int) -> None:
    engine = Hungry(tree, delay=0.005, batch=batch)
    phases: list[str] = []
    options = BenchOptions(0.6, 0.05, scene=scene, power=True)
    summary = run_benchmark(engine, folder, options, phases.append)
    assert phases == ["idle", "warm-up", "timed tiles", "scene end to end"]
    assert summary.power_reason == ""
    assert summary.power is not None
    power = summary.power
    assert (power.source, power.scope, power.problems) == ("ina3221", "module", ())
    assert power.idle_watts == pytest.approx({"VDD_IN": IDLE, "VDD_CPU_GPU_CV": 10, "VDD_SOC": 5}, rel=0.02)
    assert power.load_watts["VDD_IN"] == pytest.approx(LOAD, rel=0.02)
    per_tile = 1 / summary.engine_only.tiles_per_second
    assert power.net_joules_per_tile["VDD_IN"] == pytest.approx((LOAD - IDLE) * per_tile, rel=0.1)
    assert power.gross_joules_per_tile["VDD_IN"] == pytest.approx(LOAD * per_tile, rel=0.1)
    shown = dict(describe_bench(summary, folder).rows)["power (module)"]
    assert re.fullmatch(r"VDD_SOC: idle 5.00 W, load 5.00 W, net -?0\.0\d J per tile \(ina3221\)", shown)
    with open(folder / "trace.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"time_s", "uncertainty_s", "phase", "VDD_IN_w", "VDD_CPU_GPU_CV_w", "VDD_SOC_w"}
    for phase, watts in (("idle", IDLE), ("load", LOAD)):
        of_phase = {float(row["VDD_IN_w"]) for row in rows if row["phase"] == phase}
        assert of_phase == {watts}
    document = json.loads((folder / "summary.json").read_text())
    assert document["power"]["scope"] == "module"


@pytest.mark.parametrize("dies_after", [0.0, 0.2, 0.8])
def test_a_source_that_dies_gives_no_figure(
    folder: Path, scene: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, dies_after: float
) -> None:
    def doomed(forced: str | None = None) -> PowerSampler:
        sampler = find_source("ina3221", 0.02, sys_root=tree)
        assert sampler._process is not None
        Timer(dies_after, sampler._process.kill).start()
        return sampler

    monkeypatch.setattr(bench, "find_source", doomed)
    summary = run_benchmark(Hungry(tree, delay=0.005), folder, BenchOptions(0.8, 0.05, scene=scene, power=True))
    assert summary.power is None
    assert summary.power_reason == "ina3221 stopped answering: the sampling process died (SIGKILL)"
    assert summary.engine_only.tiles > 0, "the speed stands"
    assert "trace.csv" in names_in(folder), "what was heard is kept"


def test_a_sensor_that_is_away_for_a_while_gives_no_figure(folder: Path, scene: Path, tree: Path) -> None:
    chip = tree / CHIP
    Timer(0.6, lambda: chip.rename(tree / "away")).start()
    Timer(1.1, lambda: (tree / "away").rename(chip)).start()
    summary = run_benchmark(FakeEngine(delay=0.005), folder, BenchOptions(1.2, 0, scene=scene, power=True))
    assert summary.power is None
    assert re.search(r"readings of VDD_IN are missing in \d\d% of a phase; .*No such file", summary.power_reason)


def test_no_source_is_a_reason(folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(forced: str | None = None) -> PowerSampler:
        raise PowerError("RAPL: no CPU package under /sys")

    monkeypatch.setattr(bench, "find_source", find)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(0.05, 0, scene=scene, power=True))
    assert summary.power is None
    assert summary.power_reason == "RAPL: no CPU package under /sys"
    assert names_in(folder) == ["summary.json", "tiles.csv"]
    with pytest.raises(PowerError):
        run_benchmark(FakeEngine(), folder.with_name("forced"), BenchOptions(0.05, 0, scene=scene, power_source="rapl"))
    assert names_in(folder.parent) == ["run", "run/summary.json", "run/tiles.csv"]


def test_a_run_too_short_for_a_sample_says_so(folder: Path, scene: Path, tree: Path) -> None:
    summary = run_benchmark(Hungry(tree), folder, BenchOptions(0.001, 0, scene=scene, power=True))
    assert summary.power is None
    assert re.fullmatch(r"ina3221: too few readings of VDD_IN in 0\.\d s of load", summary.power_reason)


# --- errors ---------------------------------------------------------------------------------------


def test_an_engine_that_fails_leaves_no_summary(folder: Path, scene: Path) -> None:
    error = EngineError("no")
    with pytest.raises(EngineError) as caught:
        run_benchmark(FakeEngine(fail_at=3, error=error), folder, BenchOptions(0.1, 0, scene=scene))
    assert caught.value is error
    assert names_in(folder.parent) == []


def test_results_never_meet_those_of_another_run(folder: Path, scene: Path) -> None:
    run_benchmark(FakeEngine(), folder, BenchOptions(0.01, 0, scene=scene))
    before = (folder / "summary.json").read_bytes()
    engine = FakeEngine()
    with pytest.raises(OSError, match="run"):
        run_benchmark(engine, folder, BenchOptions(0.01, 0, scene=scene))
    assert engine.launches == 0, "known before anything is measured"
    assert (folder / "summary.json").read_bytes() == before
    assert names_in(folder.parent) == ["run", "run/summary.json", "run/tiles.csv"]


def test_a_scene_that_is_not_there_is_found_before_the_long_measurement(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine(delay=0.01)
    with pytest.raises(SceneError, match="does not exist"):
        run_benchmark(engine, folder, BenchOptions(0.5, 0, scene=tmp_path / "missing.tif"))
    assert names_in(folder.parent) == []
    assert engine.launches == 0


def test_sampling_stops_when_the_engine_fails(
    folder: Path, scene: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = []

    def find(forced: str | None = None) -> PowerSampler:
        samplers.append(find_source("ina3221", 0.02, sys_root=tree))
        return samplers[0]

    monkeypatch.setattr(bench, "find_source", find)
    with pytest.raises(EngineError):
        run_benchmark(
            FakeEngine(fail_at=3, error=EngineError("no")), folder, BenchOptions(0.1, 0, scene=scene, power=True)
        )
    process = samplers[0]._process
    assert process is not None
    assert process.poll() is not None
    assert pipeline_threads() == []
