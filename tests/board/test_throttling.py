"""Which conditions make a run invalid, and which are only told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.jetson import BoardIdentity, PowerMode
from cdkd_edge.board.throttling import (
    BELOW_MAXIMUM,
    MODE_CHANGED,
    NOT_SEEN,
    ODD_WATTS,
    OVER_CURRENT,
    THERMAL_THROTTLING,
    TOO_HOT,
    judge_conditions,
    judge_power_mode,
    judge_sight,
    judge_watts,
    summarise,
)


def at(time: float, **changed: Any) -> Conditions:
    good: dict[str, Any] = {
        "temperatures": {"tj-thermal": 60.0, "gpu-thermal": 58.0},
        "clocks_mhz": {"gpu": 918.0, "cpu": 700.0},
        "clock_limits_mhz": {"gpu": 918.0, "cpu": 1984.0},
        "throttle_events": {"oc1": 0, "oc2": 4, "oc3": 0},
        "power_mode": "MAXN",
        "memory_available_bytes": 8 << 30,
    }
    return Conditions(time, **{**good, **changed})


def run(*changes: dict[str, Any]) -> list[Conditions]:
    """Readings at 0, 1, 2 ... s."""
    return [at(float(time), **change) for time, change in enumerate(changes)]


def kinds(readings: list[Conditions], start: float = 1.5, stop: float = 4.5) -> list[tuple[str, bool]]:
    return [(one.kind, one.invalidates) for one in judge_conditions(readings, start, stop)]


CALM: list[dict[str, Any]] = [{}] * 7
EVENT = {"throttle_events": {"oc1": 0, "oc2": 4, "oc3": 2}}


def test_a_calm_run() -> None:
    assert kinds(run(*CALM)) == []
    assert kinds([]) == []
    assert kinds(run({})) == []


@pytest.mark.parametrize(("first", "found"), [(1, False), (2, True), (4, True), (5, True), (6, False)])
def test_an_event_counts_from_the_last_reading_before_to_the_first_after(first: int, found: bool) -> None:
    """Readings at 0 ... 6 s, load from 1.5 to 4.5 s; the counter has risen at ``first`` and stays."""
    changes = [EVENT if time >= first else {} for time in range(7)]
    assert kinds(run(*changes)) == ([(OVER_CURRENT, True)] if found else [])


def test_an_event_says_which() -> None:
    (finding,) = judge_conditions(run({}, {}, EVENT, EVENT), 0.5, 2.5)
    assert "oc3_event_cnt rose by 2, instantaneous over-current" in finding.message
    assert "oc2" not in finding.message


def test_a_counter_that_cannot_be_read_for_a_while_or_starts_again() -> None:
    lost = {"throttle_events": {"oc1": 0, "oc3": 0}}
    after = {"throttle_events": {"oc1": 0, "oc2": 5, "oc3": 0}}
    assert kinds(run({}, {}, lost, lost, after, after)) == [(OVER_CURRENT, True)]
    assert kinds(run({}, {}, lost, lost, {}, {})) == []
    zero = {"throttle_events": {"oc2": 0}}
    assert kinds(run({}, {}, zero, zero, zero)) == []
    assert kinds(run({}, {}, zero, {"throttle_events": {"oc2": 1}}, {"throttle_events": {"oc2": 1}})) == [
        (OVER_CURRENT, True)
    ]


def test_x86_throttling() -> None:
    cool = {"throttle_events": {"core_throttle": 9, "package_throttle": 2}}
    hot = {"throttle_events": {"core_throttle": 12, "package_throttle": 2}}
    (finding,) = judge_conditions(run(cool, cool, hot, hot), 0.5, 2.5)
    assert (finding.kind, finding.invalidates) == (THERMAL_THROTTLING, True)
    assert "core_throttle_count rose by 3" in finding.message


@pytest.mark.parametrize(
    ("temperatures", "found"),
    [
        ({"tj-thermal": 94.9, "gpu-thermal": 94.0}, False),
        ({"tj-thermal": 95.0}, True),
        ({"gpu-thermal": 96.0}, True),
        ({"GPU-therm": 96.0}, True),
        ({"k10temp Tctl": 95.2, "coretemp Package id 0": 99.0, "x86_pkg_temp": 99.0}, False),
        ({}, False),
    ],
)
def test_heat(temperatures: dict[str, float], found: bool) -> None:
    hot, none = {"temperatures": temperatures}, {"temperatures": {}}
    assert kinds(run(none, none, hot, hot, none)) == ([(TOO_HOT, True)] if found else [])
    assert kinds(run(hot, hot, none, none, none)) == [], "before the load"


def test_a_changed_mode() -> None:
    other, lost = {"power_mode": "25W"}, {"power_mode": None}
    (finding,) = judge_conditions(run({}, {}, lost, other, other), 0.5, 3.5)
    assert (finding.kind, finding.invalidates) == (MODE_CHANGED, True)
    assert "MAXN -> 25W" in finding.message
    assert kinds(run(lost, lost, {}, lost, {})) == []
    assert kinds(run(other, {}, {}, {}, {})) == [], "long before the load"
    assert kinds(run({}, {}, {}, {}, {}, {}, other)) == [], "long after it"


def test_a_mode_that_changes_between_loads() -> None:
    readings = run({}, {}, {"power_mode": "10W"}, {"power_mode": "10W"}, {"power_mode": "10W"})
    assert judge_conditions(readings, 3.5, 3.9) == judge_conditions(readings, 0.1, 0.9) == ()
    (found,) = judge_power_mode(readings, 0.1, 3.9)
    assert (found.kind, found.invalidates) == (MODE_CHANGED, True)
    assert "MAXN -> 10W" in found.message
    assert judge_power_mode(readings, 2.5, 3.9) == ()


def test_slow_clocks_are_told() -> None:
    slow = {"clocks_mhz": {"gpu": 612.0, "cpu": 700.0}}
    (finding,) = judge_conditions(run({}, {}, slow, slow, slow), 1.5, 4.5)
    assert (finding.kind, finding.invalidates) == (BELOW_MAXIMUM, False)
    assert "the GPU ran at 612 MHz in the mean, its maximum is 918 MHz (below it in 3 of 3 readings)" in finding.message
    assert kinds(run({}, {}, slow, {}, {})) == [], "for a moment"
    idle = {"clocks_mhz": {"gpu": 306.0}}
    assert kinds(run(idle, idle, {}, {}, {}, idle, idle)) == [], "outside the load"
    assert kinds(run({}, {}, *[{"clocks_mhz": {"gpu": 905.0}}] * 3)) == [], "rounding of the clock"


def test_a_limit_that_is_lowered_hides_nothing() -> None:
    low = {"clocks_mhz": {"gpu": 408.0}, "clock_limits_mhz": {"gpu": 408.0}}
    assert kinds(run({}, {}, low, low, low)) == [(BELOW_MAXIMUM, False)]
    assert kinds(run(*[low] * 6)) == [], "it is the mode's"


def test_without_a_gpu_it_is_the_cpu() -> None:
    slow = {"clocks_mhz": {"cpu": 2000.0}, "clock_limits_mhz": {"cpu": 5000.0}}
    assert kinds(run(*[slow] * 6)) == [(BELOW_MAXIMUM, False)]
    unlimited = {"clocks_mhz": {"cpu": 2000.0}, "clock_limits_mhz": {}}
    assert kinds(run(*[unlimited] * 6)) == []


NX = BoardIdentity("NVIDIA Jetson Orin NX Developer Kit", True, "R36.4.3", "6", PowerMode(0, "MAXN"), (), True, None)


def test_what_a_container_does_not_see_is_told() -> None:
    blind = run(*[{"throttle_events": {}}] * 3)
    (found,) = judge_sight(blind, NX)
    assert (found.kind, found.invalidates) == (NOT_SEEN, False)
    assert found.message.startswith("throttling was not observed: no over-current counter could be read (cdkd-edge doc")
    (mode,) = judge_sight(run({}, {}), replace(NX, power_mode=None))
    assert mode.message.startswith("the power mode is not known")
    assert judge_sight(run({}, {}), NX) == ()
    assert judge_sight(blind, BoardIdentity(None, False, None, None, None, (), None, None)) == ()


@pytest.mark.parametrize(
    ("idle", "load", "odd"),
    [
        (4.6, 29.4, ()),  # ARK's
        (5.74, 18.95, ()),  # the paper's
        (2.1, 9.0, ("2.1 W in idle",)),
        (11.2, 36.0, ("11.2 W in idle", "36.0 W in load")),
    ],
)
def test_watts_that_an_orin_nx_does_not_draw(idle: float, load: float, odd: tuple[str, ...]) -> None:
    found = judge_watts(NX, idle, load)
    assert [one.kind for one in found] == [ODD_WATTS] * len(odd)
    assert not any(one.invalidates or one.disturbs for one in found)
    for one, text in zip(found, odd, strict=True):
        assert f"VDD_IN is {text}; others measured 4 to" in one.message
    assert judge_watts(replace(NX, model="NVIDIA Jetson Orin Nano Developer Kit"), idle, load) == ()


def test_everything_at_once() -> None:
    bad = {
        "throttle_events": {"oc2": 9, "core_throttle": 1},
        "temperatures": {"tj-thermal": 99.0},
        "power_mode": "15W",
        "clocks_mhz": {"gpu": 300.0, "emc": 1000.0},
        "clock_limits_mhz": {"gpu": 918.0, "emc": 2000.0},
    }
    first = {"throttle_events": {"oc2": 1, "core_throttle": 0}}
    found = judge_conditions(run(first, first, bad, bad, bad), 1.5, 4.5)
    assert {one.kind for one in found} == {OVER_CURRENT, TOO_HOT, MODE_CHANGED, THERMAL_THROTTLING, BELOW_MAXIMUM}
    assert len(found) == 6
    assert [one.invalidates for one in found] == [True, True, True, True, False, False]


def test_the_summary() -> None:
    readings = run({}, {}, {"temperatures": {"tj-thermal": 70.0}, "fan": {"percent": 31.0}}, {}, EVENT)
    summary = summarise(readings, 0.5, 3.5)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["readings"] == 3
    assert summary["temperatures"]["tj-thermal"] == {"min": 60.0, "mean": pytest.approx(190 / 3), "max": 70.0}
    assert summary["clocks_mhz"]["gpu"] == {"min": 918.0, "mean": 918.0, "max": 918.0}
    assert summary["fan"] == {"percent": {"min": 31.0, "mean": 31.0, "max": 31.0}}
    assert summary["throttle_events"] == {"oc1": 0, "oc2": 0, "oc3": 2}
    assert summary["power_modes"] == ["MAXN"]
    assert summary["memory_available_bytes"]["max"] == 8 << 30


def test_a_summary_of_nothing() -> None:
    summary = summarise([], 0, 1)
    assert summary["readings"] == 0
    assert summary["memory_available_bytes"] is None
    assert all(summary[key] == {} for key in ("clocks_mhz", "clock_limits_mhz", "temperatures", "fan"))
