"""Benchmarks: what was measured is what is written, all of it, and what was not measured says why."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import msgspec
import numpy as np
import pytest
from board import CHIP, HWMON, VOLTS, make_tree, write
from hypothesis import given
from hypothesis import strategies as st
from scene_helpers import FakeEngine, names_in, noise, pipeline_threads, relaxed, write_raster

from cdkd_edge.benchmark import phases as bench_phases
from cdkd_edge.benchmark import picture, report_page
from cdkd_edge.benchmark import run as bench
from cdkd_edge.benchmark.folder import read_run
from cdkd_edge.benchmark.phases import LiveStatus, protocol_of
from cdkd_edge.benchmark.record import BenchSummary, Protocol
from cdkd_edge.benchmark.run import BenchOptions, run_benchmark
from cdkd_edge.benchmark.statistics import figure_of, latency_of, t_quantile, variance_hidden_by_sharing
from cdkd_edge.board.conditions import ConditionsMonitor
from cdkd_edge.board.power.sampler import PowerSampler, find_source
from cdkd_edge.cli.bench import describe_bench, live_text
from cdkd_edge.cli.report import plain
from cdkd_edge.core.errors import EngineError, PowerError, SceneError, UsageError
from cdkd_edge.core.machine import forget_peak_memory, peak_memory
from cdkd_edge.core.sample import sample_tiles

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
    """Of the load phases, in ms."""
    with open(folder / "tiles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["batch"]) for row in rows] == list(range(len(rows)))
    starts = [float(row["start_s"]) for row in rows]
    assert starts == sorted(starts)
    return [float(row["latency_ms"]) for row in rows if row["phase"] == "load"]


def times(load: float, warm_up: float = 0.0, *, idle: float = 0.3, repeats: int = 1, batches: int = 1) -> Protocol:
    """A protocol of a fraction of a second, with windows that fit."""
    return Protocol("default", idle, load, repeats, warm_up / 6, warm_up, batches)


# --- statistics -----------------------------------------------------------------------------------


@relaxed
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_percentiles_are_observed_samples(seconds: list[float]) -> None:
    latency = latency_of(seconds)
    ordered = sorted(second * 1e3 for second in seconds)
    assert latency.samples == len(seconds)
    for value, percent in ((latency.p50, 50), (latency.p90, 90), (latency.p99, 99)):
        assert value in (None, ordered[math.ceil(len(ordered) * percent / 100) - 1]), "nearest rank"
    assert (latency.minimum, latency.maximum) == (ordered[0], ordered[-1])
    assert latency.mean == pytest.approx(statistics.fmean(ordered))


def test_an_outlier_is_a_sample_like_any_other() -> None:
    latency = latency_of([0.010] * 392 + [0.5] * 4 + [9.0] * 4)
    assert (latency.p50, latency.p90, latency.p99, latency.maximum) == (10, 10, 500, 9000)
    assert latency.mean == pytest.approx(10 * 0.98 + 95)


@pytest.mark.parametrize(
    ("count", "absent"),
    [
        (1, "p90 needs 29 batches and p99 needs 299 batches, there are 1"),
        (28, "p90 needs 29 batches and p99 needs 299 batches, there are 28"),
        (66, "p99 needs 299 batches, there are 66"),
        (298, "p99 needs 299 batches, there are 298"),
        (299, ""),
    ],
)
def test_a_percentile_that_would_be_the_maximum_is_absent_with_the_reason(count: int, absent: str) -> None:
    latency = latency_of([0.01 + 1e-5 * number for number in range(count)])
    assert latency.absent == absent
    assert (latency.p90 is None, latency.p99 is None) == (count < 29, count < 299)


def test_without_a_sample_there_is_no_statistic() -> None:
    with pytest.raises(ValueError, match="no latency"):
        latency_of([])


def test_intervals_are_those_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in [*range(1, 40), 99, 100, 1000]:
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)
        assert t_quantile(freedom, 0.9) == pytest.approx(stats.t.ppf(0.9, freedom), rel=1e-8)
    values = [2.41, 2.52, 2.48, 2.44]
    figure = figure_of(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert figure.interval is not None
    assert (figure.mean, figure.interval.low, figure.interval.high) == pytest.approx((np.mean(values), low, high))


@pytest.mark.parametrize(("repeats", "load"), [(2, 1.0), (3, 0.5), (3, 0.0), (5, 0.0), (10, 0.5)])
def test_intervals_of_repeats_that_share_idle_phases_hold(repeats: int, load: float) -> None:
    """Plain t-intervals of idle watts held 91, 88, 84 and 83 % with 2, 3, 5 and 10 repeats."""
    random = np.random.default_rng(3)
    held = []
    for _ in range(2000):
        idle = 5.74 + 0.05 * random.standard_normal(repeats + 1)
        loads = 18.95 + 0.05 * load * random.standard_normal(repeats)
        net = figure_of(list(loads - (idle[1:] + idle[:-1]) / 2), variance_hidden_by_sharing(list(idle)))
        assert net.interval is not None
        held.append(net.interval.low <= 13.21 <= net.interval.high)
    assert np.mean(held) >= 0.94
    assert variance_hidden_by_sharing([5.7, 5.8]) == 0, "one repeat shares nothing"


def test_one_repeat_has_no_interval() -> None:
    assert figure_of([2.5]) == figure_of([2.5])
    assert figure_of([2.5]).interval is None
    with pytest.raises(ValueError, match="0 values"):
        figure_of([])
    for freedom, probability in ((0, 0.975), (3, 0.5), (3, 1.0)):
        with pytest.raises(ValueError, match="need freedom"):
            t_quantile(freedom, probability)


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_rest_and_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_phases, "SETTLE_SECONDS", 0.4)
    monkeypatch.setattr(picture, "write_trace_picture", lambda run, path: None)
    monkeypatch.setattr(report_page, "write_report_page", lambda run, path: None)


@pytest.mark.parametrize(("batch", "slots"), [(1, 3), (4, 1)])
def test_speed_of_an_engine_of_known_speed(folder: Path, scene: Path, batch: int, slots: int) -> None:
    engine = FakeEngine(batch=batch, slots=slots, delay=0.010)
    summary = run_benchmark(engine, folder, BenchOptions(times(0.4, 0.1), scene=scene))
    assert [span.name for span in summary.phases] == ["warm-up", "load"], "without power nothing idles"
    (repeat,), figures = summary.repeats, summary.figures
    assert figures is not None
    latency = figures.latency_ms
    assert 0.4 <= repeat.seconds < 2
    assert repeat.tiles == latency.samples * batch
    assert figures.tiles_per_second.values == (repeat.tiles_per_second,)
    assert repeat.tiles_per_second == pytest.approx(repeat.tiles / repeat.seconds)
    assert 10 * batch < repeat.tiles_per_second <= 100 * batch
    assert figures.megapixels_per_second.mean == pytest.approx(repeat.tiles_per_second * 64 * 64 / 1e6)
    assert 10 <= latency.minimum <= latency.p50 <= latency.maximum
    assert latency.p50 < 50

    end = summary.end_to_end
    assert end is not None
    assert (end.scene, end.width, end.height, end.tiles) == ("six tiles.tif", 160, 112, 6)
    assert end.engine_seconds >= 0.010 * math.ceil(6 / batch)
    assert end.seconds >= end.engine_seconds
    assert end.overhead == pytest.approx(end.seconds / end.engine_seconds)
    assert end.tiles_per_second == pytest.approx(6 / end.seconds)
    assert end.megapixels_per_second == pytest.approx(112 * 160 / end.seconds / 1e6)


def test_what_is_written_is_what_was_measured(folder: Path, scene: Path) -> None:
    delays = iter([0.004, 0.150, 0.002, 0.008, 0.030, 0.001])
    engine = FakeEngine(delay=lambda _: next(delays, 0.001))
    summary = run_benchmark(engine, folder, BenchOptions(times(0.01, batches=5), scene=scene))
    measured = latencies(folder)
    assert summary.figures is not None
    latency = summary.figures.latency_ms
    # one batch of warm-up takes the first delay
    assert len(measured) == latency.samples == 5
    for found, least in zip(measured, (150, 2, 8, 30, 1), strict=True):
        assert least <= found < least + 100
    assert latency.maximum == pytest.approx(max(measured), abs=1e-3)
    assert latency.maximum >= 150, "the outlier counts"
    for percentile in (latency.minimum, latency.p50, latency.p90 or latency.p50):
        assert min(abs(percentile - sample) for sample in measured) <= 1e-3
    assert latency.mean == pytest.approx(statistics.fmean(measured), abs=1e-2)
    assert summary.repeats[0].seconds >= sum(measured) / 1e3 - 1e-3


@pytest.mark.parametrize("batches", [1, 7])
def test_slow_engines_are_timed_over_a_least_number_of_tiles(folder: Path, scene: Path, batches: int) -> None:
    summary = run_benchmark(FakeEngine(delay=0.02), folder, BenchOptions(times(0.001, batches=batches), scene=scene))
    assert summary.repeats[0].latency_ms.samples == batches == len(latencies(folder))


def test_every_slot_takes_its_turn_and_holds_another_picture(folder: Path, scene: Path) -> None:
    engine = FakeEngine(batch=2, slots=3)
    seen: list[bytes] = []
    engine._function = lambda tiles: seen.extend(tile.tobytes() for tile in tiles) or tiles[:, 0] // 64
    run_benchmark(engine, folder, BenchOptions(times(0.001, batches=6), scene=scene))
    timed = seen[2:14]  # after the one batch of warm-up
    assert len(set(timed)) == 6


def test_repeats_follow_one_another_and_have_an_interval(folder: Path, scene: Path) -> None:
    summary = run_benchmark(FakeEngine(delay=0.01), folder, BenchOptions(times(0.1, 0.1, repeats=3), scene=scene))
    names = [(span.name, span.repeat) for span in summary.phases]
    assert names == [(name, repeat) for repeat in range(3) for name in ("warm-up", "load")]
    assert summary.figures is not None
    rate = summary.figures.tiles_per_second
    assert rate == figure_of([repeat.tiles_per_second for repeat in summary.repeats])
    assert rate.interval is not None
    assert rate.interval.low < rate.mean < rate.interval.high
    assert summary.figures.latency_ms.samples == sum(repeat.latency_ms.samples for repeat in summary.repeats)
    assert re.search(r"[\d.]+ ± [\d.]+ tiles/s", dict(describe_bench(summary, folder).rows)["engine only"])


def test_the_summary_is_json_with_everything_to_repeat_it(
    folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # this one draws
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(times(0.05), scene=scene, command="cdkd-edge bench x"))
    assert {"summary.json", "tiles.csv", "trace.png", "report.html"} <= set(names_in(folder))
    assert not [name for name in names_in(folder) if name.startswith(".")]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "summary.json").read_text()
    document = json.loads(text, parse_constant=no_constant)
    assert document["figures"]["power"] is None
    assert document["figures"]["power_reason"] == "not asked for (--power-trace)"
    assert document["summary_version"] == 2
    assert document["command"] == "cdkd-edge bench x"
    assert document["engine"]["artefact"]["sha256"] == "ab" * 32
    assert document["machine"]["cores"] >= 1
    assert set(document["libraries"]) >= {"python", "onnxruntime", "numpy", "rasterio"}
    assert 10e6 < document["peak_memory_bytes"] < 2e9
    assert document["started"].endswith("+00:00")
    assert document["roofline"] is None
    assert document["roofline_reason"] == "the roofline models GPUs, and this engine runs on the CPU"
    assert msgspec.json.decode(text, type=BenchSummary) == summary == read_run(folder).summary
    assert json.loads(json.dumps(plain(describe_bench(summary, folder).data)))["summary"] == document


def test_peak_memory_is_that_of_the_measurement(folder: Path, scene: Path) -> None:
    """Neither what came before nor the scene."""
    np.ones(400 << 20, np.uint8)
    if not forget_peak_memory():
        pytest.skip("NO PEAK MEMORY: this kernel does not let a process forget its largest size")
    before = peak_memory()
    np.ones(400 << 20, np.uint8)
    assert peak_memory() > before + (300 << 20)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(times(0.05), scene=scene))
    assert summary.peak_memory_bytes < before + (300 << 20)


def test_without_a_scene_one_is_drawn(folder: Path) -> None:
    end = run_benchmark(FakeEngine(delay=0.001), folder, BenchOptions(times(0.02))).end_to_end
    assert end is not None
    assert end.scene == "drawn"
    assert end.width == end.height
    assert (end.width - 16) % 48 == 0, "no part of a tile is padding"
    assert 4 <= end.tiles == ((end.width - 16) // 48) ** 2 <= 100


def test_a_large_drawn_scene_takes_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(tile: int, count: int) -> Any:
        drawn.append((tile, count))
        return sample_tiles(tile, count)

    monkeypatch.setattr(bench, "sample_tiles", draw)
    monkeypatch.setattr(bench, "PICTURE_SIDE", 96)
    end = run_benchmark(FakeEngine(delay=0.001), folder, BenchOptions(times(0.2))).end_to_end
    assert end is not None
    assert end.tiles > 9
    assert (96, 1) in drawn
    assert max(drawn) == (96, 1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SceneError("block 3 is damaged")])
def test_a_scene_that_fails_costs_no_measurement(
    folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(bench, "segment_scene", fail)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(times(0.05), scene=scene))
    assert summary.figures is not None
    assert summary.end_to_end is None
    assert summary.verdict.status != "invalid"
    assert re.search("end-to-end time of a scene is missing: .*(No space left|block 3)", summary.verdict.warnings[-1])
    assert read_run(folder).summary == summary


def test_an_empty_scene_has_no_overhead_and_still_a_summary(folder: Path, tmp_path: Path) -> None:
    path = write_raster(tmp_path / "empty.tif", np.zeros((3, 100, 100), np.uint8), nodata=0)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(times(0.01), scene=path))
    assert json.loads((folder / "summary.json").read_text())["end_to_end"]["overhead"] is None
    assert summary.end_to_end is not None
    assert summary.end_to_end.tiles_per_second == 0
    data = json.dumps(plain(describe_bench(summary, folder).data))
    assert "NaN" not in data, "--json gives JSON"


def test_somebody_who_watches_hears_of_every_phase(folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_phases, "STATUS_EVERY", 0.0)
    heard: list[LiveStatus] = []
    run_benchmark(
        FakeEngine(delay=0.01), folder, BenchOptions(times(0.1, 0.1, repeats=2), scene=scene), show_status=heard.append
    )
    phases = list(dict.fromkeys((live.phase, live.repeat) for live in heard))
    assert phases == [("warm-up", 0), ("load", 0), ("warm-up", 1), ("load", 1)]
    load = [live for live in heard if live.phase == "load"]
    assert all(live.tiles_per_second and 20 < live.tiles_per_second <= 100 for live in load)
    assert all(0 <= (live.seconds_left or 0) <= 0.1 for live in load)
    assert re.fullmatch(r"load 2/2   \d+\.\d\d tiles/s(   \d+ °C)?   0 s left", live_text(heard[-1]))
    assert live_text(LiveStatus("idle", 0, 1, None, 5.74, 47.5, 9.0)) == "idle   5.7 W   48 °C   9 s left"


def test_who_is_told_slowly_shortens_no_load(folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of 600 s is one; whatever the drawing of the live line takes."""
    monkeypatch.setattr(bench_phases, "STATUS_EVERY", 0.0)
    options = BenchOptions(times(0.25), scene=scene)
    run_benchmark(FakeEngine(delay=0.01), folder, options, show_status=lambda live: time.sleep(0.1))
    (load,) = (span for span in read_run(folder).summary.phases if span.name == "load")
    assert load.seconds >= 0.25


# --- steady ---------------------------------------------------------------------------------------


def test_warm_up_ends_when_the_speed_stays(folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tiles are slow, as those of a cold board are fast or slow."""
    monkeypatch.setattr(bench_phases, "SPEED_TOLERANCE", 0.5)  # of a machine that does other things as well
    engine = FakeEngine(delay=lambda number: 0.05 if number < 10 else 0.01)
    summary = run_benchmark(engine, folder, BenchOptions(times(0.3, 6.0), scene=scene))
    (repeat,) = summary.repeats
    assert repeat.steady
    assert 0.5 < repeat.warm_up_seconds < 6.0
    assert repeat.latency_ms.p50 < 30, "no slow tile is in the load"
    assert summary.verdict.status != "invalid"
    assert "the warm-up" not in " ".join(summary.verdict.reasons)


def test_what_never_becomes_steady_says_so(folder: Path, scene: Path) -> None:
    engine = FakeEngine(delay=lambda number: 0.002 * 1.2 ** (number % 20))
    engine.warning = "the engine was built with 8 multiprocessors, and 4 are on now"
    summary = run_benchmark(engine, folder, BenchOptions(Protocol("default", 1, 0.1, 2, 0.01, 0.2, 1), scene=scene))
    assert summary.verdict.status == "not_steady"
    assert summary.verdict.reasons[0] == "the warm-up of repeat 1, 2 was not steady after 0.2 s"
    assert summary.figures is not None, "the figures are given, with that"
    assert summary.verdict.warnings[0] == engine.warning
    assert dict(describe_bench(summary, folder).rows)["verdict"] == "NOT STEADY"


# --- power ----------------------------------------------------------------------------------------


IDLE, LOAD = 100.0, 150.0


class Hungry(FakeEngine):
    """Makes an emulated board's INA3221 show 150 W while it computes, and 100 W when it has not for a while."""

    def __init__(self, tree: Path, **options: Any) -> None:
        super().__init__(**options)
        self._tree = tree
        self._last = -1.0
        self._over = Event()
        self._thread_of_board = Thread(target=self._watch, name="board", daemon=True)
        self._thread_of_board.start()

    def launch(self, slot: int) -> None:
        self._last = time.monotonic()
        super().launch(slot)

    def _watch(self) -> None:
        shown = IDLE
        while not self._over.wait(0.002):
            watts = LOAD if time.monotonic() - self._last < 0.2 else IDLE
            if watts != shown:
                write(self._tree / HWMON / "curr1_input", round(watts / VOLTS * 1000))
                shown = watts

    def close(self) -> None:
        self._over.set()
        self._thread_of_board.join()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sysfs of a board, the only source of power there is."""
    root = make_tree(tmp_path / "sys", (IDLE, 10.0, 5.0))

    def find(forced: str | None = None) -> PowerSampler:
        return find_source(forced or "ina3221", 0.02, sys_root=root)

    monkeypatch.setattr(bench, "find_source", find)
    monkeypatch.setattr(bench, "ConditionsMonitor", lambda root: ConditionsMonitor(root, 0.05))
    yield root
    assert pipeline_threads() == []


@pytest.fixture
def hungry(tree: Path) -> Iterator[Any]:
    """Makes engines that are closed in the end."""
    engines: list[Hungry] = []

    def make(**options: Any) -> Hungry:
        engines.append(Hungry(tree, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def under_load(
    monkeypatch: pytest.MonkeyPatch, *steps: tuple[float, Callable[[], object]]
) -> Callable[[LiveStatus], None]:
    """Told of a run, takes each step once, so many seconds after the load was first told of.

    Not by the clock: a busy machine reaches the load late.
    """
    monkeypatch.setattr(bench_phases, "STATUS_EVERY", 0.05)
    left, began = list(steps), math.inf

    def tell(live: LiveStatus) -> None:
        nonlocal began
        if live.phase == "load":
            began = min(began, time.monotonic())
            while left and time.monotonic() >= began + left[0][0]:
                left.pop(0)[1]()

    return tell


@pytest.mark.parametrize(("batch", "repeats"), [(2, 1), (1, 3)])
def test_power_and_energy_per_tile(folder: Path, scene: Path, hungry: Any, batch: int, repeats: int) -> None:
    engine = hungry(delay=0.005, batch=batch)
    options = BenchOptions(times(0.6, 0.3, idle=0.5, repeats=repeats), scene=scene, power=True)
    for attempt in range(5):
        folder = folder.with_name(f"attempt {attempt}")
        summary = run_benchmark(engine, folder, options)
        # A busy machine can keep the sampler from the CPU for a good part of half a second, and the run says so.
        if not any("are missing for" in reason for reason in summary.verdict.reasons):
            break
    names = [(span.name, span.repeat) for span in summary.phases]
    one = ("idle", "warm-up", "load")
    assert names == [*((name, repeat) for repeat in range(repeats) for name in one), ("idle", repeats)]
    assert summary.verdict.status in ("valid", "not_steady"), summary.verdict
    assert summary.figures is not None
    power = summary.figures.power
    assert power is not None, summary.figures.power_reason
    assert (power.source, power.scope, power.total, power.problems) == ("ina3221", "module", "VDD_IN", ())
    idle = {rail: figures.idle_watts.mean for rail, figures in power.rails.items()}
    assert idle == pytest.approx({"VDD_IN": IDLE, "VDD_CPU_GPU_CV": 10, "VDD_SOC": 5}, rel=0.03)
    rail = power.rails["VDD_IN"]
    assert len(rail.load_watts.values) == repeats
    assert (rail.load_watts.interval is None) == (repeats == 1)
    assert rail.load_watts.mean == pytest.approx(LOAD, rel=0.03)
    assert rail.net_watts.mean == pytest.approx(LOAD - IDLE, rel=0.1)
    per_tile = statistics.fmean(1 / repeat.tiles_per_second for repeat in summary.repeats)
    assert rail.net_joules_per_tile.mean == pytest.approx((LOAD - IDLE) * per_tile, rel=0.1)
    assert rail.gross_joules_per_tile.mean == pytest.approx(LOAD * per_tile, rel=0.05)
    megapixels = 64 * 64 / 1e6
    assert rail.gross_joules_per_megapixel.mean == pytest.approx(rail.gross_joules_per_tile.mean / megapixels)
    assert rail.net_joules_per_megapixel.mean == pytest.approx(rail.net_joules_per_tile.mean / megapixels)

    if repeats > 1:  # neighbours share an idle phase
        one = [repeat.rails["VDD_IN"] for repeat in summary.repeats if repeat.rails]
        levels = [one[0].idle_before_watts, *(rail.idle_after_watts for rail in one)]
        hidden = variance_hidden_by_sharing(levels)
        assert rail.idle_watts == figure_of([each.idle_watts for each in one], hidden)
        assert rail.net_watts == figure_of([each.load_watts - each.idle_watts for each in one], hidden)
        net = rail.net_joules_per_tile
        expected = figure_of(net.values, hidden * per_tile**2).interval
        assert net.interval is not None
        assert expected is not None
        assert (net.interval.low, net.interval.high) == pytest.approx((expected.low, expected.high))

    report = describe_bench(summary, folder)
    shown = [value for name, value in report.rows if name == "power (module)"]
    assert re.match(r"VDD_IN: idle 1?\d\d[.\d]*( ± [.\d]+)? W, load 1\d\d", shown[0])
    said = " ".join(value for _, value in report.rows)
    assert re.search(r"load joules of VDD_IN within [.\d]+ % \([.\d]+ % of it the sensor's offset\), with 99 %", said)
    assert re.search(r"net watts of VDD_IN within [.\d]+ W in each repeat: the sensor's offset cancels", said)
    for each in (repeat.rails["VDD_IN"] for repeat in summary.repeats if repeat.rails):
        assert 0 < each.offset_joules < each.bound_joules
        assert each.net_bound_watts is not None
    (listing,) = report.listings
    paper = {row[0]: row[2] for row in listing.rows}
    assert (paper["gross, J/tile"], paper["net, J/tile"]) == ("7.58", "5.28")
    assert (paper["throughput, tiles/s"], paper["idle, W"], paper["load, W"], paper["net, W"]) == (
        "2.50",
        "5.74",
        "18.95",
        "13.21",
    )
    caveats = " ".join(value for _, value in report.rows)
    for caveat in ("another device", "another runtime", "another precision: FP32", "another tile: 64 x 64 px"):
        assert caveat in caveats

    run = read_run(folder)
    with open(folder / "trace.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"time_s", "uncertainty_s", "repeat", "phase", "VDD_IN_w", "VDD_CPU_GPU_CV_w", "VDD_SOC_w"}
    total = [row for row in rows if row["VDD_IN_w"]]  # others are read less often
    for phase, watts in (("idle", IDLE), ("load", LOAD)):
        of_phase = statistics.median(float(row["VDD_IN_w"]) for row in total if row["phase"] == phase)
        assert of_phase == watts
    assert len(run.watts["VDD_IN"].times) == len(total)
    assert all(len(run.watts[rail].times) > 3 for rail in ("VDD_CPU_GPU_CV", "VDD_SOC"))
    spans = {(span.name, span.repeat): span for span in summary.phases}
    for tile in run.tiles:
        span = spans[tile.phase, tile.repeat]
        assert span.start - 1e-3 <= tile.start <= tile.start + tile.latency <= span.stop + 1e-3, "one clock for all"


@pytest.mark.parametrize(
    ("dies_after", "keep"), [(0.0, False), (0.4, False), (0.9, False), (1.3, False), (0.0, True), (0.9, True)]
)
def test_a_source_that_dies_makes_the_run_invalid(
    folder: Path, scene: Path, tree: Path, hungry: Any, monkeypatch: pytest.MonkeyPatch, dies_after: float, keep: bool
) -> None:
    def doomed(forced: str | None = None) -> PowerSampler:
        sampler = find_source("ina3221", 0.02, sys_root=tree)
        assert sampler._process is not None
        Timer(dies_after, sampler._process.kill).start()  # in whatever phase that is
        return sampler

    monkeypatch.setattr(bench, "find_source", doomed)
    monkeypatch.setattr(bench_phases, "STATUS_EVERY", 0.05)
    options = BenchOptions(times(0.8, 0.05, idle=0.5), scene=scene, power=True, keep_invalid=keep)
    summary = run_benchmark(hungry(delay=0.005), folder, options)
    assert summary.verdict.status == "invalid"
    assert "ina3221 stopped answering: the sampling process died (SIGKILL)" in summary.verdict.reasons
    assert "trace.csv" in names_in(folder), "what was heard is kept"
    if not keep:
        assert summary.figures is None
        assert summary.end_to_end is None, "nothing more is measured"
        assert dict(describe_bench(summary, folder).rows)["figures"].startswith("none")
    else:
        assert summary.figures is not None
        assert len(summary.repeats) == 1, "the course goes on"
        assert summary.figures.tiles_per_second.mean > 10, "the speed stands"


def test_a_source_that_hangs_ends_a_run_that_cannot_become_valid(
    folder: Path, scene: Path, tree: Path, hungry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = []

    def listed(forced: str | None = None) -> PowerSampler:
        sampler = find_source("ina3221", 0.02, sys_root=tree)
        processes.append(sampler._process)
        return sampler

    monkeypatch.setattr(bench, "find_source", listed)
    monkeypatch.setattr(bench_phases, "LONGEST_SILENCE", 0.5)
    tell = under_load(monkeypatch, (0.2, lambda: processes[0].send_signal(signal.SIGSTOP)))
    options = BenchOptions(times(20.0, idle=0.2), scene=scene, power=True)
    summary = run_benchmark(hungry(delay=0.005), folder, options, show_status=tell)
    assert 0.5 < summary.phases[-1].seconds < 10
    assert re.fullmatch(r"ina3221 stopped answering: no reading for \d+\.\d s", summary.verdict.reasons[0])


def test_a_total_that_is_gone_for_good_ends_the_run(
    folder: Path, scene: Path, tree: Path, hungry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_phases, "LONGEST_SILENCE", 0.5)
    tell = under_load(monkeypatch, (0.2, (tree / HWMON / "in1_input").unlink))
    options = BenchOptions(times(20.0, idle=0.2), scene=scene, power=True, root=tree.parent)
    summary = run_benchmark(hungry(delay=0.005), folder, options, show_status=tell)
    assert re.fullmatch(r"ina3221 stopped answering: no reading of VDD_IN for \d+\.\d s", summary.verdict.reasons[0])
    assert [span.name for span in summary.phases] == ["idle", "warm-up", "load"], "the last one was cut off"
    assert (summary.repeats, summary.rejected_repeats) == ((), ())
    assert 0.5 < summary.phases[-1].seconds < 10
    assert summary.conditions["clocks_mhz"]["gpu"]["mean"] == 918.0
    with open(folder / "trace.csv", newline="") as file:
        phases = [row["phase"] for row in csv.DictReader(file)]
    assert [phase for phase in phases if phase][-1] == "load", "readings after it have no phase"


def test_a_sensor_that_is_away_for_a_while_makes_the_run_invalid(
    folder: Path, scene: Path, tree: Path, hungry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = tree / CHIP
    engine = hungry(delay=0.005)
    engine._tree = tree / "elsewhere"  # what it writes would disturb the renaming
    away = tree / "away"
    tell = under_load(monkeypatch, (0.4, lambda: chip.rename(away)), (0.9, lambda: away.rename(chip)))
    summary = run_benchmark(
        engine, folder, BenchOptions(times(1.5, idle=0.4), scene=scene, power=True), show_status=tell
    )
    assert summary.verdict.status == "invalid"
    assert any(
        re.search(r"readings of VDD_IN are missing for \d\d% of a phase; .*No such file", reason)
        for reason in summary.verdict.reasons
    )
    assert summary.repeats == (), "with one repeat they are the headline figure"
    (one,) = summary.rejected_repeats
    assert one.covered is not None
    assert one.covered["VDD_IN"] < 0.98
    data = json.dumps(plain(describe_bench(summary, folder).data))
    for name in ("tiles_per_second", "latency_ms", "load_watts", "load_joules"):
        assert f'"{name}"' not in data, name
    assert read_run(folder).summary == summary


def test_a_rail_that_does_not_rise_is_the_wrong_one(folder: Path, scene: Path, tree: Path) -> None:
    summary = run_benchmark(FakeEngine(delay=0.005), folder, BenchOptions(times(0.5), scene=scene, power=True))
    assert summary.verdict.status == "invalid"
    said = "VDD_IN is not higher under load (100.00 W) than idle (100.00 W)"
    assert any(said in reason for reason in summary.verdict.reasons)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("class/hwmon/hwmon9/oc1_event_cnt", 3, 4, "oc1"),
        ("devices/virtual/thermal/thermal_zone2/temp", 60_000, 96_500, "96"),
        ("var/lib/nvpmodel/status", "pmode:0000", "pmode:0001", "mode"),
    ],
)
def test_throttling_makes_the_run_invalid(
    folder: Path,
    scene: Path,
    tree: Path,
    hungry: Any,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    before: object,
    after: object,
    said: str,
) -> None:
    if "oc1" in file:
        write(tree / "class/hwmon/hwmon9/name", "soctherm_oc")
    root = tree.parent
    if "nvpmodel" in file:
        write(root / "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=10W >")
        write(root / "proc/device-tree/compatible", "nvidia,p3767-0000 nvidia,tegra234")
    place = (root if file.startswith("var") else tree) / file
    write(place, before)
    tell = under_load(monkeypatch, (0.3, lambda: write(place, after)))
    options = BenchOptions(times(1.2, idle=0.3), scene=scene, power=True, root=root)
    summary = run_benchmark(hungry(delay=0.005), folder, options, show_status=tell)
    assert summary.verdict.status == "invalid", summary.verdict
    assert said in " ".join(summary.verdict.reasons)
    assert summary.figures is None
    assert "conditions.csv" in names_in(folder)
    assert summary.conditions["throttle_events"]["oc1"] == int("oc1" in file)


def test_what_was_not_seen_of_a_board_and_odd_watts_are_warnings(
    folder: Path, scene: Path, tree: Path, hungry: Any
) -> None:
    """As in a container on an Orin NX. 100 W are not its idle."""
    shutil.rmtree(tree / "class/hwmon/hwmon4")
    write(tree.parent / "device-tree/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit")
    options = BenchOptions(times(0.5, idle=0.3), scene=scene, power=True, root=tree.parent)
    summary = run_benchmark(hungry(delay=0.005), folder, options)
    said = " ".join(summary.verdict.warnings)
    for text in ("throttling was not observed", "the power mode is not known", "VDD_IN is 100.0 W in idle"):
        assert text in said


def test_clocks_and_temperatures_are_recorded(folder: Path, scene: Path, tree: Path, hungry: Any) -> None:
    options = BenchOptions(times(0.5, idle=0.3), scene=scene, power=True, root=tree.parent)
    summary = run_benchmark(hungry(delay=0.005), folder, options)
    run = read_run(folder)
    assert set(run.conditions["gpu_mhz"].values) == {918.0}
    assert set(run.conditions["tj_celsius"].values) == {47.5}
    assert "918" in json.dumps(summary.conditions)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system does not say who uses its processors")
def test_other_programs_that_use_the_processors_are_why_a_run_is_not_steady(folder: Path, scene: Path) -> None:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        summary = run_benchmark(FakeEngine(delay=0.01), folder, BenchOptions(times(2.5), scene=scene))
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert summary.verdict.status == "not_steady"
    said = [reason for reason in summary.verdict.reasons if reason.startswith("other programs used ")]
    assert said, summary.verdict
    assert summary.conditions["other_programs_percent"] > 50


def test_no_source_is_a_reason(folder: Path, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(forced: str | None = None) -> PowerSampler:
        raise PowerError("RAPL: no CPU package under /sys")

    monkeypatch.setattr(bench, "find_source", find)
    summary = run_benchmark(FakeEngine(), folder, BenchOptions(times(0.05), scene=scene, power=True))
    assert summary.figures is not None
    assert summary.figures.power is None
    assert summary.figures.power_reason == "RAPL: no CPU package under /sys"
    assert "power was asked for and not measured: RAPL: no CPU package under /sys" in summary.verdict.warnings
    assert "trace.csv" not in names_in(folder)
    before = names_in(folder.parent)
    with pytest.raises(PowerError):
        run_benchmark(
            FakeEngine(), folder.with_name("forced"), BenchOptions(times(0.05), scene=scene, power_source="rapl")
        )
    assert names_in(folder.parent) == before


def test_a_run_too_short_for_a_sample_says_so(folder: Path, scene: Path, hungry: Any) -> None:
    engine, options = hungry(), BenchOptions(times(0.001, idle=0.3), scene=scene, power=True)
    for attempt in range(8):
        summary = run_benchmark(engine, folder.with_name(f"attempt {attempt}"), options)
        (load,) = (span for span in summary.phases if span.name == "load")
        if load.seconds < 0.005:  # else this machine held it up, and readings fall into it
            break
    assert summary.verdict.status == "invalid"
    assert re.fullmatch(r"ina3221: too few readings of VDD_IN: [01] in 0\.\d s of load", summary.verdict.reasons[0])


# --- protocols ------------------------------------------------------------------------------------


def test_presets_can_be_exceeded_and_not_undercut() -> None:
    assert (protocol_of("paper").repeats, protocol_of("mlperf").load_seconds) == (3, 600)
    assert protocol_of("paper", repeats=5, load=300).repeats == 5
    for preset, change, option in (
        ("paper", {"repeats": 2}, "--repeat of at least 3"),
        ("mlperf", {"load": 60}, "--duration of at least 600"),
        ("mlperf", {"idle": 10}, "--idle of at least 60"),
    ):
        with pytest.raises(UsageError, match=f"--{preset} needs {option}"):
            protocol_of(preset, **change)  # type: ignore[arg-type]
    for change in ({"load": 0}, {"idle": -1}, {"repeats": 0}, {"warm_up_cap": -1}, {"load": math.nan}):
        with pytest.raises(UsageError):
            protocol_of(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["idle", "load", "warm_up_cap"])
def test_phases_end(name: str) -> None:
    with pytest.raises(UsageError, match=r"must be .* got inf"):
        protocol_of(**{name: math.inf})  # type: ignore[arg-type]


def test_a_device_that_does_not_exist_is_found_before_the_long_measurement(folder: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match="no device 'orin-nx-17gb'"):
        run_benchmark(engine, folder, BenchOptions(times(30), device="orin-nx-17gb"))
    assert not folder.parent.exists()


def test_three_windows_fit_into_the_warm_up() -> None:
    assert protocol_of().window_seconds == 5
    assert 3 * protocol_of(warm_up_cap=6).window_seconds <= 6


def test_the_papers_protocol_is_for_the_papers_tiles(folder: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match=r"one tile of 1024 px at a time; this engine takes 1 x 64 px"):
        run_benchmark(engine, folder, BenchOptions(protocol_of("paper")))
    assert engine.launches == 0


# --- errors ---------------------------------------------------------------------------------------


def test_an_engine_that_fails_leaves_no_summary(folder: Path, scene: Path) -> None:
    error = EngineError("no")
    with pytest.raises(EngineError) as caught:
        run_benchmark(FakeEngine(fail_at=3, error=error), folder, BenchOptions(times(0.1), scene=scene))
    assert caught.value is error
    assert names_in(folder.parent) == []


def test_results_never_meet_those_of_another_run(folder: Path, scene: Path) -> None:
    run_benchmark(FakeEngine(), folder, BenchOptions(times(0.01), scene=scene))
    before, files = (folder / "summary.json").read_bytes(), names_in(folder.parent)
    engine = FakeEngine()
    with pytest.raises(OSError, match="run"):
        run_benchmark(engine, folder, BenchOptions(times(0.01), scene=scene))
    assert engine.launches == 0, "known before anything is measured"
    assert (folder / "summary.json").read_bytes() == before
    assert names_in(folder.parent) == files


def test_a_scene_that_is_not_there_is_found_before_the_long_measurement(folder: Path, tmp_path: Path) -> None:
    engine = FakeEngine(delay=0.01)
    with pytest.raises(SceneError, match="does not exist"):
        run_benchmark(engine, folder, BenchOptions(times(0.5), scene=tmp_path / "missing.tif"))
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
            FakeEngine(fail_at=3, error=EngineError("no")), folder, BenchOptions(times(0.1), scene=scene, power=True)
        )
    process = samplers[0]._process
    assert process is not None
    assert process.poll() is not None
    assert pipeline_threads() == []
