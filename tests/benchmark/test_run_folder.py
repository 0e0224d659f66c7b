"""A run's folder: what is written is read back; what is damaged is named."""

from __future__ import annotations

import json
import re
import time

import pytest
from run_helpers import make_run

from cdkd_edge.benchmark.folder import read_run, read_summary, write_tiles, write_trace
from cdkd_edge.benchmark.record import Phase
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.protocol import CPU_PACKAGE, JOULES, Sample, SourceInfo
from cdkd_edge.core.errors import BenchError


def test_a_run_comes_back(tmp_path):
    summary = make_run(tmp_path / "run", repeats=3, seconds=4, idle_seconds=1, warm_up=2, spread=0.02)
    run = read_run(tmp_path / "run")
    assert run.summary == summary
    assert len([one for one in run.tiles if one.phase == "load"]) == sum(one.tiles for one in summary.repeats)
    assert run.watts["VDD_IN"].values[0] == pytest.approx(5.74, abs=0.3)
    assert len(run.watts["VDD_IN"].times) == pytest.approx(10 * summary.phases[-1].stop, abs=2)
    assert set(run.conditions) == {"tj_celsius", "gpu_mhz"}


def test_a_run_without_power_has_no_watts(tmp_path):
    make_run(tmp_path / "run", power=False)
    assert read_run(tmp_path / "run").watts == {}


def test_a_counter_becomes_watts_and_its_restart_does_not(tmp_path):
    make_run(tmp_path / "run", power=False)
    info = SourceInfo("rapl", CPU_PACKAGE, "package", JOULES, ("package-0",), "package-0", 0.1)
    joules = [0.0, 1.0, 3.0, 0.5, 1.5]
    samples = tuple(Sample(100 + i / 10, 0.0, {"package-0": value}) for i, value in enumerate(joules))
    spans = [Phase("idle", 0, 0.0, 0.15), Phase("load", 0, 0.15, 0.35)]
    write_trace(tmp_path / "run", Trace(info, samples, (), 100.0, 100.4), spans, 100.0)
    series = read_run(tmp_path / "run").watts["package-0"]
    assert series.times == pytest.approx((0.05, 0.15, 0.35))
    assert series.values == pytest.approx((10.0, 20.0, 10.0))
    rows = (tmp_path / "run/trace.csv").read_text().splitlines()
    assert rows[0] == "time_s,uncertainty_s,repeat,phase,package-0_j"
    assert rows[1] == "0.000000,0.000000,0,idle,0.000000"
    assert rows[5] == "0.400000,0.000000,,,1.500000", "outside every phase"


def test_a_reading_that_is_missing_is_not_there(tmp_path):
    make_run(tmp_path / "run", power=False)
    info = SourceInfo("jtop", "module", "module", "watts", ("A", "B"), None, 0.1)
    samples = (Sample(0.0, 0.0, {"A": 1.0, "B": 2.0}), Sample(0.1, 0.0, {"B": 3.0}))
    write_trace(tmp_path / "run", Trace(info, samples, (), 0.0, 0.2), [], 0.0)
    watts = read_run(tmp_path / "run").watts
    assert watts["A"].values == (1.0,)
    assert watts["B"].values == (2.0, 3.0)


def damage(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("summary.json", '"summary_version": 2', '"summary_version": 1', "version 1; this release reads 2"),
        ("summary.json", '"summary_version": 2', '"summary_version": "2"', "version 2"),
        ("summary.json", '"status": "valid"', '"status": "fine"', r"damaged: .*status"),
        ("summary.json", "{", "", "cannot be read"),
        ("tiles.csv", "latency_ms", "latency", "no column latency_ms"),
        ("tiles.csv", "0,warm-up,0,", "0,warm-up,0,x", "damaged"),
        ("tiles.csv", "0,warm-up,0,", "0,warm-up,0,-", "damaged: .* is not a batch"),
        ("tiles.csv", "0,warm-up,0,", "0,warm-up,0,1e30", "damaged: .* is not a batch"),
        ("tiles.csv", "0,warm-up,0,", "0,nap,0,", "damaged: .* is not a batch"),
        ("tiles.csv", "0,warm-up,0,", "warm-up,0,", "damaged: rows differ in length"),
        ("summary.json", '"tiles": 150', '"tiles": 1e300', "damaged: summary.repeats.0..tiles is 1e.300"),
        ("summary.json", '"summary_version": 2', '"nested": ' + "[" * 100_000, "cannot be read"),
        ("trace.csv", "phase", "part", "no column phase"),
        ("trace.csv", ",5.", ",nan5.", "damaged"),
        ("conditions.csv", "time_s", "time", "no column time_s"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, file, old, new, said):
    make_run(tmp_path / "run")
    damage(tmp_path / "run" / file, old, new)
    with pytest.raises(BenchError, match=said):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("table", ["tiles.csv", "trace.csv", "conditions.csv"])
def test_a_table_larger_than_any_run_writes_is_not_read(tmp_path, table):
    make_run(tmp_path / "run", seconds=1.0, idle_seconds=0.5, warm_up=0.5)  # its tables may have 7 MB
    path = tmp_path / "run" / table
    for rows in ("\0" * (8 << 20), path.read_text() + "0,load,1,2.0,3.0\n" * (1 << 19)):
        path.write_text(rows)
        begin = time.monotonic()
        with pytest.raises(BenchError, match=rf"{re.escape(table)} cannot be read: larger than \d+ MiB"):
            read_run(tmp_path / "run")
        assert time.monotonic() - begin < 5
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BenchError, match="larger than"):
        read_run(tmp_path / "run")


def test_figures_of_nothing_are_damage(tmp_path):
    make_run(tmp_path / "run", repeats=2)
    document = json.loads((tmp_path / "run/summary.json").read_text())
    document["figures"]["tiles_per_second"]["values"] = []
    (tmp_path / "run/summary.json").write_text(json.dumps(document))
    with pytest.raises(BenchError, match=r"0 values and an interval - at `\$\.figures\.tiles_per_second`"):
        read_summary(tmp_path / "run")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"is not a benchmark run: it has no summary\.json"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps([]))
    with pytest.raises(BenchError, match="version None"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BenchError, match="cannot be read"):
        read_summary(tmp_path)


def test_tables_are_the_same_for_the_same_run(tmp_path):
    (tmp_path / "a").mkdir()
    write_tiles(tmp_path / "a", [])
    assert (tmp_path / "a/tiles.csv").read_bytes() == b"repeat,phase,batch,start_s,latency_ms\n"
