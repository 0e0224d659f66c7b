"""What keeps two runs from being compared, and what their reader should know."""

from __future__ import annotations

from typing import Any

from cdkd_edge.benchmarks.record import VALID, BenchSummary, PowerFigures

UNKNOWN = "not known"


def device_of(summary: BenchSummary) -> str:
    """The machine in a few words: board or processor, and the GPU if the engine ran on one."""
    board = (summary.board or {}).get("model") or summary.machine.board or summary.machine.cpu
    build = summary.engine.tensorrt
    gpu = build.gpu if build else None
    return f"{board}, {gpu}" if gpu and gpu not in str(board) else str(board)


def power_mode_of(summary: BenchSummary) -> str | None:
    """Name of the power mode of a Jetson; None elsewhere or where it could not be read."""
    mode: Any = (summary.board or {}).get("power_mode")
    name = mode.get("name") if isinstance(mode, dict) else mode
    return str(name) if name else None


def clocks_of(summary: BenchSummary) -> bool | None:
    """Whether jetson_clocks held the clocks; None elsewhere or where it could not be read."""
    held = (summary.board or {}).get("jetson_clocks")
    return held if isinstance(held, bool) else None


def same_run(one: BenchSummary, other: BenchSummary) -> bool:
    """Whether two summaries are of one run, wherever their folders lie."""
    return (one.started, one.phases, one.repeats) == (other.started, other.phases, other.repeats)


def power_of(summary: BenchSummary) -> PowerFigures | None:
    """The run's power figures, where a rail contains the others."""
    power = summary.figures.power if summary.figures else None
    return power if power and power.total in power.rails else None


def status_objections(name: str, summary: BenchSummary) -> list[str]:
    """Why the figures of a run may not be quoted."""
    verdict = summary.verdict
    if verdict.status == VALID:
        return []
    return [
        f"{name} is {verdict.status.replace('_', ' ')}" + (f": {'; '.join(verdict.reasons)}" if verdict.reasons else "")
    ]


def objections(names: tuple[str, str], one: BenchSummary, other: BenchSummary) -> list[str]:
    """Why two runs cannot be compared; empty if they can."""
    found = []
    classes = [_class_names(run.engine.labels.get("classes")) for run in (one, other)]
    if classes[0] != classes[1]:
        found.append(f"{names[0]} and {names[1]} have other classes: {_listed(classes[0])} and {_listed(classes[1])}")
    found += _setting_objections(names, one, other)
    powers = power_of(one), power_of(other)
    if powers[0] and powers[1]:
        for what in ("scope", "total"):
            values = [str(getattr(power, what)) for power in powers]
            if values[0] != values[1]:
                title = {"scope": "power was measured of the", "total": "total rail is"}
                found.append(f"{title[what]} {values[0]} in {names[0]} and {values[1]} in {names[1]}")
                break  # another scope has other rails and sources as a matter of course
    return found


def _class_names(classes: Any) -> list[Any]:
    """Of the labels in a manifest, which anybody may have written."""
    if not isinstance(classes, list):
        return []
    return [item.get("name") if isinstance(item, dict) else item for item in classes]


def _setting_objections(names: tuple[str, str], one: BenchSummary, other: BenchSummary) -> list[str]:
    """Power mode and clocks, of the same kind of board: a mode of that name is something else on another one."""
    if one.board is None or other.board is None or device_of(one) != device_of(other):
        return []
    found = []
    modes = [power_mode_of(run) for run in (one, other)]
    if modes[0] != modes[1]:
        found.append(f"power mode is {modes[0] or UNKNOWN} in {names[0]} and {modes[1] or UNKNOWN} in {names[1]}")
    held = [{True: "on", False: "off", None: UNKNOWN}[clocks_of(run)] for run in (one, other)]
    if held[0] != held[1]:
        found.append(f"jetson_clocks is {held[0]} in {names[0]} and {held[1]} in {names[1]}")
    return found


def remarks(names: tuple[str, str], one: BenchSummary, other: BenchSummary) -> list[str]:
    """What else differs, besides the engines: allowed, and to be known."""
    pair = f"{names[1]} beside {names[0]}"
    if same_run(one, other):
        return [f"{names[0]} and {names[1]} are the same run"]
    found = []
    if device_of(one) != device_of(other):
        found.append(f"{pair}: other machine")
    elif one.machine.cores != other.machine.cores:
        found.append(f"{pair}: {other.machine.cores} cores instead of {one.machine.cores}")
    powers = power_of(one), power_of(other)
    if powers[0] and powers[1] and powers[0].source != powers[1].source:  # jtop and INA3221 read the same sensor
        found.append(f"{pair}: power from {powers[1].source} instead of {powers[0].source}")
    if one.engine.batch != other.engine.batch:
        found.append(f"{pair}: latencies are of batches of {other.engine.batch} tiles instead of {one.engine.batch}")
    if one.protocol.preset != other.protocol.preset:
        found.append(f"{pair}: protocol {other.protocol.preset} instead of {one.protocol.preset}")
    changed = [
        f"{name} {other.libraries[name]} instead of {version}"
        for name, version in one.libraries.items()
        if other.libraries.get(name, version) != version
    ]
    if one.tool != other.tool:
        changed.append(f"{other.tool} instead of {one.tool}")
    return found + ([f"{pair}: {', '.join(changed)}"] if changed else [])


def _listed(names: list[Any]) -> str:
    return ", ".join(map(str, names)) or "none"
