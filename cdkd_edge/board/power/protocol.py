"""What a power source gives: its description, its samples, and how they are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

WATTS = "watts"
JOULES = "joules"

MODULE = "module"
MODULE_RAILS = "rails of a module"  # some of them, or overlapping ones: they do not add up to the module
GPU_BOARD = "GPU board"
CPU_PACKAGE = "CPU package"

LEFT_OUT = {GPU_BOARD: "CPU", CPU_PACKAGE: "GPU"}  # the processor that figures of a scope do not cover


def longest_step(interval: float) -> float:
    """Seconds between two readings above which there is a gap: three intervals and a fifth of a second."""
    return 3 * interval + 0.2


@dataclass(frozen=True)
class Accuracy:
    """How far a sensor may be off on a rail, whatever the load. Errors in proportion to the power are not in it."""

    offset: (
        float  # watts that may be missing or too many in every reading alike; a difference of two does not have them
    )
    step: float  # watts from one value of the current to the next
    step_share: float  # from one value of the voltage to the next, as a share of the watts

    def resolution(self, watts: float) -> float:
        """Watts by which a mean may be off because readings come in steps.

        Half a step of each. Where the load makes readings differ by more than a step, their mean is better than that,
        but an idle rail may stay at one value; so nothing is taken off.
        """
        return (self.step + self.step_share * abs(watts)) / 2


class UnusableSourceError(Exception):
    """A source cannot be used. Raised and caught inside the sampling process."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class LostSourceError(Exception):
    """A source that worked has gone for good. Raised and caught inside the sampling process."""


@dataclass(frozen=True)
class SourceInfo:
    """A source that has answered a reading."""

    name: str  # a key of :data:`.sources.SOURCES`
    scope: str  # what the figures cover, as a constant of this module. Figures of different scopes cannot be compared
    covers: str  # what the figures cover, in words
    quantity: str  # ``watts``, or ``joules`` of a counter that never decreases
    rails: tuple[str, ...]
    total: str | None  # the rail that contains the others; None where there is none
    interval: float  # requested seconds between readings; watts may be read more often
    source_interval: float | None = None  # seconds between the source's own updates, where it says so
    cycle: float | None = None  # seconds in which the sensor measures once: a load in step with that does not show
    random_moments: bool = False  # whether readings are taken at moments drawn at random
    notes: tuple[str, ...] = ()
    accuracy: dict[str, Accuracy] = field(default_factory=dict)  # per rail, where the sensor is known

    @property
    def nominal_interval(self) -> float:
        """Seconds between readings that can be expected."""
        return max(self.interval, self.source_interval or 0.0)

    @property
    def longest_step(self) -> float:
        """Seconds between two of its readings above which there is a gap."""
        return longest_step(self.nominal_interval)

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> SourceInfo:
        """From the ``started`` event of the sampling process."""
        fields = {item.name: event[item.name] for item in dataclasses.fields(cls) if item.name in event}
        accuracy = {rail: Accuracy(**one) for rail, one in event.get("accuracy", {}).items()}
        return cls(**{**fields, "rails": tuple(event["rails"]), "notes": tuple(event["notes"]), "accuracy": accuracy})


@dataclass(frozen=True)
class Sample:
    """One reading of all rails, or of some of them."""

    time: float  # best estimate of the moment, seconds on CLOCK_MONOTONIC (``time.monotonic``, ``time.perf_counter``)
    uncertainty: float  # the reading took place within this many seconds of ``time``
    values: dict[str, float] = field(default_factory=dict)  # watts or joules per rail that could be read
    tried: tuple[str, ...] = ()  # the rails that were to be read; empty: all


class Reader(Protocol):
    """Something that can be read at any moment."""

    name: str
    scope: str
    covers: str
    quantity: str
    total: str | None

    def read(self) -> dict[str, float]:
        """Watts, or joules since some fixed moment, per rail. A rail that cannot be read is absent.

        Raises:
            OSError, ValueError: nothing can be read now.
        """

    def close(self) -> None:
        """Release the device."""


@runtime_checkable
class Stream(Protocol):
    """Something that hands out samples at its own pace."""

    info: SourceInfo

    def next(self, timeout: float) -> Sample | str | None:
        """The next sample, or a sentence that says what was wrong with it, or None if there was none in time.

        Raises:
            LostSourceError: there will be no other.
        """

    def close(self) -> None:
        """Release the device."""
