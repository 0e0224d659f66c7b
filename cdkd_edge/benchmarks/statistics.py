"""Latency statistics over raw samples: nothing is clipped, smoothed or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds from launch to labels. Percentiles are observed samples (nearest rank)."""

    samples: int
    mean: float
    minimum: float
    p50: float
    p90: float
    p99: float
    maximum: float


def latency_of(seconds: Sequence[float]) -> Latency:
    """Summarise latencies given in seconds.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("no latency was measured")
    milliseconds = np.asarray(seconds) * 1e3
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99], method="inverted_cdf")
    return Latency(
        samples=len(seconds),
        mean=float(milliseconds.mean()),
        minimum=float(milliseconds.min()),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        maximum=float(milliseconds.max()),
    )
