"""The section of ``report.html`` with clocks, temperatures, fan and the board's settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from cdkd_edge.benchmarks.page.markup import ABSENT, Html, joined, number, pairs, size, table, tag
from cdkd_edge.benchmarks.record import LOAD, BenchSummary

_UNITS: Final = {
    "celsius": "°C", "mhz": "MHz", "khz": "kHz", "hz": "Hz", "rpm": "rpm", "percent": "%", "watts": "W", "w": "W",
    "mv": "mV", "bytes": "B", "s": "s",
}  # fmt: skip
_NAMES: Final = {
    "cpu": "CPU", "cuda": "CUDA", "emc": "memory", "gpu": "GPU", "jetpack": "JetPack", "l4t": "L4T", "soc": "SoC",
}  # fmt: skip
_SPREAD: Final = {"min", "mean", "max"}
_IN_WORDS: Final = ("readings", "throttle_events", "power_modes", "memory_available_bytes")
"""Conditions that are no rows of the table; the number of readings says nothing that the load's length does not."""


def conditions(summary: BenchSummary) -> Html:
    """Clocks, temperatures and fan over the loads; the board's settings."""
    rows: list[tuple[str, ...]] = []
    others: list[tuple[str, str]] = []
    for section, value in summary.conditions.items():
        if section in _IN_WORDS:
            others += _in_words(section, value)
            continue
        for name, spread in value.items() if isinstance(value, dict) else ():
            if isinstance(spread, dict) and spread.keys() >= _SPREAD:
                rows.append((_quantity(section, name), *(_value(spread[key]) for key in ("min", "mean", "max"))))
            else:
                others += _flat(f"{section} {name}", spread)
        if not isinstance(value, dict):
            others += _flat(section, value)
    parts: list[Any] = []
    if rows:
        parts.append(table("Over the load phases, read once a second", ("", "minimum", "mean", "maximum"), rows))
    settings = [pair for name, value in (summary.board or {}).items() for pair in _flat(name, _named(value))]
    if settings or others:
        parts.append(pairs([*settings, *others]))
    if not any(span.name == LOAD for span in summary.phases):
        parts.append(tag("p", "There was no load: clocks and temperatures until then are in conditions.csv."))
    return joined(parts) if parts else tag("p", "This machine reports no clocks and temperatures.")


def _quantity(section: str, name: str) -> str:
    """What a row of the table is of, with its unit."""
    word = _NAMES.get(name, name)
    if section == "clocks_mhz":
        return f"{word} clock, MHz"
    if section == "clock_limits_mhz":
        return f"{word} clock, highest allowed, MHz"
    if section == "temperatures":
        return f"{name.removesuffix('-thermal')}, °C"
    return f"{section}, {_UNITS[name]}" if name in _UNITS else f"{section} {name}"  # a fan's are named by their unit


def _in_words(section: str, value: Any) -> Iterator[tuple[str, str]]:
    """Those conditions that are no curves; nothing where there was nothing to read."""
    if section == "memory_available_bytes" and isinstance(value, dict) and value.keys() >= _SPREAD:
        texts = [size(value[key]) if isinstance(value[key], int | float) else ABSENT for key in ("min", "mean", "max")]
        yield "memory available", "minimum {}, mean {}, maximum {}".format(*texts)
    elif section == "throttle_events" and isinstance(value, dict) and value:
        yield "throttling counters rose by", ", ".join(f"{name} {_value(rise)}" for name, rise in value.items())
    elif section == "power_modes" and isinstance(value, list) and value:
        yield "power modes during the loads", ", ".join(map(_value, value))


def _named(value: Any) -> Any:
    """A power mode as its name and number, also within a list."""
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    if isinstance(value, dict) and value.keys() == {"id", "name"}:
        return f"{value['name']} (id {value['id']})"
    return value


def _unit(name: str) -> tuple[str, str]:
    """A column's name in words, and the unit it ends in."""
    label, _, last = name.rpartition("_")
    label, unit = (label, _UNITS[last]) if label and last in _UNITS else (name, "")
    return " ".join(_NAMES.get(word, word) for word in label.replace("_", " ").split()), unit


def _value(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 3)
    return str(value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested names and values as rows."""
    if isinstance(value, dict) and value:
        plain = [item for item in value.values() if not isinstance(item, dict | list)]
        if len(plain) == len(value):
            yield _unit(name)[0], ", ".join(f"{key} {_value(item)}" for key, item in value.items())
            return
        for key, item in value.items():
            yield from _flat(f"{name} {key}", item)
    elif isinstance(value, list | tuple):
        yield _unit(name)[0], ", ".join(_value(item) for item in value) or "none"
    else:
        label, unit = _unit(name)
        yield label, f"{_value(value)} {unit}".strip()
