"""Joules from a counter: wrap-around undone, absence explained, nothing filled in."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from scene_helpers import pipeline_threads

from cdkd_edge.power.rapl import RaplSource
from cdkd_edge.power.source import EnergyMeter, PowerSample, find_source

RANGE = 262_143_328_850


def zone(root: Path, folder: str, name: str, microjoules: int, limit: int = RANGE) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


def make_unreadable(path: Path) -> None:
    """A folder in the file's place: root may read any file."""
    path.unlink()
    path.mkdir()


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A powercap tree with two packages, a core zone and what else lies there."""
    root = tmp_path / "powercap"
    zone(root, "intel-rapl:0", "package-0", 1_000_000)
    zone(root, "intel-rapl:0:0", "core", 5)
    zone(root, "intel-rapl:1", "package-1", 7_000_000)
    zone(root, "intel-rapl:2", "psys", 9)
    (root / "intel-rapl").mkdir()
    (root / "dtpm").mkdir()
    return root


# --- RAPL -----------------------------------------------------------------------------------------


def test_packages_are_found_and_counted_from_the_first_reading(powercap: Path) -> None:
    source, reason = RaplSource.probe(powercap)
    assert source is not None
    assert reason == ""
    assert (source.name, source.scope) == ("RAPL", "CPU package")
    assert source.read() == {"package-0": 0.0, "package-1": 0.0}
    (powercap / "intel-rapl:0/energy_uj").write_text("3500000\n")
    (powercap / "intel-rapl:1/energy_uj").write_text("7000001\n")
    assert source.read() == pytest.approx({"package-0": 2.5, "package-1": 1e-6})
    assert source.read() == pytest.approx({"package-0": 2.5, "package-1": 1e-6})


def test_wrap_around_is_undone(powercap: Path) -> None:
    counter = powercap / "intel-rapl:0/energy_uj"
    counter.write_text(f"{RANGE - 1_000_000}\n")
    source, _ = RaplSource.probe(powercap)
    assert source is not None
    for lap in range(1, 4):
        counter.write_text("500000\n")  # 1 J to the end and 0.5 J from 0
        assert source.read()["package-0"] == pytest.approx(lap * 1.5 + (lap - 1) * (RANGE / 1e6 - 1.5))
        counter.write_text(f"{RANGE - 1_000_000}\n")
        source.read()


def test_amd_calls_it_the_same(tmp_path: Path) -> None:
    zone(tmp_path, "amd-rapl:0", "package-0", 1)
    assert RaplSource.probe(tmp_path)[0] is not None


@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj"])
@pytest.mark.parametrize("harm", [make_unreadable, Path.unlink, lambda path: path.write_text("no number\n")])
def test_a_counter_that_cannot_be_read_is_no_source(powercap: Path, file: str, harm: Callable[[Path], object]) -> None:
    harm(powercap / "intel-rapl:1" / file)
    source, reason = RaplSource.probe(powercap)
    assert source is None
    assert reason.startswith("RAPL: ")
    assert "root" in reason


def test_a_zone_without_a_name_is_passed_over(powercap: Path) -> None:
    make_unreadable(powercap / "intel-rapl:1/name")
    source, _ = RaplSource.probe(powercap)
    assert source is not None
    assert list(source.read()) == ["package-0"]


@pytest.mark.parametrize("there", [True, False])
def test_no_counter_has_a_reason(tmp_path: Path, there: bool) -> None:
    root = tmp_path / "powercap"
    if there:
        zone(root, "intel-rapl:0:0", "core", 5)
    assert RaplSource.probe(root) == (None, f"RAPL: no CPU package under {root}")


def test_find_source_says_why_there_is_none(powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = RaplSource.probe
    monkeypatch.setattr(RaplSource, "probe", lambda: probe(tmp_path / "nothing"))
    source, reason = find_source()
    assert source is None
    assert "RAPL: no CPU package" in reason
    monkeypatch.setattr(RaplSource, "probe", lambda: probe(powercap))
    source, reason = find_source()
    assert isinstance(source, RaplSource)
    assert reason == ""


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.005)


# --- meter ----------------------------------------------------------------------------------------


class Clockwork:
    """Watts that are known: 12 W on one rail, 3 W on another, and from ``step_at`` on 20 W more on the first."""

    name, scope = "clockwork", "nothing"

    def __init__(self, step_after: float = 1e9) -> None:
        self.begin = time.perf_counter()
        self.step_at = self.begin + step_after

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        return {"a": 12 * (now - self.begin) + 20 * max(0.0, now - self.step_at), "b": 3 * (now - self.begin)}


def test_mean_power() -> None:
    with EnergyMeter(Clockwork(), interval=0.01) as meter:
        start = time.perf_counter()
        time.sleep(0.3)
        stop = time.perf_counter()
    assert meter.error is None
    assert meter.watts(start, stop) == pytest.approx({"a": 12, "b": 3}, rel=0.1)
    assert len(meter.samples) >= 10
    for before, after in pairwise(meter.samples):
        assert before.start < before.stop == after.start, "no gap and no overlap"


def test_only_what_lies_within_counts() -> None:
    source = Clockwork(step_after=0.25)
    with EnergyMeter(source, interval=0.01) as meter:
        time.sleep(0.5)
    idle = meter.watts(source.begin, source.step_at)
    load = meter.watts(source.step_at, source.step_at + 0.25)
    assert idle is not None
    assert load is not None
    assert idle["a"] == pytest.approx(12, rel=0.1)
    assert load["a"] == pytest.approx(32, rel=0.1)


def test_the_mean_is_weighted_by_time() -> None:
    meter = EnergyMeter(Clockwork())
    meter.samples = [PowerSample(0, 1, {"a": 10}), PowerSample(1, 4, {"a": 90}), PowerSample(4, 5, {"a": 1000})]
    assert meter.watts(0, 4) == {"a": 25}
    assert meter.watts(0, 4.5) == {"a": 25}, "a sample that is partly outside is no part of the phase"
    assert meter.watts(0.5, 1.5) is None
    assert meter.watts(5, 9) is None


class Dying(Clockwork):
    def __init__(self, error: Exception, readings: int) -> None:
        super().__init__()
        self.error, self.left = error, readings

    def read(self) -> dict[str, float]:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().read()


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("not a number"), KeyError("rail")])
@pytest.mark.parametrize("readings", [0, 1, 4])
def test_a_source_that_stops_answering(error: Exception, readings: int) -> None:
    with EnergyMeter(Dying(error, readings), interval=0.01) as meter:
        wait_for(lambda: meter.error is not None)
        died = time.perf_counter()
        time.sleep(0.03)
    assert meter.error is error
    assert len(meter.samples) == max(0, readings - 1), "what was read stands, nothing is filled in"
    assert meter.watts(died, time.perf_counter()) is None
    assert pipeline_threads() == []


def test_a_counter_that_vanishes(powercap: Path) -> None:
    source, _ = RaplSource.probe(powercap)
    assert source is not None
    with EnergyMeter(source, interval=0.01) as meter:
        wait_for(lambda: len(meter.samples) > 2)
        make_unreadable(powercap / "intel-rapl:0/energy_uj")
        vanished = time.perf_counter()
        wait_for(lambda: meter.error is not None)
    assert isinstance(meter.error, OSError)
    assert meter.samples
    assert meter.samples[-1].start <= vanished
    assert meter.watts(vanished, time.perf_counter()) is None


def test_the_thread_ends_when_the_run_fails() -> None:
    with pytest.raises(RuntimeError, match="run"), EnergyMeter(Clockwork(), interval=0.01):
        raise RuntimeError("run")
    assert pipeline_threads() == []
