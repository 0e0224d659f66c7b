"""Compare benchmark runs: their figures, ratios to a baseline, and whether they may be compared at all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdkd_edge.benchmark import compare_checks as checks
from cdkd_edge.benchmark import statistics
from cdkd_edge.benchmark.compare_checks import Limits, RunGate, Score, judge_limit, scores_by_engine
from cdkd_edge.benchmark.describe import device_of, status_words
from cdkd_edge.benchmark.folder import SUMMARY, Run, read_run
from cdkd_edge.benchmark.record import LOAD, Figures, RailFigures
from cdkd_edge.benchmark.statistics import Figure, Interval, Latency, Ratio, Spread
from cdkd_edge.core.errors import CompareError, UsageError, printable

LEAST_SPEED = 1e-9  # least speed, tiles or megapixels per second, that a ratio is taken of
LEAST_JOULES = 1e-12  # least energy per tile or megapixel that a ratio is taken of
METHOD = (
    "95 %; ratio of two independent means on its logarithm, Welch's degrees of freedom; over repeats, or over "
    "overlapping blocks of batches where a run has one repeat (these do not show how runs differ from start to start)"
)
ONE_REPEAT = "one repeat has one integral of energy: its readings share the sensor's error and the idle level"
COMPARISON_VERSION = 1
BASELINE, SAME_RUN, NO_DIFFERENCE, CANNOT_TELL = "baseline", "same run", "no difference shown", "cannot tell"
Unit = Literal["tile", "megapixel"]


@dataclass(frozen=True)
class Energy:
    """Power and energy of the total rail."""

    source: str
    scope: str
    rail: str
    figures: RailFigures


@dataclass(frozen=True)
class Row:
    """A run in a comparison."""

    name: str
    folder: str
    status: str  # ``valid``, ``invalid`` or ``not_steady``
    verdict: str  # ``faster``, ``slower``, ``no difference shown``, ``cannot tell``, ``same run``; ``baseline``
    energy_verdict: str  # ``less energy``, ``more energy``, or another of those words; empty without power
    engine: str
    sha256: str  # SHA-256 of the engine
    runtime: str
    precision: str
    tile: int  # px
    batch: int
    device: str
    power_mode: str | None
    repeats: int
    tiles_per_second: Figure
    tiles_per_second_interval: Interval | None  # 95 %, over repeats, or over blocks of batches of a single repeat
    interval_basis: str  # what the interval was computed from, or why there is none
    megapixels_per_second: Figure
    latency_ms: Latency
    energy: Energy | None
    energy_reason: str  # why there is no energy; empty if there is
    mean_iou: float | None  # 0..1
    modelled_share: float | None  # measured speed divided by the modelled bound
    speed: Ratio | None  # speed relative to the baseline; None for the baseline itself
    gross_energy: Ratio | None  # energy including idle, relative to the baseline; None if one of the two has no power
    net_energy: Ratio | None  # energy without idle, relative to the baseline


@dataclass(frozen=True)
class Comparison:
    """Runs compared with a baseline."""

    baseline: int  # index of the run that the others are compared with
    unit: Unit  # of the ratios: megapixels if the runs have tiles of different sides
    rows: tuple[Row, ...]
    not_comparable: tuple[str, ...]  # why the runs are not comparable; empty unless the comparison was forced
    notes: tuple[str, ...]
    gates: tuple[RunGate, ...]
    method: str  # how the intervals of the ratios were computed
    comparison_version: int = COMPARISON_VERSION


def compare_runs(
    folders: Sequence[Path],
    *,
    baseline: int = 0,
    force: bool = False,
    limits: Limits = Limits(),
    evaluations: Sequence[Path] = (),
) -> Comparison:
    """Compare runs with one of them.

    Args:
        folders: folders of at least two runs, or their ``summary.json``.
        baseline: index of the run that the others are compared with.
        force: compare runs that are not comparable; :attr:`Comparison.not_comparable` then says why they are not.
        limits: the losses that are allowed; the outcome is in :attr:`Comparison.gates`.
        evaluations: files with the mIoU of engines, matched by the engine's SHA-256.

    Raises:
        BenchError, UsageError: a folder is not a run, or is damaged; there are fewer than two runs.
        CompareError: a run has no figures, the runs are not comparable (unless forced), a limit cannot be judged, or
            an evaluation cannot be read.
    """
    if len(folders) < 2:
        within = sorted(run.parent for folder in folders for run in folder.glob(f"*/{SUMMARY}"))
        raise UsageError(
            f"a comparison needs at least two runs, got {len(folders)}",
            hint=f"cdkd-edge compare {' '.join(shlex.quote(str(run)) for run in within[-4:]) or 'RUN RUN...'}",
        )
    if not 0 <= baseline < len(folders):
        raise CompareError(f"there is no run {baseline + 1}: {len(folders)} runs were given")
    runs = [read_run(folder.parent if folder.name == SUMMARY else folder, curves=False) for folder in folders]
    names = _names([run.folder for run in runs])
    named = list(zip(names, runs, strict=True))
    for name, run in named:
        _require_figures(name, run)
    scores, unmatched = scores_by_engine(list(evaluations), {run.summary.engine.artefact.sha256 for run in runs})
    reasons = [text for name, run in named for text in checks.why_not_quotable(name, run.summary)]
    notes = []
    for name, run in named:
        notes += [f"{name}: {warning}" for warning in run.summary.verdict.warnings]
        if run is not runs[baseline]:
            pair = (names[baseline], name), runs[baseline].summary, run.summary
            reasons += checks.why_not_comparable(*pair)
            notes += checks.other_differences(*pair)
    own_scores = [scores.get(run.summary.engine.artefact.sha256) for run in runs]
    reasons += _scores_on_other_data([(name, own) for name, own in zip(names, own_scores, strict=True) if own])
    notes += [f"{file} is about another engine than these (by SHA-256)" for file in unmatched]
    if reasons and not force:
        raise CompareError(
            f"not comparable: {'; '.join(reasons)}",
            hint="measure again under the same conditions, or show them side by side with --force",
        )
    unit: Unit = "tile"
    if len({run.summary.engine.tile for run in runs}) > 1:
        unit = "megapixel"
        notes.append(
            "tiles have different sides, so ratios are per megapixel; overlaps cost small tiles more than large ones"
        )
    rows = [
        _row(name, run, None if run is runs[baseline] else runs[baseline], unit, score)
        for (name, run), score in zip(named, own_scores, strict=True)
    ]
    gates = [gate for row in rows if row.verdict != BASELINE for gate in _gates(row, limits)]
    return Comparison(baseline, unit, tuple(rows), tuple(reasons), tuple(notes), tuple(gates), METHOD)


def _names(folders: Sequence[Path]) -> list[str]:
    """Printable names of folders; their paths if names are not unique."""
    short = [Path(os.path.realpath(folder)).name for folder in folders]
    chosen = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    chosen = [
        f"{name} ({chosen[:index].count(name) + 1})" if name in chosen[:index] else name
        for index, name in enumerate(chosen)
    ]
    return [printable(name) for name in chosen]


def _require_figures(name: str, run: Run) -> None:
    figures, verdict = run.summary.figures, run.summary.verdict
    if figures is None:
        raise CompareError(
            f"{name} has no figures: it is {status_words(run.summary)}: {'; '.join(verdict.reasons)}",
            hint="measure again; `cdkd-edge bench --keep-invalid` keeps the figures of an invalid run",
        )
    if min(figures.tiles_per_second.mean, figures.megapixels_per_second.mean) < LEAST_SPEED:
        raise CompareError(f"{name} has a speed of 0 tiles/s", hint="measure again with `cdkd-edge bench`")


def _scores_on_other_data(scores: Sequence[tuple[str, Score]]) -> list[str]:
    return [
        f"mIoU of {scores[0][0]} and {name} were measured on different data ({scores[0][1].file}, {score.file})"
        for name, score in scores[1:]
        if score.data != scores[0][1].data
    ]


def _row(name: str, run: Run, baseline: Run | None, unit: Unit, score: Score | None) -> Row:
    summary, figures = run.summary, _figures(run)
    engine, bound = summary.engine, summary.roofline
    spread, why_not = _speed_spread(run)
    power = checks.power_of(summary)
    speed = gross = net = None
    verdict, energy_verdict = BASELINE, BASELINE if power else ""
    if baseline is not None:
        speed = _speed_ratio(run, baseline)
        gross, net = (_energy_ratio(run, baseline, f"{kind}_joules_per_{unit}") for kind in ("gross", "net"))
        verdict = _word(speed, ("slower", "faster"))
        energy_verdict = _word(gross, ("less energy", "more energy")) if gross else ""
        if checks.same_run(summary, baseline.summary):
            verdict, energy_verdict = SAME_RUN, SAME_RUN if gross else ""
    energy = Energy(power.source, power.scope, power.total, power.rails[power.total]) if power and power.total else None
    no_total = "there is no total rail" if figures.power else figures.power_reason
    return Row(
        name=name, folder=str(run.folder), status=summary.verdict.status, verdict=verdict,
        energy_verdict=energy_verdict, engine=engine.name, sha256=engine.artefact.sha256, runtime=engine.runtime,
        precision=engine.precision, tile=engine.tile, batch=engine.batch, device=device_of(summary),
        power_mode=checks.power_mode_of(summary), repeats=len(figures.tiles_per_second.values),
        tiles_per_second=figures.tiles_per_second,
        tiles_per_second_interval=figures.tiles_per_second.interval or (spread.interval if spread else None),
        interval_basis=spread.basis if spread else why_not,
        megapixels_per_second=figures.megapixels_per_second, latency_ms=figures.latency_ms,
        energy=energy, energy_reason="" if energy else no_total,
        mean_iou=score.mean_iou if score else None, modelled_share=bound.share_of_bound if bound else None,
        speed=speed, gross_energy=gross, net_energy=net,
    )  # fmt: skip


def _figures(run: Run) -> Figures:
    figures = run.summary.figures
    assert figures is not None  # _require_figures
    return figures


def _speed_spread(run: Run) -> tuple[Spread | None, str]:
    """Spread of the speed, and why there is none."""
    rates = _figures(run).tiles_per_second
    if len(rates.values) > 1:
        return statistics.spread_of_repeats(rates), "a speed of 0 tiles/s"
    batches = [batch for batch in run.tiles if batch.phase == LOAD]
    if len(batches) * run.summary.engine.batch != sum(repeat.tiles for repeat in run.summary.repeats):
        return None, "tiles.csv and summary.json do not belong to the same run"
    why_not = f"one repeat of {len(batches)} batches; {statistics.MIN_BATCHES} are needed"
    return statistics.spread_of_batches(rates.mean, [batch.start for batch in batches]), why_not


def _speed_ratio(run: Run, baseline: Run) -> Ratio:
    """Ratio of megapixels per second; with equal tiles it is that of tiles per second."""
    (spread, why_not), (other, other_why_not) = _speed_spread(run), _speed_spread(baseline)
    value, against = (_figures(one).megapixels_per_second.mean for one in (run, baseline))
    return statistics.ratio_of(value, spread, against, other, other_why_not if spread else why_not)


def _energy_ratio(run: Run, baseline: Run, quantity: str) -> Ratio | None:
    powers = [checks.power_of(one.summary) for one in (run, baseline)]
    found: list[Figure] = [getattr(power.rails[power.total], quantity) for power in powers if power and power.total]
    if len(found) < 2 or min(figure.mean for figure in found) < LEAST_JOULES:
        return None  # a net energy near zero: its sign is noise
    one, other = ((figure.mean, statistics.spread_of_repeats(figure)) for figure in found)
    return statistics.ratio_of(*one, *other, ONE_REPEAT)


def _word(ratio: Ratio, words: tuple[str, str]) -> str:
    """The verdict by an interval: below 1, above 1, or neither."""
    span = ratio.interval
    if span is None:
        return CANNOT_TELL
    return words[0] if span.high < 1 else words[1] if span.low > 1 else NO_DIFFERENCE


def _gates(row: Row, limits: Limits) -> list[RunGate]:
    asked = limits.slower is not None or limits.hungrier is not None
    if asked and row.verdict == SAME_RUN:
        raise CompareError(f"{row.name} is the baseline's own run: no limit can be judged", hint="name another run")
    if limits.hungrier is not None and row.gross_energy is None:
        raise CompareError(
            f"{row.name} has no energy to judge by a limit: {row.energy_reason or 'the baseline has none'}",
            hint="measure both with `cdkd-edge bench --power-trace`",
        )
    found = []
    if limits.slower is not None and row.speed:
        found.append(judge_limit(row.name, "speed", limits.slower, row.speed))
    if limits.hungrier is not None and row.gross_energy:
        found.append(judge_limit(row.name, "energy", limits.hungrier, row.gross_energy))
    return found
