"""``cdkd-edge compare``: benchmark runs beside each other, in the terminal, as data, and as Markdown for an issue."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Argument, BadParameter, Option

from cdkd_edge.cli.options import JSON
from cdkd_edge.cli.report import Listing, Report, Rows, new_folder, plain, say, write_json
from cdkd_edge.core.errors import printable
from cdkd_edge.core.numbers import ABSENT, estimate, percent, significant

if TYPE_CHECKING:
    from cdkd_edge.benchmark.compare import Comparison, Row
    from cdkd_edge.benchmark.statistics import Ratio


def compare(
    runs: list[Path] = Argument(..., metavar="RUN RUN...", help="Folders that `cdkd-edge bench` wrote."),
    baseline: str = Option("first", help="The run to compare with: first, or its number from 1.", metavar="N"),
    force: bool = Option(False, help="Show runs that are not comparable; all output then says why not."),
    fail_if_slower: str | None = Option(
        None, help="Exit with 20 if a run is slower by more than this, e.g. 5%.", metavar="SHARE"
    ),
    fail_if_hungrier: str | None = Option(
        None, help="Exit with 20 if a run needs this much more gross energy per tile, e.g. 5%.", metavar="SHARE"
    ),
    strict: bool = Option(False, help="Fail also where the intervals neither show nor exclude such a loss."),
    evaluation: list[Path] | None = Option(
        None,
        help="Folder of `evaluate -o` or `parity -o`, or the JSON file in it, for mIoU. Repeatable.",
        metavar="FILE",
    ),
    output: Path | None = Option(None, "--output", "-o", help="Folder for comparison.json, .md and pareto.png."),
    as_json: bool = JSON,
) -> None:
    """Compare benchmark runs: speed, energy, mIoU, ratios with 95 % intervals.

    Exits with 20 if the runs are not comparable, or if one loses more than allowed.
    """
    from cdkd_edge.benchmark.compare import compare_runs
    from cdkd_edge.benchmark.compare_checks import Limits, require_kept

    limits = Limits(
        slower=_share(fail_if_slower, "--fail-if-slower"), hungrier=_share(fail_if_hungrier, "--fail-if-hungrier")
    )
    if strict and limits == Limits():
        raise BadParameter("a limit is needed: --fail-if-slower or --fail-if-hungrier", param_hint="--strict")
    found = compare_runs(
        runs, baseline=_index(baseline, len(runs)), force=force, limits=limits, evaluations=evaluation or ()
    )
    report = describe_comparison(found)
    with new_folder(output) as place:
        if place:
            from cdkd_edge.benchmark.pareto import write_picture
            from cdkd_edge.core.files import write_text

            write_picture(place / "pareto.png", found)
            write_text(place / "comparison.md", markdown(report))
            write_json(place / "comparison.json", report.data)
    report.show(as_json)
    for gate in found.gates:
        if gate.outcome == "cannot tell" and not strict:
            say(f"warning: {gate.text}")
    require_kept(found.gates, strict=strict)


def _share(text: str | None, option: str) -> float | None:
    """A loss in 0..1, from ``5%`` or ``0.05``."""
    if text is None:
        return None
    number, sign, rest = text.strip().partition("%")
    try:
        value = math.nan if rest else float(number) / (100 if sign else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise BadParameter(f"per cent or a share below 1, e.g. 5% or 0.05, not {text!r}", param_hint=option)
    return value


def _index(text: str, runs: int) -> int:
    """An index from ``first`` or a number that begins at 1."""
    number = 1 if text == "first" else int(text) if text.isdecimal() else 0
    if not 1 <= number <= runs:
        raise BadParameter(f"first, or a number from 1 to {runs}, not {text!r}", param_hint="--baseline")
    return number - 1


def describe_comparison(found: Comparison) -> Report:
    """Three tables: speed, energy, what ran."""
    from cdkd_edge.benchmark.describe import RAIL_FIGURES

    baseline = found.rows[found.baseline]
    rows: Rows = [
        *(("NOT COMPARABLE", text) for text in found.not_comparable),
        ("baseline", baseline.name),
        *(("note", text) for text in found.notes),
        ("intervals", f"{found.method}. Speed: {_interval_bases(found)}"),
    ]
    if any(row.gross_energy and not row.gross_energy.interval for row in found.rows):
        rows.append(("energy", "no intervals: one repeat has one integral of energy; measure with --repeat 3 or more"))
    rows += [(f"limit: {gate.outcome}", gate.text) for gate in found.gates]
    columns: tuple[str, ...] = ("run", "verdict", "tiles/s (95 %)", "ratio (95 %)", "MP/s", "p50 ms", "p99 ms")
    speeds = tuple(_speed_row(row, baseline) for row in found.rows)
    listings = [Listing(columns, speeds, "speed (engine alone)")]
    if any(row.energy for row in found.rows):
        figures = [f"{one.title} {one.unit}" for one in RAIL_FIGURES]
        columns = ("run", "verdict", "rail", *figures, "gross ratio (95 %)", "net ratio (95 %)")
        title = "power and energy (net: load without idle; gross: with it)"
        listings.append(Listing(columns, tuple(map(_energy_row, found.rows)), title))
    columns = (
        "run",
        "status",
        "engine",
        "runtime",
        "precision",
        "tile",
        "device",
        "power mode",
        "mIoU",
        "of the bound",
    )
    listings.append(Listing(columns, tuple(map(_identity_row, found.rows)), "what ran"))
    return Report(f"{len(found.rows)} runs beside each other", rows, plain(found), tuple(listings))


def _speed_row(row: Row, baseline: Row) -> tuple[str, ...]:
    # Blocks of one repeat show what happened within it, not what another start would have given.
    weak = row.speed and row.speed.interval and 1 in (row.repeats, baseline.repeats)
    span = row.tiles_per_second_interval
    speed = estimate(row.tiles_per_second.mean, *((span.low, span.high) if span else ()), digits=4)
    rest = significant(row.megapixels_per_second.mean), significant(row.latency_ms.p50, 4)
    verdict = f"{row.verdict}, one repeat" if weak else row.verdict
    return (row.name, verdict, speed, _ratio(row.speed), *rest, significant(row.latency_ms.p99, 4))


def _energy_row(row: Row) -> tuple[str, ...]:
    from cdkd_edge.benchmark.describe import RAIL_FIGURES

    if row.energy is None:
        return (row.name, f"not measured: {row.energy_reason}", *[ABSENT] * (len(RAIL_FIGURES) + 3))
    rail = f"{row.energy.rail} ({row.energy.scope})"
    figures = (significant(getattr(row.energy.figures, one.path).mean, 4) for one in RAIL_FIGURES)
    return (row.name, row.energy_verdict or ABSENT, rail, *figures, _ratio(row.gross_energy), _ratio(row.net_energy))


def _identity_row(row: Row) -> tuple[str, ...]:
    tile = f"{row.tile} px" + (f" x {row.batch}" if row.batch > 1 else "")
    what = (row.name, row.status, f"{row.engine} ({row.sha256[:8]})", row.runtime, row.precision, tile)
    return (*what, row.device, row.power_mode or ABSENT, percent(row.mean_iou, 2), percent(row.modelled_share))


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ABSENT
    text = f"x {ratio.value:.3f}"
    return text if ratio.interval is None else f"{text} ({ratio.interval.low:.3f} .. {ratio.interval.high:.3f})"


def _interval_bases(found: Comparison) -> str:
    """What the intervals of the runs' speeds were taken from; each basis is named once."""
    kinds: dict[str, list[str]] = {}
    for row in found.rows:
        kinds.setdefault(row.interval_basis, []).append(row.name)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(names)}: {basis}" for basis, names in kinds.items())


def markdown(report: Report) -> str:
    """A report as Markdown."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\|`*<>\[\]])", r"\\\1", printable(" ".join(text.split())))

    def row(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(map(escaped, cells)) + " |"

    lines = [f"## {escaped(report.title)}", ""]
    lines += [f"- **{name}**: {escaped(value)}" for name, value in report.rows]
    for listing in report.listings:
        lines += ["", f"### {escaped(listing.title)}", "", row(listing.columns)]
        lines += ["|---|" + "---:|" * (len(listing.columns) - 1), *map(row, listing.rows)]
    return "\n".join(lines) + "\n"
