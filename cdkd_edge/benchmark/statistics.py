"""Statistics of raw samples, of repeats, and of ratios between runs. Nothing is clipped, smoothed or left out.

A 95 % interval of a mean comes from its repeats, or, for the speed of a run with one repeat, from its batches. The
interval of a ratio of two independent means is taken on its logarithm (delta method): variances of the logarithms add,
and the degrees of freedom are those of B. L. Welch, "The generalization of Student's problem when several different
population variances are involved", Biometrika 34 (1947), rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95

# Blocks that batches are divided into; 10 to 30 are enough (B. Schmeiser, "Batch size effects in the analysis of
# simulation output", Operations Research 30, 1982).
BLOCKS = 10
MIN_BATCHES = 2 * BLOCKS  # with fewer, a block would hold a single batch, and neighbouring batches are alike


@dataclass(frozen=True)
class Latency:
    """Milliseconds from launch to labels. Percentiles are observed samples (nearest rank).

    p90 and p99 are given if, with 95 % confidence, a sample lies above the true one: from 29 and 299 samples on.
    """

    samples: int
    mean: float
    minimum: float
    p50: float
    p90: float | None
    p99: float | None
    maximum: float
    absent: str = ""  # why p90 or p99 is null; empty if both are given


def latency_of(seconds: Sequence[float]) -> Latency:
    """Percentiles of at least one latency in seconds."""
    if not seconds:
        raise ValueError("no latency was measured")
    found = np.asarray(seconds) * 1e3
    p50, p90, p99 = (float(one) for one in np.percentile(found, (50, 90, 99), method="inverted_cdf"))
    # So many samples that the largest lies above the true percentile with 95 % confidence.
    needed = {share: math.ceil(math.log(1 - CONFIDENCE) / math.log(share / 100)) for share in (90, 99)}
    absent = [f"p{share} needs {least} batches" for share, least in needed.items() if len(seconds) < least]
    return Latency(
        samples=len(seconds), mean=float(found.mean()), minimum=float(found.min()), p50=p50,
        p90=p90 if len(seconds) >= needed[90] else None, p99=p99 if len(seconds) >= needed[99] else None,
        maximum=float(found.max()), absent=f"{' and '.join(absent)}, there are {len(seconds)}" if absent else "",
    )  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """A measured quantity: its mean over the repeats of a run."""

    mean: float
    values: tuple[float, ...]  # one value per repeat, in order
    interval: Interval | None  # 95 % interval of the mean, by Student's t over repeats; None with fewer than two

    def __post_init__(self) -> None:
        if len(self.values) < (2 if self.interval else 1):
            raise ValueError(f"{len(self.values)} values" + (" and an interval" if self.interval else ""))


def figure_of(values: Sequence[float], hidden: float = 0.0) -> Figure:
    """Mean and 95 % t-interval of repeats.

    Assumes that repeats are independent draws from a normal distribution: W. S. Gosset, "The probable error of a mean",
    Biometrika 6 (1908). ``hidden`` is added to the variance of the mean (:func:`variance_hidden_by_sharing`).
    """
    mean = math.fsum(values) / max(1, len(values))
    if len(values) < 2:
        return Figure(mean, tuple(values), None)
    half = t_quantile(len(values) - 1) * math.sqrt(float(np.var(values, ddof=1)) / len(values) + hidden)
    return Figure(mean, tuple(values), Interval(mean - half, mean + half))


def variance_hidden_by_sharing(levels: Sequence[float]) -> float:
    """Variance of a mean of n repeats that their scatter does not show, because neighbours share a level.

    Repeat i uses (x[i] + x[i + 1]) / 2 of n + 1 levels x (here: idle power before and after a load). If the levels have
    variance V, the mean of the repeats has variance (n - 1/2) V / n^2, while the repeats' scatter shows V / 2n less.
    """
    return float(np.var(levels, ddof=1)) / (2 * (len(levels) - 1)) if len(levels) > 2 else 0.0


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile of Student's t distribution, by bisection on its distribution function (boards have no SciPy).

    For whole degrees of freedom (1 or more) the function is elementary: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if freedom < 1 or not 0.5 < probability < 1:
        raise ValueError(f"need freedom >= 1 and 0.5 < probability < 1, got {freedom} and {probability}")
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """Probability that a value lies between -t and t."""
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


@dataclass(frozen=True)
class Spread:
    """A mean above zero, and how far it would move if it were measured again."""

    mean: float
    variance: float  # variance of the mean, divided by the square of the mean
    freedom: int  # degrees of freedom of the variance
    basis: str  # what the variance was computed from, e.g. ``5 repeats``

    @property
    def interval(self) -> Interval:
        """95 % interval of the mean."""
        return _interval(self.mean, self.variance, self.freedom)


@dataclass(frozen=True)
class Ratio:
    """A run's figure divided by the baseline's."""

    value: float
    interval: Interval | None
    basis: str  # what the interval was computed from, or why there is none


def spread_of_repeats(figure: Figure) -> Spread | None:
    """Spread of a figure from its interval; None with fewer than two repeats, or if the mean is not above zero."""
    if figure.interval is None or figure.mean <= 0:
        return None
    freedom = len(figure.values) - 1
    error = (figure.interval.high - figure.interval.low) / 2 / t_quantile(freedom)
    return Spread(figure.mean, (error / figure.mean) ** 2, freedom, f"{len(figure.values)} repeats")


def spread_of_batches(rate: float, starts: Sequence[float]) -> Spread | None:
    """Spread of the speed of one load phase, from its batches.

    Neighbouring batches take similar times, so means of overlapping blocks are compared instead: M. S. Meketon and
    B. Schmeiser, "Overlapping batch means: something for nothing?", Winter Simulation Conference (1984). It equals the
    variance of a moving-block bootstrap (H. R. Kuensch, "The jackknife and the bootstrap for general stationary
    observations", Annals of Statistics 17, 1989). The degrees of freedom are those of blocks that do not overlap. A
    block holds a tenth of the batches. None with fewer than :data:`MIN_BATCHES` batches, with a rate of zero, or if all
    batches began at once.
    """
    count = len(starts)
    if count < MIN_BATCHES or rate <= 0:
        return None
    # From start to start: with several slots, latencies overlap.
    periods = np.diff(sorted(starts))
    if not periods.any():
        return None
    length, n = count // BLOCKS, len(periods)
    sums = np.concatenate([[0.0], np.cumsum(periods / periods.mean())])
    means = (sums[length:] - sums[:-length]) / length  # of all blocks
    variance = float(((means - 1) ** 2).sum() * length / ((n - length + 1) * (n - length)))
    return Spread(rate, variance, count // length - 1, f"blocks of {length} of {count} batches")


def ratio_of(value: float, spread: Spread | None, other: float, other_spread: Spread | None, why_not: str) -> Ratio:
    """The ratio of the run's mean to the baseline's, ``other``, which is above zero; both are independent.

    ``why_not`` says why there is no interval, if a spread is missing.
    """
    ratio = value / other
    if spread is None or other_spread is None:
        return Ratio(ratio, None, why_not)
    parts = (spread, other_spread)
    variance = sum(part.variance for part in parts)
    terms = sum(part.variance**2 / part.freedom for part in parts)
    freedom = max(1, int(variance**2 / terms)) if terms > 0 else sum(part.freedom for part in parts)
    if min(part.freedom for part in parts) == 1:
        freedom = 1  # two repeats may agree by chance; beside eight others Welch's intervals held 89 %, not 95 %
    basis = spread.basis if spread.basis == other_spread.basis else f"{spread.basis}; {other_spread.basis}"
    return Ratio(ratio, _interval(ratio, variance, freedom), basis)


def _interval(center: float, variance: float, freedom: int) -> Interval:
    half = min(t_quantile(freedom) * math.sqrt(variance), 300.0)  # capped, so that a huge spread does not overflow
    return Interval(center * math.exp(-half), center * math.exp(half))
