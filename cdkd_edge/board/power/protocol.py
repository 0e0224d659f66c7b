"""What a source of power is: named rails, a moment for every reading, and what the figure covers.

Sources are read in a process of their own (:mod:`cdkd_edge.board.power.sampler_child`); nothing else opens one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

WATTS = "watts"
JOULES = "joules"

MODULE = "module"
MODULE_RAILS = "rails of a module"
"""Some of them, or overlapping ones: they do not add up to the module."""
GPU_BOARD = "GPU board"
CPU_PACKAGE = "CPU package"

SOURCES = ("jtop", "ina3221", "nvml", "rapl")
"""In the order in which they are tried."""

UNROUND = 0.953
"""jtop is asked for readings of watts in this share of the interval. Readings in step with a ripple of the load see one
phase of it, and their mean is wrong by up to its amplitude. What ripples comes from timers and regulators, in round
numbers of hertz; at this rate (10.49 Hz for 10) the phases of all their multiples pass by within seconds. A ripple of
just this rate, or a multiple, still does not show: only moments drawn at random are in step with nothing."""


class UnusableSourceError(Exception):
    """A source cannot be used: why, and the next step. Stays inside the sampling process."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class LostSourceError(Exception):
    """A source that worked has gone for good. Stays inside the sampling process."""


@dataclass(frozen=True)
class SourceInfo:
    """A source that has answered a reading."""

    name: str
    """One of ``SOURCES``."""
    scope: str
    """What figures may be compared with: this module's constants; never across scopes."""
    covers: str
    """The same in a sentence."""
    quantity: str
    """Of the readings: ``watts``, or ``joules`` of a counter that never decreases."""
    rails: tuple[str, ...]
    total: str | None
    """The rail that contains the others; None where there is none."""
    interval: float
    """Seconds between readings that were asked for; watts may be read more often."""
    source_interval: float | None = None
    """Seconds between the source's own updates, where it says so."""
    random_moments: bool = False
    """Whether each reading is taken at a moment drawn at random within its step."""
    notes: tuple[str, ...] = ()

    @property
    def nominal_interval(self) -> float:
        """Seconds between readings that can be expected."""
        return max(self.interval, self.source_interval or 0.0)

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> SourceInfo:
        """From the sampling process's ``started``."""
        fields = {item.name: event[item.name] for item in dataclasses.fields(cls) if item.name in event}
        return cls(**{**fields, "rails": tuple(event["rails"]), "notes": tuple(event["notes"])})


@dataclass(frozen=True)
class Sample:
    """One reading of all rails."""

    time: float
    """Best estimate of the moment, seconds on CLOCK_MONOTONIC (``time.monotonic``, ``time.perf_counter``)."""
    uncertainty: float
    """The reading took place within this many seconds of ``time``."""
    values: dict[str, float] = field(default_factory=dict)
    """Watts or joules per rail; a rail that could not be read is absent."""


class Reader(Protocol):
    """Something that can be read at any moment."""

    name: str
    scope: str
    covers: str
    quantity: str
    total: str | None

    def read(self) -> dict[str, float]:
        """Watts, or joules since some fixed moment, per rail. What cannot be read is absent.

        Raises:
            OSError, ValueError: nothing can be read now.
        """

    def close(self) -> None:
        """Let go of it."""


class Stream(Protocol):
    """Something that hands out samples at its own pace."""

    info: SourceInfo

    def next(self, timeout: float) -> Sample | str | None:
        """The next sample, or a sentence that says what was wrong with it, or None if there was none in time.

        Raises:
            LostSourceError: there will be no other.
        """

    def close(self) -> None:
        """Let go of it."""
