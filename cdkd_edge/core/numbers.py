"""How numbers are printed, in the terminal, in reports and in messages.

Measured values get significant digits, so that small and large ones say equally much. Sizes are decimal (1 kB is
1000 bytes), as files and data sheets give them.
"""

from __future__ import annotations

import math

ABSENT = "–"  # printed for a value that there is not
DECIMALS = 12  # that are printed at most: what is smaller is the rounding error of a difference


def significant(value: float | None, digits: int = 3) -> str:
    """A value in so many significant digits: ``7.60``, ``0.0123``, ``1234``; whole digits are never dropped."""
    if value is None:
        return ABSENT
    value = _without_noise(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.996 is 10.0
    return f"{value:.{min(DECIMALS, max(0, digits - 1 - exponent))}f}"


def _without_noise(value: float) -> float:
    return round(value, DECIMALS) + 0.0  # -0 becomes 0


def size(count: float | None) -> str:
    """A number of bytes: ``512 B``, ``12.3 MB``, ``1.20 GB``."""
    if count is None:
        return ABSENT
    for unit, factor in (("B", 1), ("kB", 1e3), ("MB", 1e6)):
        if abs(count) < 999.5 * factor:
            return f"{count:.0f} B" if unit == "B" else f"{significant(count / factor)} {unit}"
    return f"{significant(count / 1e9)} GB"


def percent(share: float | None, decimals: int = 1) -> str:
    """A share of 1 in percent: ``93.4 %``. Only all and nothing are printed as 100 and 0, so 0.99996 is 99.996 %."""
    if share is None or math.isnan(share):
        return ABSENT
    text = f"{100 * share:.{decimals}f}"
    while float(text) in (0.0, 100.0) and share not in (0, 1) and decimals < 6:
        decimals += 1
        text = f"{100 * share:.{decimals}f}"
    return f"{text} %"


def duration(seconds: float | None) -> str:
    """A time: ``12.3 ms``, ``4.56 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 0.9995:
        return f"{significant(seconds * 1e3)} ms"
    if seconds < 99.95:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def estimate(value: float, low: float | None = None, high: float | None = None, *, digits: int = 3) -> str:
    """A value and its interval: ``12.41 ± 0.05``, or ``1.20 (1.12 .. 1.45)`` where it is not in the middle.

    The interval has two significant digits, and the value as many decimals; without an interval, or with an empty
    one, the value has ``digits`` significant digits.
    """
    value = _without_noise(value)
    half = 0.0 if low is None or high is None else _without_noise((high - low) / 2)
    if low is None or high is None or half <= 0 or not math.isfinite(half):
        return significant(value, digits)
    decimals = min(DECIMALS, max(0, -int(f"{half:.1e}".partition("e")[2]) + 1))
    if abs((low + high) / 2 - value) <= 0.1 * half:
        return f"{value:.{decimals}f} ± {half:.{decimals}f}"
    return f"{value:.{decimals}f} ({low:.{decimals}f} .. {high:.{decimals}f})"
