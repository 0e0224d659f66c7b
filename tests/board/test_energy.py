"""Joules from readings: exact where the truth is known, gaps left out and said, counters shared out at edges only."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdkd_edge.board.power.energy import Trace, bound_holds, net_bound, rail_energy
from cdkd_edge.board.power.protocol import JOULES, WATTS, Accuracy, Sample, SourceInfo


def trace_of(points, quantity=WATTS, uncertainty=0.0, interval=0.1, start=None, stop=None):
    """A trace of (time, value) or (time, values)."""
    samples = tuple(
        Sample(time, uncertainty, value if isinstance(value, dict) else {"rail": value}) for time, value in points
    )
    info = SourceInfo("test", "module", "a test", quantity, ("rail",), "rail", interval)
    first, last = samples[0].time, samples[-1].time
    return Trace(info, samples, (), first if start is None else start, last if stop is None else stop)


def steady(seconds, watts, interval=0.1, begin=100.0):
    return [(begin + n * interval, watts) for n in range(round(seconds / interval) + 1)]


def test_constant_power():
    energy = rail_energy(trace_of(steady(10, 7.5)), "rail", 101.03, 108.47)
    assert energy.joules == pytest.approx(7.5 * 7.44)
    assert (energy.covered, energy.seconds) == (pytest.approx(7.44), pytest.approx(7.44))
    assert (energy.watts, energy.coverage, energy.bound, energy.gaps) == (pytest.approx(7.5), pytest.approx(1), 0, ())
    assert energy.readings == 74


def test_actual_moments_count_not_the_number_of_readings():
    points = [(0.0, 10.0), (0.1, 10.0), (0.15, 20.0), (0.5, 20.0), (0.55, 0.0)]
    energy = rail_energy(trace_of(points), "rail", 0, 0.55)
    assert energy.joules == pytest.approx(1.0 + 0.75 + 7.0 + 1.0), "the last 0.05 s are held"
    assert energy.watts == pytest.approx(9.75 / 0.55)


@given(
    st.lists(st.floats(0.01, 0.4), min_size=2, max_size=40),
    st.floats(0, 50),
    st.floats(-5, 5),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_ramp_is_exact_but_for_the_edges(steps, offset, slope, left, right):
    times = [math.fsum(steps[:n]) for n in range(len(steps) + 1)]
    trace = trace_of([(t, offset + slope * t) for t in times])
    if len(times) > 3:  # the last edge apart
        whole = rail_energy(trace, "rail", 0, times[-1] - 1e-12)
        last = slope * steps[-1] ** 2 / 2
        truth = offset * times[-1] + slope * times[-1] ** 2 / 2 - last
        assert whole.joules == pytest.approx(truth, abs=1e-6)
    start, stop = sorted((left * times[-1], right * times[-1]))
    if stop - start < 1e-3:
        return
    energy = rail_energy(trace, "rail", start, stop)
    truth = offset * (stop - start) + slope * (stop**2 - start**2) / 2
    assert abs(energy.joules - truth) <= energy.bound + 1e-6
    assert energy.coverage == pytest.approx(1)


@given(st.floats(0, 0.0999), st.floats(0, 0.02), st.integers(0, 2**32))
def test_phases_that_begin_with_a_step_are_exact(phase, uncertainty, seed):
    """Wherever the readings fall, and within their uncertainty: no load in idle, no idle in load."""
    rng = random.Random(seed)
    points = []
    for n in range(150):
        true = phase + n / 10
        points.append((true + rng.uniform(-uncertainty, uncertainty), 18.95 if 5 <= true < 12 else 5.74))
    trace = trace_of(points, uncertainty=uncertainty)
    idle, load = rail_energy(trace, "rail", 1, 5), rail_energy(trace, "rail", 5, 12)
    assert idle.joules == pytest.approx(5.74 * 4)
    assert load.joules == pytest.approx(18.95 * 7)
    assert (idle.coverage, load.coverage) == (pytest.approx(1), pytest.approx(1))


@given(st.floats(0, 0.0999))
def test_phases_of_a_counter_that_begin_with_a_step(phase):
    times = [phase + n / 10 for n in range(150)]
    points = [(t, 5.74 * t + 13.21 * min(max(0.0, t - 5), 7.0)) for t in times]
    trace = trace_of(points, JOULES)
    assert rail_energy(trace, "rail", 1, 5).joules == pytest.approx(5.74 * 4)
    assert rail_energy(trace, "rail", 5, 12).joules == pytest.approx(18.95 * 7, rel=0.005)


@given(st.floats(1, 9), st.floats(0, 0.0999))
def test_the_bound_holds_for_a_step(moment, phase):
    """Power that jumps between two readings: off by less than the bound says."""
    points = [(phase + n / 10, 5.0 if phase + n / 10 < moment else 19.0) for n in range(120)]
    energy = rail_energy(trace_of(points), "rail", 0.5, 9.5)
    truth = 5 * (moment - 0.5) + 19 * (9.5 - moment) if moment > 0.5 else 19 * 9
    assert abs(energy.joules - truth) <= energy.bound + 1e-9
    assert energy.bound < 0.1 * 14 + 1e-9


def test_a_gap_is_accounted_and_not_filled():
    points = [p for p in steady(10, 8.0) if not 103.05 < p[0] < 105.05]
    trace = trace_of(points)
    energy = rail_energy(trace, "rail", 101, 109)
    assert energy.covered == pytest.approx(8 - 2.1)
    assert energy.joules == pytest.approx(8 * 5.9), "joules of what was measured"
    assert energy.watts == pytest.approx(8)
    assert energy.coverage == pytest.approx(5.9 / 8)
    (gap,) = energy.gaps
    assert (gap.start, gap.stop, gap.missed) == (pytest.approx(103.0), pytest.approx(105.1), 20)
    assert rail_energy(trace, "rail", 103.2, 104.9) is None, "nothing is known in there"


def test_a_late_reading_is_no_gap_and_is_counted():
    points = [p for p in steady(5, 8.0) if not 102.05 < p[0] < 102.25]
    trace = trace_of(points)
    assert trace.gaps() == ()
    assert trace.late == 1
    assert rail_energy(trace, "rail", 100, 105).coverage == pytest.approx(1)


def test_time_before_and_after_the_readings_is_not_covered():
    trace = trace_of(steady(10, 8.0), start=98.0, stop=115.0)
    energy = rail_energy(trace, "rail", 98, 115)
    assert energy.covered == pytest.approx(10)
    assert [(gap.start, gap.stop) for gap in energy.gaps] == [(98, 100), (pytest.approx(110), 115)]
    assert rail_energy(trace, "rail", 112, 115) is None
    assert trace_of(steady(10, 8.0), start=99.9, stop=110.1).gaps() == (), "the edges of sampling are no gaps"


def test_a_rail_that_disappears_has_a_gap_and_the_others_have_none():
    points = [(t, {"rail": 1.0} if 102.01 < t < 104.01 else {"rail": 1.0, "other": 2.0}) for t, _ in steady(10, 0)]
    trace = trace_of(points)
    assert rail_energy(trace, "rail", 100, 110).coverage == pytest.approx(1)
    other = rail_energy(trace, "other", 100, 110)
    assert other.coverage == pytest.approx(0.79)
    assert other.watts == pytest.approx(2)
    assert len(other.gaps) == 1
    assert rail_energy(trace, "nobody", 100, 110) is None


def test_a_pinned_interval_widens_what_counts_as_a_gap():
    trace = trace_of(steady(10, 8.0, interval=1.0), interval=1.0)
    assert trace.gaps() == ()
    assert len(trace_of(steady(10, 8.0, interval=1.0), interval=0.1).gaps()) == 10


def test_a_counter_loses_nothing_in_a_gap():
    points = [(t, 8 * t) for t, _ in steady(10, 0) if not 103.05 < t < 105.05]
    energy = rail_energy(trace_of(points, JOULES), "rail", 101, 109)
    assert energy.joules == pytest.approx(64)
    assert energy.coverage == pytest.approx(1)
    assert len(energy.gaps) == 1, "and says so"


def test_edges_of_a_counter():
    trace = trace_of([(0.0, 0.0), (1.0, 10.0), (2.0, 40.0), (3.0, 44.0)], JOULES, interval=1)
    shared = rail_energy(trace, "rail", 0.5, 1.25)
    assert shared.joules == pytest.approx(5 + 7.5), "by time, where no step lies inside"
    assert shared.bound == pytest.approx(5 + 22.5)
    paced = rail_energy(trace, "rail", 0.9, 2.25)
    assert paced.joules == pytest.approx(3 + 30 + 4), "at the pace inside, and never more than the step"
    assert paced.bound == pytest.approx(7 + 4)


def test_a_counter_that_begins_anew():
    energy = rail_energy(trace_of([(0.0, 100.0), (1.0, 110.0), (2.0, 3.0), (3.0, 13.0)], JOULES), "rail", 0, 3)
    assert (energy.joules, energy.covered) == (20, 2)


def test_uncertain_moments_are_in_the_bound():
    points = [(0.0, 5.0), (0.1, 5.0), (0.2, 15.0), (0.3, 15.0)]
    sure = rail_energy(trace_of(points), "rail", 0, 0.3).bound
    assert rail_energy(trace_of(points, uncertainty=0.02), "rail", 0, 0.3).bound == pytest.approx(sure + 0.2)


def test_an_uncertain_first_reading_still_says_where_readings_begin():
    points = [(100.0, 19.0), *((t, 5.0) for t, _ in steady(5, 0)[1:])]
    energy = rail_energy(trace_of(points, uncertainty=0.03), "rail", 100.01, 104)
    assert energy.coverage == pytest.approx(1)
    assert energy.watts == pytest.approx(5)


@pytest.mark.parametrize("window", [(5, 5), (6, 5), (float("nan"), 5)])
def test_an_empty_window_is_a_mistake(window):
    with pytest.raises(ValueError, match="empty"):
        rail_energy(trace_of(steady(1, 1)), "rail", *window)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([WATTS, JOULES]))
def test_what_lies_far_from_a_window_changes_nothing(seed, quantity):
    """Energy is computed of the readings around a window; of all of them it is the same."""
    draw = random.Random(seed)
    time, value, samples = 100.0, 5.0, []
    for _ in range(draw.randrange(2, 80)):
        time += draw.choice([0.02, 0.1, 0.1, 0.1, 0.4, 1.5])
        value = value + draw.random() if quantity == JOULES else draw.uniform(4, 20)
        values = {"rail": value} if draw.random() < 0.8 else {}
        samples.append(Sample(time, draw.choice([0.0, 0.005, 0.05]), values))
    info = SourceInfo("x", "module", "", quantity, ("rail",), "rail", 0.1)
    trace = Trace(info, tuple(samples), (), 100.0, time)
    start, stop = sorted(draw.uniform(99, time + 1) for _ in range(2))
    found = rail_energy(trace, "rail", start, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trace, "around", lambda self, *window: self)
        assert found == rail_energy(trace, "rail", start, stop)


def test_a_sensor_s_offset_and_steps_are_in_gross_and_only_steps_in_net():
    """All readings are 0.08 W too high, in steps of 0.04 W: idle 5.73 W reads 5.80 W, 18.95 W reads 19.04 W."""
    sensor = Accuracy(offset=0.08, step=0.04, step_share=0.0)
    points = [(t, 0.04 * round((0.08 + (18.95 if 105 <= t < 112 else 5.73)) / 0.04)) for t, _ in steady(15, 0)]
    trace = trace_of(points)
    trace = replace(trace, source=replace(trace.source, accuracy={"rail": sensor}))
    idle, load = rail_energy(trace, "rail", 100.5, 104.5), rail_energy(trace, "rail", 105.5, 111.5)
    for energy, truth in ((idle, 5.73 * 4), (load, 18.95 * 6)):
        assert (energy.offset, energy.bound) == (
            pytest.approx(0.08 * energy.seconds),
            pytest.approx(0.1 * energy.seconds),
        )
        assert 0.05 * energy.seconds < energy.joules - truth < energy.bound, "without the offset it would not hold"
    assert net_bound(load, idle, idle) == pytest.approx(0.04), "half a step each"
    assert abs(load.watts - idle.watts - (18.95 - 5.73)) < net_bound(load, idle)
    assert rail_energy(trace_of(points), "rail", 100.5, 104.5).bound == 0, "of a sensor that is not known"


def test_a_bound_says_for_which_loads_it_holds():
    """A square in step with regular readings looks constant: its bound is 0 J, and names what it takes for granted."""
    regular = trace_of(steady(10, 9.0))
    assert rail_energy(regular, "rail", 100, 110).bound == 0
    assert bound_holds(regular.source).startswith("only if power between two readings stays between them")
    assert "any load" in bound_holds(trace_of(steady(1, 9.0), JOULES).source)
    random_moments = replace(regular.source, random_moments=True)
    assert "for any load: every reading is taken at a random moment" in bound_holds(random_moments)
    assert "but one in step with the sensor, which measures every 7 ms:" in bound_holds(
        replace(random_moments, cycle=0.007)
    )
