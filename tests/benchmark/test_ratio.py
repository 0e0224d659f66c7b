"""Ratios and their intervals: as often right as they say, also where neighbouring batches are alike."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from cdkd_edge.benchmark.statistics import (
    BLOCKS,
    MIN_BATCHES,
    Ratio,
    Spread,
    figure_of,
    ratio_of,
    spread_of_batches,
    spread_of_repeats,
)

Floats = npt.NDArray[np.float64]


def starts_of(periods: Floats, start: float = 3.0) -> list[float]:
    """When batches begin that follow each other."""
    return (start + np.concatenate([[0.0], np.cumsum(periods)[:-1]])).tolist()


def alike(random: np.random.Generator, series: int, count: int, correlation: float) -> Floats:
    """Series ``[series, count]`` of variance 1 in which neighbours are correlated (autoregressive of order 1)."""
    values = random.standard_normal((count + 100, series))
    for index in range(1, len(values)):
        values[index] = correlation * values[index - 1] + math.sqrt(1 - correlation**2) * values[index]
    return values[100:].T


def ratio_of_repeats(one: Floats, other: Floats) -> Ratio:
    figures = figure_of(list(one)), figure_of(list(other))
    spreads = [spread_of_repeats(figure) for figure in figures]
    return ratio_of(figures[0].mean, spreads[0], figures[1].mean, spreads[1], "")


def share_that_holds(truth: float, ratios: list[Ratio]) -> float:
    assert all(ratio.interval for ratio in ratios)
    return float(np.mean([r.interval.low <= truth <= r.interval.high for r in ratios if r.interval]))


@pytest.mark.parametrize(
    ("repeats", "noise"),
    [
        ((3, 3), (0.02, 0.02)),
        ((5, 5), (0.01, 0.05)),
        ((2, 8), (0.03, 0.01)),
        ((10, 10), (0.1, 0.1)),
        ((3, 8), (0.03, 0.01)),
    ],
)
def test_intervals_over_repeats_hold_the_true_ratio(repeats, noise):
    random = np.random.default_rng(5)
    ratios = [
        ratio_of_repeats(
            5 * (1 + noise[0] * random.standard_normal(repeats[0])),
            4 * (1 + noise[1] * random.standard_normal(repeats[1])),
        )
        for _ in range(1000)
    ]
    assert 0.93 <= share_that_holds(1.25, ratios) <= 0.999  # few degrees of freedom are rounded down: too wide


@pytest.mark.parametrize(
    ("count", "correlation", "least"), [(20, 0.0, 0.93), (50, 0.3, 0.92), (150, 0.5, 0.93), (700, 0.8, 0.925)]
)
def test_intervals_over_blocks_hold_the_true_speed(count, correlation, least):
    random = np.random.default_rng(7)
    held = []
    for periods in 0.1 * (1 + 0.05 * alike(random, 600 if count < 200 else 400, count, correlation)):
        spread = spread_of_batches(count / periods.sum(), starts_of(periods))
        assert spread is not None
        held.append(spread.interval.low <= 10 <= spread.interval.high)
    assert least <= np.mean(held) <= 0.985


def test_treating_neighbours_as_independent_would_be_wrong():
    """So that the test above can fail: the same series, shuffled, has intervals that are far too narrow."""
    random = np.random.default_rng(7)
    held = []
    for periods in 0.1 * (1 + 0.05 * alike(random, 100, 700, 0.8)):
        spread = spread_of_batches(700 / periods.sum(), starts_of(random.permutation(periods)))
        assert spread is not None
        held.append(spread.interval.low <= 10 <= spread.interval.high)
    assert np.mean(held) < 0.7


def test_the_variance_is_that_of_a_moving_block_bootstrap():
    random = np.random.default_rng(3)
    count, length = 400, 40
    periods = 0.1 * (1 + 0.1 * alike(random, 1, count, 0.7)[0])
    spread = spread_of_batches(10.0, starts_of(periods))
    assert spread is not None
    assert spread.basis == "blocks of 40 of 400 batches"
    blocks = np.lib.stride_tricks.sliding_window_view(periods, length).mean(axis=1)
    means = random.choice(blocks, size=(20000, count // length)).mean(axis=1)
    corrected = means.var() / periods.mean() ** 2 * count / (count - length)
    assert spread.variance == pytest.approx(corrected, rel=0.05)


def test_welch_by_hand():
    """Two means with 1 % and 2 % standard error, 4 and 9 degrees of freedom."""
    ratio = ratio_of(9.0, Spread(9.0, 1e-4, 4, "5 repeats"), 10.0, Spread(10.0, 4e-4, 9, "10 repeats"), "")
    # Welch: (5e-4)^2 / (1e-8 / 4 + 16e-8 / 9) = 12.3; t(12) = 2.1788
    half = 2.1788 * math.sqrt(5e-4)
    assert ratio.value == pytest.approx(0.9)
    assert ratio.interval is not None
    assert ratio.interval.low == pytest.approx(0.9 * math.exp(-half), rel=1e-5)
    assert ratio.interval.high == pytest.approx(0.9 * math.exp(half), rel=1e-5)
    assert ratio.basis == "5 repeats; 10 repeats"


def test_the_inverse_ratio_has_the_inverse_interval():
    one, other = Spread(3.0, 2e-4, 3, "a"), Spread(5.0, 1e-3, 6, "b")
    there, back = ratio_of(3.0, one, 5.0, other, ""), ratio_of(5.0, other, 3.0, one, "")
    assert there.interval
    assert back.interval
    assert there.interval.low == pytest.approx(1 / back.interval.high)
    assert there.interval.high == pytest.approx(1 / back.interval.low)


def test_a_figure_says_how_far_it_would_move():
    values = [5.2, 5.3, 5.25]
    variance = np.var(values, ddof=1) / len(values) / np.mean(values) ** 2
    plain, wider = spread_of_repeats(figure_of(values)), spread_of_repeats(figure_of(values, 0.01))
    assert plain
    assert wider
    assert plain.variance == pytest.approx(variance)
    assert (plain.mean, plain.freedom, plain.basis) == (pytest.approx(5.25), 2, "3 repeats")
    assert wider.variance == pytest.approx(variance + 0.01 / 5.25**2)


def test_what_has_no_interval():
    assert spread_of_repeats(figure_of([2.0])) is None
    with pytest.raises(ValueError, match="0 values"):
        figure_of([])
    assert spread_of_repeats(figure_of([-1.0, 0.5])) is None, "a relative variance needs a mean above zero"
    assert spread_of_batches(1.0, starts_of(np.ones(MIN_BATCHES - 1))) is None
    assert spread_of_batches(0.0, starts_of(np.ones(MIN_BATCHES))) is None
    assert spread_of_batches(1.0, starts_of(np.zeros(MIN_BATCHES))) is None
    assert ratio_of(2.0, None, 4.0, Spread(4.0, 1e-4, 3, "x"), "why") == Ratio(0.5, None, "why")


def test_repeats_that_are_equal_have_an_interval_of_no_width():
    ratio = ratio_of_repeats(np.full(3, 2.0), np.full(3, 4.0))
    assert ratio.interval is not None
    assert (ratio.interval.low, ratio.value, ratio.interval.high) == (0.5, 0.5, 0.5)


def test_the_order_of_the_file_does_not_matter():
    random = np.random.default_rng(1)
    periods = 0.1 * (1 + 0.05 * random.standard_normal(100))
    plain = starts_of(periods)
    spread = spread_of_batches(10.0, plain)
    assert spread_of_batches(10.0, plain[::-1]) == spread
    assert spread
    assert spread.freedom == BLOCKS - 1


def test_nonsense_spread_is_wide_and_not_an_error():
    interval = Spread(1.0, 1e6, 1, "x").interval
    assert interval.low < 1e-100
    assert interval.high > 1e100
    assert math.isfinite(interval.high)
