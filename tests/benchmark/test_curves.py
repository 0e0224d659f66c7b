"""Curves of a run: no window cuts a batch, no line crosses a gap, no peak is lost; the paper's figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import make_run
from scene_helpers import relaxed

from cdkd_edge.benchmark import curves
from cdkd_edge.benchmark.describe import COMPUTED, PRINTED, differences
from cdkd_edge.benchmark.folder import Series, TimedBatch, read_run
from cdkd_edge.benchmark.record import Verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    make_run(folder, seconds=6, idle_seconds=2, warm_up=3)
    return read_run(folder)


def batches(starts, latency, phase="load"):
    return tuple(TimedBatch(0, phase, float(start), latency) for start in starts)


def test_rates_are_exact_for_a_steady_engine(run):
    steady = replace(run, tiles=batches(np.arange(100, 110, 0.125), 0.125))
    (one,) = curves.windows(steady)
    assert one.tiles_per_second == pytest.approx(8.0)
    assert one.edges[0] == 100
    assert one.edges[-1] == 110
    assert one.latency_ms == pytest.approx(125.0)


def test_a_batch_counts_all_its_tiles(run):
    engine = replace(run.summary.engine, batch=4)
    several = replace(run, summary=replace(run.summary, engine=engine), tiles=batches(range(10), 1.0))
    assert curves.windows(several)[0].tiles_per_second == pytest.approx(4.0)


def test_an_engine_slower_than_a_window_has_a_window_per_batch(run):
    (one,) = curves.windows(replace(run, tiles=batches([0, 8, 16], 8.0)))
    assert one.edges.tolist() == [0, 8, 16, 24]
    assert one.tiles_per_second == pytest.approx(1 / 8)
    assert curves.typical_window([one]) == 8


def test_a_stall_is_seen(run):
    starts = [*np.arange(0, 5, 0.1), *np.arange(9, 14, 0.1)]
    (one,) = curves.windows(replace(run, tiles=batches(starts, 0.1)))
    assert one.tiles_per_second.min() < 4
    assert one.tiles_per_second.max() == pytest.approx(10.0)
    # Windows follow one upon the other: together they hold every batch and all the time.
    assert float(np.dot(one.tiles_per_second, np.diff(one.edges))) == pytest.approx(100)


@relaxed
@given(st.lists(st.floats(0.001, 20), min_size=1, max_size=200))
def test_windows_hold_every_batch(run, latencies):
    starts = np.cumsum([0.0, *latencies[:-1]])
    tiles = tuple(TimedBatch(0, "load", float(s), t) for s, t in zip(starts, latencies, strict=True))
    (one,) = curves.windows(replace(run, tiles=tiles))
    assert float(np.dot(one.tiles_per_second, np.diff(one.edges))) == pytest.approx(len(latencies))
    assert (np.diff(one.edges) > 0).all()
    assert set(one.edges[:-1]) <= set(starts.tolist())


def test_lines_break_at_gaps_and_nowhere_else():
    times = [*np.arange(0, 2, 0.1), *np.arange(2.35, 4, 0.1), 5.0, *np.arange(6, 7, 0.1)]
    series = Series(tuple(map(float, times)), tuple(range(len(times))))
    assert curves.gap_seconds(series) == pytest.approx(0.5)
    lengths = [len(piece[0]) for piece in curves.pieces(series)]
    assert lengths == [20 + 17, 1, 10], "0.45 s is late, 1 s is a gap"
    assert curves.gaps(series, 0, 9) == [(pytest.approx(3.95), 5.0), (5.0, 6.0), (pytest.approx(6.9), 9)]


def test_what_was_never_read_is_one_gap():
    assert curves.gaps(Series((), ()), 1, 5) == [(1, 5)]
    assert curves.pieces(Series((), ())) == []
    assert len(curves.pieces(Series((3.0,), (1.0,)))) == 1


@relaxed
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 10**6))
def test_thinning_keeps_ends_and_peaks(count, columns, seed):
    random = np.random.default_rng(seed)
    times, values = np.sort(random.random(count)), random.standard_normal(count)
    thin_times, thin_values = curves.thin(times, values, 0.0, 1.0, columns)
    assert len(thin_times) <= max(4 * columns, min(count, 4 * columns))
    assert thin_values.max() == values.max()
    assert thin_values.min() == values.min()
    assert thin_times[0] == times[0]
    assert thin_times[-1] == times[-1]
    assert (np.diff(thin_times) >= 0).all()


def test_throughput_stands_where_power_does_not():
    assert curves.clear_height([0.8, 0.25]) == 0.5
    assert curves.clear_height([0.8, 0.5]) == 0.3
    assert curves.clear_height([0.3, 0.5]) == 0.7


def test_no_means_without_figures(run):
    assert curves.mean_watts(run) == {"VDD_IN": (pytest.approx(5.74), pytest.approx(18.95))}
    invalid = replace(run, summary=replace(run.summary, figures=None))
    assert curves.mean_watts(invalid) == {}
    assert curves.main_rails(invalid) == ("VDD_IN",)


def test_the_papers_figures():
    assert PRINTED["net_watts"] == pytest.approx(13.21)
    assert COMPUTED["gross_joules_per_tile"] == pytest.approx(7.58)
    assert COMPUTED["net_joules_per_tile"] == pytest.approx(5.284)
    assert COMPUTED["megapixels_per_second"] == pytest.approx(2.62144)
    assert COMPUTED["gross_joules_per_megapixel"] * 1.048576 == pytest.approx(7.58)
    assert COMPUTED["net_joules_per_megapixel"] * 1.048576 == pytest.approx(5.284)


def test_what_stands_between_a_run_and_the_paper(run):
    board = {"model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"}
    engine = replace(run.summary.engine, runtime="tensorrt", precision="fp16", attention_blocks=12)
    assert engine.tile == 1024
    same = replace(run.summary, board=board, engine=engine)
    assert differences(same) == ()
    for change, word in (
        ({"board": {"model": "Jetson AGX Orin"}}, "device"),
        ({"board": None}, "device"),
        ({"engine": replace(engine, runtime="onnxruntime-cpu")}, "runtime"),
        ({"engine": replace(engine, precision="int8")}, "precision"),
        ({"engine": replace(engine, tile=512)}, "tile"),
        ({"engine": replace(engine, attention_blocks=6)}, "network"),
        ({"verdict": Verdict("not_steady", ("slow",))}, "not steady"),
        ({"engine": replace(engine, batch=8)}, "8 tiles per batch"),
        ({"figures": replace(same.figures, power=replace(same.figures.power, scope="GPU board"))}, "scope"),
    ):
        (only,) = differences(replace(same, **change))
        assert word in only
