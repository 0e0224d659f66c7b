"""What ``cdkd-edge compare`` shows: in the terminal, as data, and as Markdown for an issue."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.table import Listing, Report, plain
from cdkd_edge.core.errors import printable

if TYPE_CHECKING:
    from cdkd_edge.bench.compare.ratio import Ratio
    from cdkd_edge.bench.compare.result import Comparison, Row
    from cdkd_edge.bench.statistics import Figure, Interval

NONE = "–"


@dataclass(frozen=True)
class ComparisonReport(Report):
    """A report with several tables of runs, each with its title."""

    tables: tuple[tuple[str, Listing], ...] = ()

    def print(self) -> None:
        """Print all tables to stdout."""
        super().print()
        for title, listing in self.tables:
            print()
            Report(title, (), {}, listing).print()

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [f"## {_escaped(self.title)}", ""]
        lines += [f"- **{name}**: {_escaped(value)}" for name, value in self.rows]
        for title, listing in self.tables:
            lines += ["", f"### {_escaped(title)}", "", _line(listing.columns)]
            lines.append("|---|" + "---:|" * (len(listing.columns) - 1))
            lines += map(_line, listing.rows)
        return "\n".join(lines) + "\n"


def describe_comparison(found: Comparison) -> ComparisonReport:
    """``cdkd-edge compare``."""
    baseline = found.rows[found.baseline]
    rows = [
        *(("NOT COMPARABLE", text) for text in found.not_comparable),
        ("baseline", baseline.name),
        *(("note", text) for text in found.notes),
        ("intervals", f"{found.method}. Speed: {_bases(found)}"),
        *(
            [("energy", "no intervals: one repeat has one integral of energy; measure with --repeat 3 or more")]
            if any(row.gross_energy and not row.gross_energy.interval for row in found.rows)
            else []
        ),
        *((f"limit: {gate.outcome}", gate.text) for gate in found.gates),
    ]
    tables = [("speed (engine alone)", _speed_table(found))]
    if any(row.energy for row in found.rows):
        tables.append(("power and energy (net: load without idle; gross: with it)", _energy_table(found)))
    tables.append(("what ran", _identity_table(found)))
    return ComparisonReport(f"{len(found.rows)} runs beside each other", tuple(rows), plain(found), None, tuple(tables))


def _speed_table(found: Comparison) -> Listing:
    columns = ("run", "verdict", "tiles/s (95 %)", "ratio (95 %)", "MP/s", "p50 ms", "p99 ms")
    return Listing(columns, tuple(_speed_row(row, found.rows[found.baseline]) for row in found.rows))


def _speed_row(row: Row, baseline: Row) -> tuple[str, ...]:
    # Blocks of one repeat show what happened within it, not what another start would have given.
    weak = row.speed and row.speed.interval and 1 in (row.repeats, baseline.repeats)
    verdict = f"{row.verdict}, one repeat" if weak else row.verdict
    return (
        row.name,
        verdict,
        _measured(row.tiles_per_second.mean, row.tiles_per_second_interval),
        _ratio(row.speed),
        significant(row.megapixels_per_second.mean, 3),
        significant(row.latency_ms.p50),
        NONE if row.latency_ms.p99 is None else significant(row.latency_ms.p99),
    )


def _energy_table(found: Comparison) -> Listing:
    columns = (
        "run", "verdict", "rail", "idle W", "load W", "net W", "gross J/tile", "net J/tile", "gross J/MP", "net J/MP",
        "gross ratio (95 %)", "net ratio (95 %)",
    )  # fmt: skip
    return Listing(columns, tuple(_energy_row(row) for row in found.rows))


def _energy_row(row: Row) -> tuple[str, ...]:
    if row.energy is None:
        return (row.name, f"not measured: {row.energy_reason}", *[NONE] * 10)
    rail = row.energy.figures
    watts: tuple[Figure, ...] = (rail.idle_watts, rail.load_watts, rail.net_watts)
    joules = (
        rail.gross_joules_per_tile,
        rail.net_joules_per_tile,
        rail.gross_joules_per_megapixel,
        rail.net_joules_per_megapixel,
    )
    return (
        row.name,
        row.energy_verdict or NONE,
        f"{row.energy.rail} ({row.energy.scope})",
        *(f"{figure.mean:.2f}" for figure in watts),
        *(significant(figure.mean, 3) for figure in joules),
        _ratio(row.gross_energy),
        _ratio(row.net_energy),
    )


def _identity_table(found: Comparison) -> Listing:
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
    return Listing(columns, tuple(_identity_row(row) for row in found.rows))


def _identity_row(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.status,
        f"{row.engine} ({row.sha256[:8]})",
        row.runtime,
        row.precision,
        f"{row.tile} px" + (f" x {row.batch}" if row.batch > 1 else ""),
        row.device,
        row.power_mode or NONE,
        NONE if row.mean_iou is None else f"{100 * row.mean_iou:.2f} %",
        NONE if row.modelled_share is None else f"{100 * row.modelled_share:.1f} %",
    )


def _measured(value: float, interval: Interval | None) -> str:
    text = significant(value)
    return text if interval is None else f"{text} ({significant(interval.low)} .. {significant(interval.high)})"


def significant(value: float, digits: int = 4) -> str:
    """In so many digits, zeros at the end included: 7.60 beside 7.58. Whole numbers of more digits stay whole."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 9.9996 is 10.00
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return NONE
    text = f"x {ratio.value:.3f}"
    return text if ratio.interval is None else f"{text} ({ratio.interval.low:.3f} .. {ratio.interval.high:.3f})"


def _bases(found: Comparison) -> str:
    """What the intervals of the runs' speeds were taken from, each said once."""
    kinds: dict[str, list[str]] = {}
    for row in found.rows:
        kinds.setdefault(row.interval_basis, []).append(row.name)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(names)}: {basis}" for basis, names in kinds.items())


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", printable(" ".join(text.split())))
