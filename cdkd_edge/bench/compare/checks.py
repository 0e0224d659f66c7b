"""What keeps two runs from being compared, and what their reader should know.

Gates for CI: is a run slower, or does it need more energy, than is allowed?

An interval decides three ways. If it excludes the limit, the run passes. If it excludes 1, a loss is shown, and the run
fails where the measured loss is larger than allowed. An interval that holds both 1 and the limit decides nothing: noise
must not fail a build, nor let one pass unnoticed, so that has a word of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cdkd_edge.bench.compare.ratio import Ratio
from cdkd_edge.bench.record import VALID, BenchSummary, PowerFigures
from cdkd_edge.core.errors import CompareError

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


_ROUNDING = 1e-9
"""A loss of exactly the limit passes, whatever the last bit says."""


@dataclass(frozen=True)
class Limits:
    """Largest loss that is allowed, relative to the baseline, 0..1; None: any."""

    slower: float | None = None
    """Of speed."""
    hungrier: float | None = None
    """Of gross energy per tile (or megapixel): how much more."""


@dataclass(frozen=True)
class Gate:
    """What a limit says of a run."""

    run: str
    quantity: Literal["speed", "energy"]
    limit: float
    """Loss that is allowed, 0..1."""
    outcome: Literal["pass", "fail", "cannot tell"]
    text: str


def judge(run: str, quantity: Literal["speed", "energy"], limit: float, ratio: Ratio) -> Gate:
    """Hold a ratio against a limit.

    Raises:
        CompareError: without an interval nothing can ever be decided.
    """
    if ratio.interval is None:
        raise CompareError(
            f"{run}: the {quantity} cannot be held against a limit: {ratio.basis}",
            hint="measure both runs with --repeat 3 or more",
        )
    low, high = ratio.interval.low, ratio.interval.high
    if quantity == "speed":
        loss, least, most, word = 1 - ratio.value, 1 - high, 1 - low, "slower"
    else:
        loss, least, most, word = ratio.value - 1, low - 1, high - 1, "hungrier"
    allowed = f"{100 * limit:.3g} %"
    outcome: Literal["pass", "fail", "cannot tell"]
    if most <= limit + _ROUNDING:
        outcome, said = "pass", f"more than {allowed} {word} is excluded"
    elif least > 0 and loss > limit + _ROUNDING:
        outcome, said = "fail", f"{100 * loss:.2g} % {word}, more than {allowed}"
    elif least > 0:
        outcome, said = "pass", f"{100 * loss:.2g} % {word}, not more than {allowed}"
    else:
        outcome, said = "cannot tell", f"{allowed} {word} is neither shown nor excluded; measure with more --repeat"
    text = f"{run}: {quantity} x {ratio.value:.4g} ({low:.4g} .. {high:.4g}): {said}"
    return Gate(run, quantity, limit, outcome, text)


def require_kept(gates: Sequence[Gate], *, strict: bool = False) -> None:
    """Make sure that no limit was passed; with ``strict``, that each was shown to be kept.

    Raises:
        CompareError: one was not.
    """
    failed = [gate.text for gate in gates if gate.outcome == "fail" or (strict and gate.outcome == "cannot tell")]
    if failed:
        raise CompareError("; ".join(failed))
