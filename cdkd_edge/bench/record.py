"""What one benchmark run leaves behind: ``summary.json``, as data.

Moments are seconds from the start of the run, on one clock for phases, tiles, power and conditions. A figure that
could not be measured is absent, and the field beside it says why. The JSON Schema of this module is
``docs/schemas/summary-2.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from cdkd_edge import __version__
from cdkd_edge.bench.statistics import Figure, Latency
from cdkd_edge.core.machine import Machine
from cdkd_edge.core.manifest import EngineManifest

SUMMARY_VERSION: Final = 2

VALID: Final = "valid"
INVALID: Final = "invalid"
NOT_STEADY: Final = "not_steady"

IDLE: Final = "idle"
WARM_UP: Final = "warm-up"
LOAD: Final = "load"


@dataclass(frozen=True)
class Span:
    """A phase. Repeat i has its idle, warm-up and load; the idle phase after the last load has the next number.

    Of a run that was broken off, the last one is the phase in which that happened.
    """

    name: Literal["idle", "warm-up", "load"]
    repeat: int
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.stop - self.start


@dataclass(frozen=True)
class Protocol:
    """How the run was made."""

    preset: Literal["default", "paper", "mlperf"]
    idle_seconds: float
    """Of each idle phase."""
    load_seconds: float
    """Of each load phase, at least."""
    repeats: int
    window_seconds: float
    """Of the windows that are compared to see whether warm-up is over, at least."""
    warm_up_cap_seconds: float
    """Warm-up ends here, steady or not."""
    min_batches: int
    """Batches per load phase, at least."""


@dataclass(frozen=True)
class Verdict:
    """Whether the figures may be quoted."""

    status: Literal["valid", "invalid", "not_steady"]
    reasons: tuple[str, ...]
    """Why it is not ``valid``; empty if it is."""
    warnings: tuple[str, ...] = ()
    """What a reader should know of a valid run."""


@dataclass(frozen=True)
class RailRepeat:
    """One rail in one repeat."""

    idle_watts: float
    """Mean of the idle phases before and after, as :attr:`idle_before_watts`, :attr:`idle_after_watts`."""
    idle_before_watts: float
    idle_after_watts: float
    load_watts: float
    load_joules: float
    """Of the covered part of the load phase."""
    covered: float
    """Share of the worst-covered of the three phases that lies between readings, 0..1."""
    bound_joules: float
    """By how much ``load_joules`` may be wrong through sampling (:mod:`cdkd_edge.board.power.energy`), for the loads
    that ``figures.power.bound_holds`` names."""


@dataclass(frozen=True)
class Repeat:
    """One idle, warm-up and load."""

    steady: bool
    warm_up_seconds: float
    tiles: int
    seconds: float
    """Of the load phase."""
    tiles_per_second: float
    latency_ms: Latency
    rails: dict[str, RailRepeat] | None
    """Per rail; None where power was not measured."""


@dataclass(frozen=True)
class RejectedRepeat:
    """A repeat of an invalid run: what helps to find the cause, and no rate, latency or watts that could be quoted."""

    steady: bool
    warm_up_seconds: float
    tiles: int
    seconds: float
    """Of the load phase."""
    covered: dict[str, float] | None
    """Per rail, as in :class:`RailRepeat`; None where power was not measured."""


@dataclass(frozen=True)
class RailFigures:
    """One rail over all repeats. Net is load without idle; gross is with it."""

    idle_watts: Figure
    load_watts: Figure
    net_watts: Figure
    gross_joules_per_tile: Figure
    net_joules_per_tile: Figure
    gross_joules_per_megapixel: Figure
    net_joules_per_megapixel: Figure


@dataclass(frozen=True)
class PowerFigures:
    """Power over all repeats."""

    source: str
    scope: str
    """``module``, ``GPU board`` or ``CPU package``; figures of different scopes are not to be compared."""
    covers: str
    total: str | None
    """The rail that contains the others."""
    rails: dict[str, RailFigures]
    readings_per_second: float
    late: int
    """Readings that came more than half an interval late."""
    gaps: int
    """Times in which readings are missing, over the whole trace."""
    gap_seconds: float
    problems: tuple[str, ...]
    """That the sampling met; it may have got over them."""
    bound_holds: str = ""
    """For which loads ``bound_joules`` of the repeats holds, and what it takes for granted; empty: not recorded."""


@dataclass(frozen=True)
class Figures:
    """The headline figures: engine alone, tiles from memory, one batch after the other."""

    tiles_per_second: Figure
    megapixels_per_second: Figure
    latency_ms: Latency
    """Of all load phases together; per batch."""
    power: PowerFigures | None
    power_reason: str
    """Why there is no power figure; empty where there is one."""


@dataclass(frozen=True)
class EndToEnd:
    """A scene from file to finished label map."""

    scene: str
    width: int
    height: int
    tiles: int
    seconds: float
    engine_seconds: float
    tiles_per_second: float
    megapixels_per_second: float
    """Scene pixels; overlaps and padding count as work but not as result."""
    overhead: float | None
    """Seconds over engine seconds; 1 means that reading and writing cost nothing. None: no tile was computed."""


@dataclass(frozen=True)
class ModelledBound:
    """The roofline of this engine's graph on this device: modelled, not measured."""

    device: str
    mode: str
    precision: str
    bound_tiles_per_second: float
    expected_tiles_per_second: tuple[float, float]
    """Low and high."""
    share_of_bound: float | None
    """Measured over bound; None where there is no measured figure."""


@dataclass(frozen=True)
class BenchSummary:
    """One run, as written to ``summary.json``."""

    verdict: Verdict
    figures: Figures | None
    """None in an invalid run, unless it was to be kept."""
    engine: EngineManifest
    protocol: Protocol
    phases: tuple[Span, ...]
    repeats: tuple[Repeat, ...]
    """Empty in an invalid run, unless it was to be kept."""
    end_to_end: EndToEnd | None
    """None in an invalid run, unless it was to be kept; also where it failed, and a warning says why."""
    roofline: ModelledBound | None
    roofline_reason: str
    """Why there is no modelled bound; empty where there is one."""
    machine: Machine
    board: dict[str, Any] | None
    """Model, L4T, JetPack, power mode, jetson_clocks of a Jetson; None elsewhere."""
    conditions: dict[str, Any]
    """Clocks, temperatures and fan over the load phases: minimum, mean, maximum of each."""
    libraries: dict[str, str]
    peak_memory_bytes: int
    """Largest resident size of the process while the engine was measured (where the kernel cannot forget what was
    before, with loading it and drawing its tiles); where CPU and GPU share memory, the GPU's part is not in it."""
    started: str
    """UTC, ISO 8601."""
    origin: float
    """The same moment on CLOCK_MONOTONIC, s, from which all others in the record are counted; to align other meters."""
    rejected_repeats: tuple[RejectedRepeat, ...] = ()
    """Those of an invalid run; every tile and reading of it is in the tables beside this file."""
    command: str = ""
    """What was typed; empty if the run was made from Python."""
    tool: str = field(default=f"cdkd-edge {__version__}")
    summary_version: Literal[2] = 2
