"""The stages of a run follow one another, on a running mean of how the reconstructions compare."""

from __future__ import annotations

import pytest

from cdkd_edge.distillation.schedule import LEAST_STEPS, WEIGHTS, Schedule


def after(schedule, ratio, steps):
    for _ in range(steps):
        schedule.update(2 * ratio, 2.0)
    return schedule


def running_mean(ratios):
    """Spelled out: a plain mean of the first hundred, then each new one counts for a hundredth."""
    mean = 0.0
    for index, ratio in enumerate(ratios):
        mean += (ratio - mean) / min(index + 1, 100)
    return mean


def test_weights_are_the_papers():
    assert WEIGHTS == {"early": (0.2, 0.4, 0.4), "middle": (0.6, 0.2, 0.2), "late": (0.7, 0.15, 0.15)}
    assert Schedule().weights == (0.2, 0.4, 0.4)
    assert LEAST_STEPS == 200


def test_stages_follow_one_another_and_never_go_back():
    schedule = after(Schedule(), 1.0, 1000)
    assert (schedule.stage, schedule.transitions) == ("early", [])
    after(schedule, 0.9, 1000)
    assert schedule.stage == "early"
    after(schedule, 0.8, 1000)
    assert (schedule.stage, schedule.weights) == ("middle", (0.6, 0.2, 0.2))
    after(schedule, 0.9, 1000)
    assert schedule.stage == "middle"
    after(schedule, 1.0, 1000)
    assert (schedule.stage, schedule.weights) == ("late", (0.7, 0.15, 0.15))
    after(schedule, 0.3, 1000)
    after(schedule, 2.0, 1000)
    assert schedule.stage == "late"
    assert [one["stage"] for one in schedule.transitions] == ["middle", "late"]


def test_the_ratio_is_the_teachers_loss_over_the_students():
    schedule = Schedule()
    schedule.update(0.3, 0.4)
    assert schedule.ratio == pytest.approx(0.75)


def test_a_stage_lasts_at_least_200_steps():
    schedule = after(Schedule(), 0.5, LEAST_STEPS - 1)
    assert schedule.stage == "early"
    after(schedule, 0.5, 1)
    assert schedule.stage == "middle"
    after(schedule, 5.0, LEAST_STEPS - 1)
    assert schedule.stage == "middle"
    assert schedule.ratio > 0.95
    after(schedule, 5.0, 1)
    assert schedule.stage == "late"
    assert [one["step"] for one in schedule.transitions] == [200, 400]


def test_the_ratio_is_a_running_mean_that_soon_forgets_the_first_steps():
    ratios = [9.0, 1.1, 0.7, *[1.0, 0.8] * 149, 0.2]
    schedule = Schedule()
    for count, ratio in enumerate(ratios, start=1):
        schedule.update(ratio, 1.0)
        assert schedule.ratio == pytest.approx(running_mean(ratios[:count]))


def test_single_batches_do_not_end_a_stage():
    """A batch of water, say, on which the teacher is ten times better."""
    schedule = after(Schedule(), 1.0, 1000)
    after(schedule, 0.1, 10)
    assert (schedule.stage, schedule.transitions) == ("early", [])


def test_transitions_say_when_and_why():
    schedule = after(after(Schedule(), 1.0, 300), 0.8, 300)
    (change,) = schedule.transitions
    ratios = [1.0] * 300 + [0.8] * 300
    assert change["ratio"] == pytest.approx(running_mean(ratios[: change["step"]]))
    assert change["ratio"] < 0.85 <= running_mean(ratios[: change["step"] - 1])
    assert schedule.since == change["step"]


@pytest.mark.parametrize("stop", [1, 57, 199, 200, 350])
def test_a_schedule_goes_on_from_its_state(stop):
    whole = after(after(Schedule(), 0.8, 300), 1.2, 300)
    first = after(after(Schedule(), 0.8, min(stop, 300)), 1.2, max(0, stop - 300))
    second = Schedule(**vars(first))
    after(after(second, 0.8, 300 - min(stop, 300)), 1.2, 300 - max(0, stop - 300))
    assert second == whole
    assert [one["stage"] for one in whole.transitions] == ["middle", "late"]
