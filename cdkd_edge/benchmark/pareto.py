"""The picture of a comparison: speed against energy or mIoU, with the runs that no other run beats in both.

Drawn without pyplot, which would keep figures alive and choose a display.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdkd_edge.benchmark.compare import Comparison, Row
from cdkd_edge.benchmark.statistics import Interval
from cdkd_edge.core.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""M. Okabe and K. Ito, Color Universal Design: clear to colour-blind readers. Yellow is left out: too pale on white."""
MARKERS = "osD^vPX<>"
_INK, _GREY, _PALE, _ALERT = "#333333", "#767676", "#B8B8B8", "#B00020"
WIDTH = 7.2  # inches
_WIDE = 12.0  # ratio of largest to smallest value above which an axis is logarithmic


@dataclass(frozen=True)
class Point:
    """A run in the picture."""

    row: Row
    x: float
    y: float
    x_interval: Interval | None
    y_interval: Interval | None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points of the Pareto front, sorted by cost.

    Args:
        points: (cost, gain): a low cost and a high gain are good.
    """

    def beaten(one: tuple[float, float]) -> bool:
        return any(cost <= one[0] and gain >= one[1] and (cost, gain) != one for cost, gain in points)

    return sorted((index for index, one in enumerate(points) if not beaten(one)), key=lambda index: points[index])


def write_picture(path: Path, found: Comparison) -> None:
    """Write the picture as PNG: speed against J per tile, or without power mIoU against speed, or bars of speed.

    Runs without a value for an axis are named below the picture.
    """
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks are drawn as boxes
        draw_picture(found).savefig(temporary, format="png")


def draw_picture(found: Comparison) -> Figure:
    """The figure of :func:`write_picture`; its height grows with the legend and the remarks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.4), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    with_energy = [row for row in found.rows if row.energy]
    with_score = [row for row in found.rows if row.mean_iou is not None]
    if len(with_energy) > 1:
        shown = _draw_energy(axes, found, with_energy)
    elif len(with_score) > 1:
        shown = _draw_scores(axes, found, with_score)
    else:
        shown = list(found.rows)
        figure.set_size_inches(WIDTH, 1.0 + 0.42 * len(shown))
        _draw_bars(axes, found)
    _draw_texts(figure, axes, found, [row.name for row in found.rows if row not in shown])
    return figure


def _draw_energy(axes: Axes, found: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Speed against gross energy, over lines of equal power."""
    points = []
    for row in rows:
        assert row.energy is not None
        rail = row.energy.figures
        joules = rail.gross_joules_per_tile if found.unit == "tile" else rail.gross_joules_per_megapixel
        speed, interval = _speed(row, found.unit)
        points.append(Point(row, joules.mean, speed, joules.interval, interval))
    rails = sorted({f"{row.energy.rail}, {row.energy.scope}" for row in rows if row.energy})
    axes.set_xlabel(f"energy, J/{_short(found)} gross ({'; '.join(rails)})")
    axes.set_ylabel(f"speed, {_rate(found)}")
    _scale_axes(axes, points)
    _draw_power_lines(axes, points)
    _draw_front(axes, points, front([(p.x, p.y) for p in points]))
    _draw_points(axes, points)
    return list(rows)


def _draw_scores(axes: Axes, found: Comparison, rows: Sequence[Row]) -> list[Row]:
    """mIoU against speed."""
    points = []
    for row in rows:
        speed, interval = _speed(row, found.unit)
        points.append(Point(row, speed, 100 * (row.mean_iou or 0.0), interval, None))
    axes.set_xlabel(f"speed, {_rate(found)}")
    axes.set_ylabel("mIoU, %")
    _scale_axes(axes, points)
    low, high = min(p.y for p in points), max(p.y for p in points)
    margin = max(0.5, 0.25 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))
    _draw_front(axes, points, front([(-p.x, p.y) for p in points]))
    _draw_points(axes, points)
    return list(rows)


def _draw_bars(axes: Axes, found: Comparison) -> None:
    """Speed alone."""
    rows = found.rows[::-1]  # the first one is on top
    for position, row in enumerate(rows):
        speed, interval = _speed(row, found.unit)
        color = COLORS[0] if row is found.rows[found.baseline] else _PALE
        axes.barh(position, speed, color=color, height=0.6)
        if interval:
            axes.errorbar(speed, position, xerr=_whiskers(speed, interval), color=_INK, capsize=3, linewidth=1.2)
        edge = max(speed, interval.high if interval else 0.0)
        digits = max(0, 2 - math.floor(math.log10(speed)))
        axes.annotate(
            f"{speed:.{digits}f}", (edge, position), (5, 0), textcoords="offset points", va="center", color=_INK
        )
    axes.set_yticks(
        range(len(rows)),
        [_cut(row.name) + (" (baseline)" if row is found.rows[found.baseline] else "") for row in rows],
        parse_math=False,
    )
    axes.set_xlabel(f"speed, {_rate(found)}")
    axes.margins(x=0.12)
    axes.set_ylim(-0.6, len(rows) - 0.4)


def _speed(row: Row, unit: str) -> tuple[float, Interval | None]:
    rate, interval = row.tiles_per_second.mean, row.tiles_per_second_interval
    if unit == "tile":
        return rate, interval
    speed = row.megapixels_per_second.mean
    return speed, Interval(*(edge * speed / rate for edge in (interval.low, interval.high))) if interval else None


def _rate(found: Comparison) -> str:
    return "tiles/s" if found.unit == "tile" else "MP/s"


def _short(found: Comparison) -> str:
    return "tile" if found.unit == "tile" else "MP"


def _scale_axes(axes: Axes, points: Sequence[Point]) -> None:
    """Start the axes at zero, or make them logarithmic if they span too much."""
    for name, values in (("x", [p.x for p in points]), ("y", [p.y for p in points])):
        if max(values) <= _WIDE * min(values):
            getattr(axes, f"set_{name}lim")(0, 1.22 * max(values))
            continue
        getattr(axes, f"set_{name}scale")("log")
        getattr(axes, f"set_{name}lim")(min(values) / 1.8, max(values) * 2.2)
        axis: Any = getattr(axes, f"{name}axis")
        axis.set_major_formatter("{x:g}")


def _draw_power_lines(axes: Axes, points: Sequence[Point]) -> None:
    """Draw curves of equal power (watts = J per tile x tiles/s), with a label where they cross the diagonal."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    watts = [p.x * p.y for p in points]
    for level in _round_numbers(0.5 * min(watts), 2 * max(watts)):
        start, end = max(left, level / top), min(right, level / bottom if bottom > 0 else right)
        if start >= end:
            continue
        curve = [(x, level / x) for x in (start * (end / start) ** (step / 200) for step in range(201))]
        axes.plot(*zip(*curve, strict=True), color=_PALE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        places = axes.transAxes.inverted().transform(axes.transData.transform(curve))
        across, up = min(places, key=lambda place: abs(place[0] - place[1]))
        if 0.04 < across < 0.94 and 0.04 < up < 0.94 and min(across, up) < 0.8:  # clear of the word "better"
            axes.text(
                across, up, f"{level:g} W", transform=axes.transAxes, ha="center", va="center", fontsize=7.5,
                color=_GREY, zorder=1, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
    axes.annotate(
        "better", (0.88, 0.985), (0.935, 0.915), xycoords="axes fraction", fontsize=8, color=_GREY, va="center",
        arrowprops={"arrowstyle": "->", "color": _GREY},
    )  # fmt: skip


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers in a range; fewer if the range is wide."""
    steps = (1.0, 2.0, 5.0) if high > 50 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [number for power in powers for number in (step * 10.0**power for step in steps) if low <= number <= high]


def _draw_front(axes: Axes, points: Sequence[Point], best: Sequence[int]) -> None:
    """Draw stairs through the points of the front."""
    chosen = [points[index] for index in best]
    if len(chosen) > 1:
        axes.step([p.x for p in chosen], [p.y for p in chosen], where="post", color=_INK, linewidth=1.0, zorder=2)
    axes.plot(
        [p.x for p in chosen], [p.y for p in chosen], "o", markersize=15, markerfacecolor="none", markeredgecolor=_INK,
        markeredgewidth=1.0, zorder=2,
    )  # fmt: skip
    axes.plot([], [], "o", markersize=8, markerfacecolor="none", markeredgecolor=_INK, label="Pareto front")


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    for index, point in enumerate(points):
        label = _cut(point.row.name)
        if point.row.mean_iou is not None:
            label += f": mIoU {100 * point.row.mean_iou:.1f} %"
        color = COLORS[index % len(COLORS)]
        x, y = _whiskers(point.x, point.x_interval), _whiskers(point.y, point.y_interval)
        axes.errorbar(point.x, point.y, xerr=x, yerr=y, fmt="none", ecolor=color, capsize=3, elinewidth=1.2, zorder=4)
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(point.x, point.y, marker, color=color, markersize=6.5, zorder=5, label=label)


def _whiskers(center: float, interval: Interval | None) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[max(0.0, center - interval.low)], [max(0.0, interval.high - center)]]


def _draw_texts(figure: Any, axes: Axes, found: Comparison, missing: Sequence[str]) -> None:
    """Draw the legend and the remarks, and make the figure higher by as much."""
    higher, legend = 0.0, None
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 2 if max(map(len, labels)) <= 44 and not any(map(_is_wide, labels)) else 1
        legend = figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
        for text in legend.get_texts():
            text.set_parse_math(False)
        higher += 0.18 * math.ceil(len(labels) / columns)
    below = ["whiskers: 95 % intervals"] if any(_speed(row, found.unit)[1] for row in found.rows) else []
    if missing:
        below.append(f"not in the picture: {', '.join(map(_cut, missing))}")
    lines = textwrap.wrap("; ".join(below), 110, max_lines=4, placeholder=" …")
    figure.supxlabel("\n".join(lines), fontsize=7.5, color=_GREY, x=0.99, ha="right", parse_math=False)
    higher += 0.12 * (len(lines) - 1)
    if found.not_comparable:
        text = "NOT COMPARABLE: " + "; ".join(found.not_comparable)
        lines = textwrap.wrap(text, 90, max_lines=6, placeholder=" …")
        # Over the whole width: beside long names the axes are too narrow.
        if legend:
            legend.set_title("\n".join(lines), prop={"size": 8.5})
            legend.set_alignment("left")
            legend.get_title().set(color=_ALERT, parse_math=False)
        else:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=8.5, color=_ALERT, parse_math=False)
        higher += 0.15 * len(lines)
    figure.set_size_inches(WIDTH, figure.get_size_inches()[1] + higher)


def _is_wide(label: str) -> bool:
    """Whether a label takes more than half of the width."""
    return sum(1.6 if char in "mwMW@" or char.isupper() or not char.isascii() else 1.0 for char in label) > 46


def _cut(name: str) -> str:
    shown = name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels with _ out of legends
