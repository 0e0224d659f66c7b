"""Statistics over raw samples: nothing is clipped, smoothed or left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Latency:
    """Milliseconds from launch to labels. Percentiles are observed samples (nearest rank).

    p90 and p99 are there if, with 95 % confidence, some sample lies above the true one: from 29 and 299 samples on.
    """

    samples: int
    mean: float
    minimum: float
    p50: float
    p90: float | None
    p99: float | None
    maximum: float
    absent: str = ""
    """Why p90 or p99 is null; empty where both are there."""


def latency_of(seconds: Sequence[float]) -> Latency:
    """Summarise latencies given in seconds.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("no latency was measured")
    milliseconds = np.asarray(seconds) * 1e3
    found = {
        share: float(np.percentile(milliseconds, share, method="inverted_cdf"))
        for share in (50, 90, 99)
        if share == 50 or len(seconds) >= samples_for(share)
    }
    absent = [f"p{share} needs {samples_for(share)} batches" for share in (90, 99) if share not in found]
    return Latency(
        samples=len(seconds),
        mean=float(milliseconds.mean()),
        minimum=float(milliseconds.min()),
        p50=found[50],
        p90=found.get(90),
        p99=found.get(99),
        maximum=float(milliseconds.max()),
        absent=f"{' and '.join(absent)}, there are {len(seconds)}" if absent else "",
    )


def samples_for(percentile: float) -> int:
    """Samples of which the largest lies above the true percentile with 95 % confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percentile / 100))


@dataclass(frozen=True)
class Interval:
    """95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A quantity over the repeats of a run."""

    mean: float
    values: tuple[float, ...]
    """One per repeat, in their order."""
    interval: Interval | None
    """Of the mean, by Student's t over repeats; None with fewer than two."""


def figure_of(values: Sequence[float], hidden: float = 0.0) -> Figure:
    """Mean and 95 % t-interval of repeats.

    Repeats are taken as independent draws of a normal distribution: W. S. Gosset, "The probable error of a mean",
    Biometrika 6 (1908).

    Args:
        values: one per repeat.
        hidden: variance of the mean that does not show between the repeats, because neighbours have something in
            common (:func:`variance_hidden_by_sharing`).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no repeat was measured")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Figure(mean, tuple(values), None)
    half = t_quantile(len(values) - 1) * math.sqrt(_variance(values) / len(values) + hidden)
    return Figure(mean, tuple(values), Interval(mean - half, mean + half))


def variance_hidden_by_sharing(levels: Sequence[float]) -> float:
    """What the scatter of n repeats lacks of the variance of their mean, each having the mean of two levels.

    Repeat i has (x[i] + x[i + 1]) / 2 of n + 1 levels x, so that neighbours share one and are alike. Of levels of
    variance V, the mean of the repeats has (n - 1/2) V / n^2, and 1/n of the repeats' own variance is V / 2n less.

    Args:
        levels: one more than there are repeats.
    """
    return _variance(levels) / (2 * (len(levels) - 1)) if len(levels) > 2 else 0.0


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile of Student's t distribution, by bisection on its distribution function.

    The function is elementary for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Args:
        freedom: degrees of freedom, at least 1.
        probability: above 0.5.

    Raises:
        ValueError: outside these ranges.
    """
    if freedom < 1 or not 0.5 < probability < 1:
        raise ValueError("degrees of freedom begin at 1, and the probability lies above a half")
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """Probability of -t..t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom == 1:
        return 2 * angle / math.pi
    # Terms cos, 2/3 cos^3 ... (odd) or 1, 1/2 cos^2, 3/8 cos^4 ... (even).
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for step in range(freedom % 2 + 1, freedom, 2):
        total += term
        term *= step / (step + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
