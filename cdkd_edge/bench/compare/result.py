"""A comparison of runs, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdkd_edge.bench.compare.checks import Gate
from cdkd_edge.bench.compare.ratio import Ratio
from cdkd_edge.bench.record import RailFigures
from cdkd_edge.bench.statistics import Figure, Interval, Latency

COMPARISON_VERSION = 1

BASELINE = "baseline"
SAME_RUN = "same run"
NO_DIFFERENCE = "no difference shown"
CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Energy:
    """The rail that contains the others."""

    source: str
    scope: str
    rail: str
    figures: RailFigures


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    folder: str
    status: str
    """``valid``, ``invalid`` or ``not_steady``."""
    verdict: str
    """``faster``, ``slower``, ``no difference shown``, ``cannot tell``, ``same run``; ``baseline``."""
    energy_verdict: str
    """``less energy``, ``more energy``, otherwise as :attr:`verdict`; empty without power."""
    engine: str
    sha256: str
    """Of the engine."""
    runtime: str
    precision: str
    tile: int
    """px."""
    batch: int
    device: str
    power_mode: str | None
    repeats: int
    tiles_per_second: Figure
    tiles_per_second_interval: Interval | None
    """Over repeats; over blocks of batches where there is a single repeat."""
    interval_basis: str
    """What the interval was taken from; why there is none."""
    megapixels_per_second: Figure
    latency_ms: Latency
    energy: Energy | None
    energy_reason: str
    """Why there is no energy; empty where there is."""
    mean_iou: float | None
    """0..1."""
    modelled_share: float | None
    """Measured speed over the modelled bound."""
    speed: Ratio | None
    """Over the baseline's; None for the baseline."""
    gross_energy: Ratio | None
    """Over the baseline's, of load with idle; None where one of both has no power."""
    net_energy: Ratio | None
    """The same without idle."""


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other."""

    baseline: int
    """Index of the run that ratios are taken against."""
    unit: Literal["tile", "megapixel"]
    """Of what ratios are: megapixels where the sides of tiles differ."""
    rows: tuple[Row, ...]
    not_comparable: tuple[str, ...]
    """Why the figures are not to be compared; empty unless that was forced."""
    notes: tuple[str, ...]
    gates: tuple[Gate, ...]
    method: str
    """How the intervals of the ratios were made."""
    comparison_version: int = COMPARISON_VERSION
