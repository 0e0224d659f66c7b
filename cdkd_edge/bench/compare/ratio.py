"""Ratios of what two runs measured, with 95 % intervals, and how far each mean would move if it were measured again.

A mean's relative variance comes from repeats, or, of a run's speed with a single repeat, from its batches. The
interval of a ratio of two independent means is taken on its logarithm (delta method): variances of the logarithms
add, and the degrees of freedom are those of B. L. Welch, "The generalization of Student's problem when several
different population variances are involved", Biometrika 34 (1947), rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cdkd_edge.bench.folder import TimedBatch
from cdkd_edge.bench.statistics import Figure, Interval, t_quantile

BLOCKS = 10
"""Into as many blocks batches are cut: 10 to 30 are enough and not too many (B. Schmeiser, "Batch size effects in the
analysis of simulation output", Operations Research 30, 1982)."""
MIN_BATCHES = 2 * BLOCKS
"""With fewer, blocks would hold single batches, and neighbours are alike."""


@dataclass(frozen=True)
class Spread:
    """A mean above zero, and how far it would move."""

    mean: float
    variance: float
    """Of the mean, relative to the mean's square."""
    freedom: int
    """Degrees of freedom of the variance."""
    basis: str
    """What it was taken from, e.g. ``5 repeats``."""

    @property
    def interval(self) -> Interval:
        """Of the mean."""
        return _interval(self.mean, self.variance, self.freedom)


@dataclass(frozen=True)
class Ratio:
    """A run's figure over the baseline's."""

    value: float
    interval: Interval | None
    basis: str
    """What the interval was taken from; why there is none."""


def spread_of_repeats(figure: Figure) -> Spread | None:
    """Spread by a figure's own interval, which knows what its repeats share; None with fewer than two, or where their
    mean is not above zero."""
    if figure.interval is None or figure.mean <= 0:
        return None
    freedom = len(figure.values) - 1
    error = (figure.interval.high - figure.interval.low) / 2 / t_quantile(freedom)
    return Spread(figure.mean, (error / figure.mean) ** 2, freedom, f"{len(figure.values)} repeats")


def spread_of_batches(rate: float, batches: Sequence[TimedBatch]) -> Spread | None:
    """Spread of the speed of one load phase, from its batches.

    Latencies of neighbouring batches are alike, so that means of overlapping blocks are compared, not batches: M. S.
    Meketon and B. Schmeiser, "Overlapping batch means: something for nothing?", Winter Simulation Conference (1984).
    That is the variance which a moving-block bootstrap of the mean has (H. R. Kuensch, "The jackknife and the
    bootstrap for general stationary observations", Annals of Statistics 17, 1989), without drawing. The degrees of
    freedom are those of blocks that do not overlap. A block has a tenth of the batches.

    Args:
        rate: tiles/s of the phase.
        batches: of the phase.

    Returns:
        None with fewer than :data:`MIN_BATCHES`, or where the rate is not above zero or all began at once.
    """
    if len(batches) < MIN_BATCHES or rate <= 0:
        return None
    # From start to start: with several slots latencies overlap.
    periods = np.diff(sorted(batch.start for batch in batches))
    if not periods.any():
        return None
    length = len(batches) // BLOCKS
    variance = _variance_of_mean(periods / periods.mean(), length)
    basis = f"blocks of {length} of {len(batches)} batches"
    return Spread(rate, variance, len(batches) // length - 1, basis)


def _variance_of_mean(values: npt.NDArray[np.float64], length: int) -> float:
    """Of values that depend on their neighbours: from means of all blocks of ``length``."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means, n = (sums[length:] - sums[:-length]) / length, len(values)
    return float(((means - values.mean()) ** 2).sum() * length / ((n - length + 1) * (n - length)))


def ratio_of(value: float, spread: Spread | None, other: float, other_spread: Spread | None, why_not: str) -> Ratio:
    """The ratio of two independent means.

    Args:
        value, spread: the run's mean and its spread.
        other, other_spread: the baseline's; ``other`` is above zero.
        why_not: why there is no interval, where a spread is missing.
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
    half = t_quantile(freedom) * math.sqrt(variance)
    # So scattered that a logarithm would overflow: nothing is known.
    return Interval(center * math.exp(-min(half, 300.0)), center * math.exp(min(half, 300.0)))
