"""Judging the conditions of a measurement: throttling, heat, a changed power mode, clocks, other programs, odd watts.

Over-current and thermal throttling slow the board down without a message: a rise of their counters makes a run invalid,
and so do a hot junction and a changed power mode. A clock below its maximum is only a warning: the board is set so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.jetson import BoardIdentity

OVER_CURRENT = "over-current"
TOO_HOT = "too hot"
MODE_CHANGED = "mode changed"
THERMAL_THROTTLING = "thermal throttling"
BELOW_MAXIMUM = "below maximum clock"
OTHER_PROGRAMS = "other programs"
NOT_SEEN = "not seen"
ODD_WATTS = "odd watts"

HOT = 95.0  # junction temperature, degrees Celsius, that makes a run invalid; Orin shuts down a few degrees above
OTHERS_SEEN, OTHERS_DISTURB = 0.05, 0.1
"""Shares of the processors' time that other programs use: above the first there is a warning; above the second, figures
of a CPU engine hold for this run alone."""
ORIN_NX_WATTS = {"idle": (4.0, 7.0), "load": (4.0, 32.0)}
"""What an Orin NX draws at VDD_IN. ARK Electronics measured 4.6 W idle, and up to 30.3 W with all CPUs and FP16
products in MAXN_SUPER (https://github.com/ARK-Electronics/ark_jetson_kernel, docs/power.md); the Mask-CDKD paper 5.74
and 18.95 W."""
_FULL = 0.98  # share of the highest allowed clock that counts as full
# Meanings on Orin; other modules have other numbers, but all events are about the supply.
_EVENTS = {"oc1": "under-voltage of the supply", "oc2": "mean over-current", "oc3": "instantaneous over-current"}


@dataclass(frozen=True)
class ConditionFinding:
    """Something about the conditions that readers of the figures have to know."""

    kind: str  # one of this module's constants
    invalidates: bool  # whether the figures of this run must not be used
    message: str
    disturbs: bool = False  # whether figures of a CPU engine hold for this run alone


def judge_conditions(readings: Sequence[Conditions], start: float, stop: float) -> tuple[ConditionFinding, ...]:
    """Judge the conditions of a load, by all readings of a monitor; moments on the clock of ``time.monotonic``.

    Counters and the power mode are compared from the last reading before ``start`` to the first one after ``stop``, so
    that nothing is missed between readings.
    """
    inside, around = _inside(readings, start, stop), _around(readings, start, stop)
    return (*_throttled(around), *_hot(inside), *_modes(around), *_slow(inside, around))


def judge_power_mode(readings: Sequence[Conditions], start: float, stop: float) -> tuple[ConditionFinding, ...]:
    """Judge whether the power mode stayed the same in a whole run, including the time between its loads."""
    return tuple(_modes(_around(readings, start, stop)))


def judge_sight(readings: Sequence[Conditions], board: BoardIdentity) -> tuple[ConditionFinding, ...]:
    """What could not be seen of a Jetson, for instance from a container: throttling, and the power mode."""
    unseen = []
    if board.jetson and not any(one.throttle_events for one in readings):
        unseen.append("throttling was not observed: no over-current counter could be read")
    if board.jetson and board.power_mode is None:
        unseen.append("the power mode is not known")
    return tuple(ConditionFinding(NOT_SEEN, False, f"{text} (cdkd-edge doctor says what helps)") for text in unseen)


def judge_watts(board: BoardIdentity, idle: float, load: float) -> tuple[ConditionFinding, ...]:
    """Judge whether an Orin NX may draw these watts at VDD_IN; other boards are not judged."""
    if "Orin NX" not in (board.model or ""):
        return ()
    found = []
    for phase, watts in (("idle", idle), ("load", load)):
        least, most = ORIN_NX_WATTS[phase]
        if not least <= watts <= most:
            text = f"VDD_IN is {watts:.1f} W in {phase}; others measured {least:g} to {most:g} W on an Orin NX"
            found.append(ConditionFinding(ODD_WATTS, False, f"{text}: is the sensor right, does anything else run?"))
    return tuple(found)


def others_share(readings: Sequence[Conditions], start: float, stop: float) -> float | None:
    """Share of the processors' time that other programs used between two moments, 0..1; None if unknown."""
    known = [(one.time, one.others_seconds) for one in _around(readings, start, stop) if one.others_seconds is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return None
    return min(1.0, max(0.0, (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])))


def judge_other_programs(
    readings: Sequence[Conditions], start: float, stop: float, phase: str
) -> tuple[ConditionFinding, ...]:
    """Judge whether other programs used the processors in a phase; ``phase`` is its name in the finding."""
    share = others_share(readings, start, stop)
    if share is None or share <= OTHERS_SEEN:
        return ()
    text = f"other programs used {share:.0%} of the processors' time during {phase}"
    return (ConditionFinding(OTHER_PROGRAMS, False, text, disturbs=share > OTHERS_DISTURB),)


def summarise(readings: Sequence[Conditions], start: float, stop: float) -> dict[str, Any]:
    """Minimum, mean and maximum of everything between two moments, as plain data for a JSON file.

    ``throttle_events`` are rises of the counters, over the same time as in :func:`judge_conditions`. What could not be
    read is an empty mapping or None.
    """
    inside = _inside(readings, start, stop)
    memory = [one.memory_available_bytes for one in inside if one.memory_available_bytes is not None]
    return {
        "readings": len(inside),
        "clocks_mhz": _spreads(one.clocks_mhz for one in inside),
        "clock_limits_mhz": _spreads(one.clock_limits_mhz for one in inside),
        "temperatures": _spreads(one.temperatures for one in inside),
        "fan": _spreads(one.fan for one in inside),
        "throttle_events": _rises(_around(readings, start, stop)),
        "power_modes": list(dict.fromkeys(one.power_mode for one in inside if one.power_mode is not None)),
        "memory_available_bytes": _spread(memory) if memory else None,
    }


def _inside(readings: Sequence[Conditions], start: float, stop: float) -> list[Conditions]:
    return [one for one in readings if start <= one.time <= stop]


def _around(readings: Sequence[Conditions], start: float, stop: float) -> list[Conditions]:
    before = [one for one in readings if one.time < start][-1:]
    after = [one for one in readings if one.time > stop][:1]
    return [*before, *_inside(readings, start, stop), *after]


def _spreads(readings: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    by_key: dict[str, list[float]] = {}
    for reading in readings:
        for key, value in reading.items():
            by_key.setdefault(key, []).append(value)
    return {key: _spread(values) for key, values in by_key.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _rises(readings: Sequence[Conditions]) -> dict[str, int]:
    """By how much each counter rose; one that restarted at zero has risen by its new value."""
    rises: dict[str, int] = {}
    for name in sorted({name for one in readings for name in one.throttle_events}):
        counts = [one.throttle_events[name] for one in readings if name in one.throttle_events]
        rises[name] = sum(later - earlier if later >= earlier else later for earlier, later in pairwise(counts))
    return rises


def _throttled(readings: Sequence[Conditions]) -> list[ConditionFinding]:
    current, heat, findings = [], [], []
    for name, rise in _rises(readings).items():
        if rise and name.startswith("oc"):
            current.append(f"{name}_event_cnt rose by {rise}" + (f", {_EVENTS[name]}" if name in _EVENTS else ""))
        elif rise:
            heat.append(f"{name}_count rose by {rise}")
    if current:
        text = f"the board was throttled by its supply: {'; '.join(current)} (a lower power mode or a stronger supply)"
        findings.append(ConditionFinding(OVER_CURRENT, True, text))
    if heat:
        text = f"the CPU was throttled by its temperature: {'; '.join(heat)}"
        findings.append(ConditionFinding(THERMAL_THROTTLING, True, text))
    return findings


def _hot(readings: Sequence[Conditions]) -> list[ConditionFinding]:
    tops = {zone: spread["max"] for zone, spread in _spreads(one.temperatures for one in readings).items()}
    # The junction is the hottest zone. Without it, each zone of the SoC counts; sensors of a PC have other limits.
    junction = [zone for zone in tops if zone.casefold().startswith("tj")]
    zones = junction or [zone for zone in tops if zone.endswith(("-thermal", "-therm"))]
    hot = [f"{zone} reached {tops[zone]:.1f} C" for zone in zones if tops[zone] >= HOT]
    return [ConditionFinding(TOO_HOT, True, f"{', '.join(hot)}, the limit is {HOT:.0f} C")] if hot else []


def _modes(readings: Sequence[Conditions]) -> list[ConditionFinding]:
    modes = list(dict.fromkeys(one.power_mode for one in readings if one.power_mode is not None))
    if len(modes) < 2:
        return []
    return [ConditionFinding(MODE_CHANGED, True, f"the power mode changed: {' -> '.join(modes)}")]


def _slow(inside: Sequence[Conditions], around: Sequence[Conditions]) -> list[ConditionFinding]:
    findings = []
    keys = {key for one in inside for key in one.clocks_mhz}
    # With a GPU, the CPUs may be slow because they wait for it.
    for key in sorted(keys & {"gpu", "emc"} if "gpu" in keys else keys):
        clocks = [one.clocks_mhz[key] for one in inside if key in one.clocks_mhz]
        # Thermal throttling lowers the limit itself, so the highest limit counts.
        limit = max((one.clock_limits_mhz.get(key, 0.0) for one in around), default=0.0)
        slow = sum(clock < _FULL * limit for clock in clocks)
        if slow * 2 > len(clocks):
            mean = sum(clocks) / len(clocks)
            name = {"gpu": "GPU", "cpu": "CPU", "emc": "memory"}[key]
            text = f"the {name} ran at {mean:.0f} MHz in the mean, its maximum is {limit:.0f} MHz"
            text += f" (below it in {slow} of {len(clocks)} readings)"
            findings.append(ConditionFinding(BELOW_MAXIMUM, False, text))
    return findings
