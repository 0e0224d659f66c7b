"""Checks of a comparison: may two runs be compared, is a limit for CI kept, and which mIoU belongs to an engine.

A limit is judged by the 95 % interval of the ratio. If the interval excludes a loss above it, the run passes. If
it excludes 1, a loss is shown, and the run fails if the measured loss is larger than allowed. If it contains both 1
and the limit, nothing is decided ("cannot tell"): noise must neither fail a build nor let it pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdkd_edge.benchmark.describe import device_of, status_words
from cdkd_edge.benchmark.record import VALID, BenchSummary, PowerFigures
from cdkd_edge.benchmark.statistics import Ratio
from cdkd_edge.core.errors import CompareError
from cdkd_edge.core.files import read_json

UNKNOWN = "not known"


def power_mode_of(summary: BenchSummary) -> str | None:
    """Name of a Jetson's power mode; None elsewhere, or if it could not be read."""
    mode: Any = (summary.board or {}).get("power_mode")
    name = mode.get("name") if isinstance(mode, dict) else mode
    return str(name) if name else None


def clocks_of(summary: BenchSummary) -> bool | None:
    """Whether jetson_clocks held the clocks; None elsewhere, or if it could not be read."""
    held = (summary.board or {}).get("jetson_clocks")
    return held if isinstance(held, bool) else None


def same_run(one: BenchSummary, other: BenchSummary) -> bool:
    """Whether two summaries are of the same run, in whatever folders."""
    return (one.started, one.phases, one.repeats) == (other.started, other.phases, other.repeats)


def power_of(summary: BenchSummary) -> PowerFigures | None:
    """The run's power figures, if there is a total rail."""
    power = summary.figures.power if summary.figures else None
    return power if power and power.total in power.rails else None


def why_not_quotable(name: str, summary: BenchSummary) -> list[str]:
    """Why the figures of a run may not be quoted."""
    why = ": ".join(filter(None, (status_words(summary), "; ".join(summary.verdict.reasons))))
    return [] if summary.verdict.status == VALID else [f"{name} is {why}"]


def why_not_comparable(names: tuple[str, str], one: BenchSummary, other: BenchSummary) -> list[str]:
    """Why two runs cannot be compared; empty if they can."""
    found = []
    classes = [_class_names(run.engine.labels.get("classes")) for run in (one, other)]
    if classes[0] != classes[1]:
        lists = " and ".join(", ".join(map(str, one)) or "none" for one in classes)
        found.append(f"{names[0]} and {names[1]} have different classes: {lists}")
    compared: list[tuple[str, str, str]] = []  # what, and the text of each run
    # On another kind of board, a power mode means something else.
    if one.board is not None and other.board is not None and device_of(one) == device_of(other):
        compared.append(("power mode is", power_mode_of(one) or UNKNOWN, power_mode_of(other) or UNKNOWN))
        words = {True: "on", False: "off", None: UNKNOWN}
        compared.append(("jetson_clocks is", words[clocks_of(one)], words[clocks_of(other)]))
    power, against = power_of(one), power_of(other)
    if power and against:
        compared.append(("power is that of the", power.scope, against.scope))
        if power.scope == against.scope:  # with another scope, the rails differ anyway
            compared.append(("the total rail is", str(power.total), str(against.total)))
    return found + [f"{what} {a} in {names[0]} and {b} in {names[1]}" for what, a, b in compared if a != b]


def _class_names(classes: Any) -> list[Any]:
    """Names of the classes in a manifest's labels, which may hold anything."""
    given = classes if isinstance(classes, list) else []
    return [item.get("name") if isinstance(item, dict) else item for item in given]


def other_differences(names: tuple[str, str], one: BenchSummary, other: BenchSummary) -> list[str]:
    """Differences that do not prevent a comparison, but that its reader should know."""
    pair = f"{names[1]} beside {names[0]}"
    if same_run(one, other):
        return [f"{names[0]} and {names[1]} are the same run"]
    found = []
    if device_of(one) != device_of(other):
        found.append(f"{pair}: another machine")
    elif one.machine.cores != other.machine.cores:
        found.append(f"{pair}: {other.machine.cores} cores instead of {one.machine.cores}")
    power, against = power_of(one), power_of(other)
    if power and against and power.source != against.source:  # jtop and INA3221 read the same sensor
        found.append(f"{pair}: power from {against.source} instead of {power.source}")
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


_ROUNDING = 1e-9  # a loss of exactly the limit passes in spite of rounding


@dataclass(frozen=True)
class Limits:
    """Largest loss that is allowed, relative to the baseline, 0..1; None: no limit."""

    slower: float | None = None  # loss of speed
    hungrier: float | None = None  # increase of gross energy per tile (or megapixel)


@dataclass(frozen=True)
class RunGate:
    """A run judged by a limit."""

    run: str
    quantity: Literal["speed", "energy"]
    limit: float  # allowed loss, 0..1
    outcome: Literal["pass", "fail", "cannot tell"]
    text: str


def judge_limit(run: str, quantity: Literal["speed", "energy"], limit: float, ratio: Ratio) -> RunGate:
    """Judge a ratio by a limit; CompareError if it has no interval."""
    if ratio.interval is None:
        raise CompareError(
            f"{run}: a limit for {quantity} needs an interval, and there is none: {ratio.basis}",
            hint="measure both runs with --repeat 3 or more",
        )
    low, high = ratio.interval.low, ratio.interval.high
    sign, word = (-1, "slower") if quantity == "speed" else (1, "hungrier")
    loss = sign * (ratio.value - 1)
    least, most = sorted(sign * (edge - 1) for edge in (low, high))
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
    return RunGate(run, quantity, limit, outcome, text)


def require_kept(gates: Sequence[RunGate], *, strict: bool = False) -> None:
    """Raise CompareError if a limit failed or, with ``strict``, could not be decided."""
    if failed := [gate.text for gate in gates if gate.outcome != "pass" and (strict or gate.outcome == "fail")]:
        raise CompareError("; ".join(failed))


@dataclass(frozen=True)
class Score:
    """The mIoU of an artefact."""

    sha256: str  # SHA-256 of the artefact
    mean_iou: float  # 0..1
    data: tuple[Any, ...]  # what it was measured on, and how; only scores with the same data are compared
    file: str


@dataclass(frozen=True)
class _Subject:
    sha256: str


@dataclass(frozen=True)
class _Class:
    name: str
    truth_pixels: int


@dataclass(frozen=True)
class _AccuracyFile:  # what is needed of ``accuracy.json``
    subject: _Subject
    mean_iou: float
    classes: tuple[_Class, ...]


@dataclass(frozen=True)
class _Sides:
    reference: float
    candidate: float


@dataclass(frozen=True)
class _Scores:
    mean_iou: _Sides


@dataclass(frozen=True)
class _ParityFile:  # what is needed of ``parity.json``
    reference: _Subject
    candidate: _Subject
    scores: _Scores
    classes: tuple[_Class, ...]


def read_scores(path: Path) -> list[Score]:
    """The scores in a file or in the folder of ``-o``: one from an evaluation, two from a parity; else CompareError."""
    import msgspec

    within = [path / name for name in ("accuracy.json", "parity.json") if (path / name).is_file()]
    path = within[0] if len(within) == 1 else path
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        raise CompareError(f"{path} cannot be read: {said}", hint=_HINT) from None
    of_two = isinstance(document, dict) and "candidate" in document
    found: _ParityFile | _AccuracyFile
    try:
        found = msgspec.convert(document, _ParityFile) if of_two else msgspec.convert(document, _AccuracyFile)
    except msgspec.ValidationError as error:
        raise CompareError(f"{path} does not hold the mIoU of an artefact: {error}", hint=_HINT) from None
    truth = tuple((one.name, one.truth_pixels) for one in found.classes)
    # If a class has no truth, evaluate and parity take the mean over different classes.
    data = (*truth, of_two and any(not pixels for _, pixels in truth))
    if isinstance(found, _AccuracyFile):
        pairs = [(found.subject, found.mean_iou)]
    else:
        values = found.scores.mean_iou
        pairs = [(found.reference, values.reference), (found.candidate, values.candidate)]
    if not all(0 <= value <= 1 for _, value in pairs):
        raise CompareError(f"{path}: an mIoU must be between 0 and 1", hint=_HINT)
    return [Score(subject.sha256, value, data, str(path)) for subject, value in pairs]


_HINT = "name a file that `cdkd-edge evaluate ENGINE --data DATA -o FOLDER` or `cdkd-edge parity` wrote"


def scores_by_engine(files: list[Path], engines: set[str]) -> tuple[dict[str, Score], list[str]]:
    """Scores by SHA-256 of the engine, and the files that are about none of these engines; CompareError if a file
    cannot be read, or two contradict each other about an engine.
    """
    found: dict[str, Score] = {}
    unmatched = []
    for path in files:
        own = [score for score in read_scores(path) if score.sha256 in engines]
        if not own:
            unmatched.append(str(path))
        for score in own:
            known = found.setdefault(score.sha256, score)
            if known.data != score.data or abs(known.mean_iou - score.mean_iou) > 1e-12:
                what = f"{known.file} and {score.file} contradict each other about the same engine"
                raise CompareError(what, hint="name one of them")
    return found, unmatched
