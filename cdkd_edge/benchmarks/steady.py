"""Whether warm-up is over: the last windows agree in speed, power and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WINDOWS = 3
"""Windows in a row that must agree."""
SPEED_TOLERANCE = 0.03
"""Largest difference of their speeds, as a share of the mean."""
POWER_TOLERANCE = 0.03
"""The same for watts."""
LEAST_WATTS = 0.2
"""A difference below it counts as none: a few steps of an INA3221 on 5 V (about 0.04 W each)."""
TEMPERATURE_TOLERANCE = 1.0
"""Largest difference of their temperatures, degrees Celsius."""


@dataclass(frozen=True)
class Window:
    """Means over a part of the warm-up."""

    speed: float
    """Batches per second."""
    watts: float | None
    celsius: float | None
    """At its end."""


def is_steady(windows: Sequence[Window]) -> bool:
    """Whether the last windows agree; what is not measured in all of them is not asked for."""
    last = windows[-WINDOWS:]
    if len(last) < WINDOWS:
        return False
    speeds = [window.speed for window in last]
    watts = [window.watts for window in last if window.watts is not None]
    celsius = [window.celsius for window in last if window.celsius is not None]
    if _range(speeds) > SPEED_TOLERANCE * sum(speeds) / WINDOWS:
        return False
    if len(watts) == WINDOWS and _range(watts) > max(LEAST_WATTS, POWER_TOLERANCE * sum(watts) / WINDOWS):
        return False
    return len(celsius) < WINDOWS or _range(celsius) <= TEMPERATURE_TOLERANCE


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)
