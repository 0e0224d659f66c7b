"""How numbers are printed."""

from __future__ import annotations

import math

import pytest

from cdkd_edge.core.numbers import ABSENT, duration, estimate, percent, significant, size


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (7.6, 3, "7.60"),
        (9.9996, 4, "10.00"),
        (0.012345, 3, "0.0123"),
        (123456.0, 3, "123456"),
        (-0.5, 2, "-0.50"),
        (0.0, 3, "0"),
        (math.inf, 3, "inf"),
        (1e-30, 3, "0"),  # what is left of a difference of equal values
        (-3e-14, 3, "0"),
        (-0.0, 3, "0"),
        (None, 3, ABSENT),
    ],
)
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345_678, "12.3 MB"),
        (999_900, "1.00 MB"),
        (31_000_000_000, "31.0 GB"),
        (None, ABSENT),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "decimals", "text"),
    [
        (0.93412, 1, "93.4 %"),
        (1.0, 1, "100.0 %"),
        (0.0, 2, "0.00 %"),
        (0.99996, 1, "99.996 %"),
        (2e-5, 1, "0.002 %"),
        (1e-12, 1, "0.000000 %"),
        (math.nan, 1, ABSENT),
        (None, 1, ABSENT),
    ],
)
def test_only_all_and_nothing_are_printed_as_such(share, decimals, text):
    assert percent(share, decimals) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01234, "12.3 ms"),
        (0.9999, "1.00 s"),
        (4.5678, "4.57 s"),
        (99.9, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3599.9, "1 h 0 min"),
        (7520, "2 h 5 min"),
        (None, ABSENT),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (12.4137, None, None, "12.4"),
        (12.4137, 12.36, 12.46, "12.414 ± 0.050"),
        (1.2, 1.12, 1.45, "1.20 (1.12 .. 1.45)"),
        (100.0, 90.0, 110.0, "100 ± 10"),
        (7.0, 7.0, 7.0, "7.00"),
        (0.0, -0.996, 0.996, "0.0 ± 1.0"),
        (-2.2e-16, -0.104, 0.104, "0.00 ± 0.10"),
        (-3e-15, -7e-15, 1e-15, "0"),
    ],
)
def test_an_interval_gives_the_decimals(value, low, high, text):
    assert estimate(value, low, high) == text
