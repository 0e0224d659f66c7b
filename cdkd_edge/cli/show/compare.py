"""What ``cdkd-edge compare`` shows: in the terminal, as data, and as Markdown for an issue."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.table import Listing, Report, plain
from cdkd_edge.core.errors import printable
from cdkd_edge.core.numbers import significant

if TYPE_CHECKING:
    from cdkd_edge.bench.compare.compare import Comparison, Row
    from cdkd_edge.bench.statistics import Interval, Ratio

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
        significant(row.latency_ms.p50, 4),
        significant(row.latency_ms.p99, 4),
    )


def _energy_table(found: Comparison) -> Listing:
    from cdkd_edge.bench.describe import RAIL_FIGURES

    figures = (f"{one.title} {one.unit}" for one in RAIL_FIGURES)
    columns = ("run", "verdict", "rail", *figures, "gross ratio (95 %)", "net ratio (95 %)")
    return Listing(columns, tuple(_energy_row(row) for row in found.rows))


def _energy_row(row: Row) -> tuple[str, ...]:
    from cdkd_edge.bench.describe import RAIL_FIGURES

    if row.energy is None:
        return (row.name, f"not measured: {row.energy_reason}", *[NONE] * (len(RAIL_FIGURES) + 3))
    rail = row.energy.figures
    return (
        row.name,
        row.energy_verdict or NONE,
        f"{row.energy.rail} ({row.energy.scope})",
        *(significant(getattr(rail, one.path).mean, 4) for one in RAIL_FIGURES),
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
    text = significant(value, 4)
    return text if interval is None else f"{text} ({significant(interval.low, 4)} .. {significant(interval.high, 4)})"


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
