"""The pictures of a comparison and of a sweep: speed against energy or mIoU, and what no other run or point beats.

Drawn without pyplot, which would keep figures alive and choose a display.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cdkd_edge.benchmark import statistics
from cdkd_edge.benchmark.compare import Comparison, Row
from cdkd_edge.benchmark.picture import LOOK, drawable, inline_svg
from cdkd_edge.benchmark.statistics import Interval
from cdkd_edge.benchmark.sweep_table import ENERGY, SCORE, SPEED, Sweep, SweepPoint, source_names, unbeaten
from cdkd_edge.core.files import whole_file

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
    """Indices of the points (cost, gain) of the Pareto front, sorted by cost."""
    return sorted(unbeaten([(-cost, gain) for cost, gain in points]), key=lambda index: points[index])


def write_picture(path: Path, found: Comparison) -> None:
    """Write the picture as PNG: speed against J per tile, or without power mIoU against speed, or bars of speed.

    Runs without a value for an axis are named below the picture.
    """
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks are drawn as boxes
        draw_picture(found).savefig(temporary, format="png")


def draw_picture(found: Comparison) -> Figure:
    """The figure of :func:`write_picture`; its height grows with the legend and the remarks."""
    figure = Figure(figsize=(WIDTH, 4.4), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    unit, rate = ("tile", "tiles/s") if found.unit == "tile" else ("MP", "MP/s")
    speeds = [(row, *_speed(row, found.unit)) for row in found.rows]
    by_energy: list[Point] = []
    for row, speed, interval in speeds:
        if row.energy:
            joules: statistics.Figure = getattr(row.energy.figures, f"gross_joules_per_{found.unit}")
            by_energy.append(Point(row, joules.mean, speed, joules.interval, interval))
    by_score = [Point(row, x, 100 * row.mean_iou, bar, None) for row, x, bar in speeds if row.mean_iou is not None]
    points = by_energy if len(by_energy) > 1 else by_score
    if len(by_energy) > 1:  # speed against gross energy, over lines of equal power
        rails = sorted({f"{row.energy.rail}, {row.energy.scope}" for row in found.rows if row.energy})
        axes.set(xlabel=f"energy, J/{unit} gross ({'; '.join(rails)})", ylabel=f"speed, {rate}")
        _scale_axes(axes, points)
        _draw_power_lines(axes, points)
        _draw_points(axes, points, front([(p.x, p.y) for p in points]))
    elif len(by_score) > 1:  # mIoU against speed
        axes.set(xlabel=f"speed, {rate}", ylabel="mIoU, %")
        _scale_axes(axes, points)
        low, high = min(p.y for p in points), max(p.y for p in points)
        margin = max(0.5, 0.25 * (high - low))
        axes.set_ylim(max(0.0, low - margin), min(100.0, high + margin))
        _draw_points(axes, points, front([(-p.x, p.y) for p in points]))
    else:
        figure.set_size_inches(WIDTH, 1.0 + 0.42 * len(speeds))
        axes.set_xlabel(f"speed, {rate}")
        _draw_bars(axes, speeds, found.rows[found.baseline])
    shown = [p.row for p in points] if len(points) > 1 else list(found.rows)
    below = ["whiskers: 95 % intervals"] if any(interval for _, _, interval in speeds) else []
    if len(shown) < len(speeds):
        below.append(f"not in the picture: {', '.join(_cut(row.name) for row in found.rows if row not in shown)}")
    _draw_texts(figure, axes, "; ".join(below), found.not_comparable)
    return figure


def _draw_bars(axes: Axes, speeds: Sequence[tuple[Row, float, Interval | None]], baseline: Row) -> None:
    """Draw speed alone, the first run on top."""
    for position, (row, speed, interval) in enumerate(reversed(speeds)):
        axes.barh(position, speed, color=COLORS[0] if row is baseline else _PALE, height=0.6)
        if interval:
            axes.errorbar(speed, position, xerr=_whiskers(speed, interval), color=_INK, capsize=3, linewidth=1.2)
        edge = max(speed, interval.high if interval else 0.0)
        digits = max(0, 2 - math.floor(math.log10(speed)))
        axes.annotate(
            f"{speed:.{digits}f}", (edge, position), (5, 0), textcoords="offset points", va="center", color=_INK
        )
    names = [_cut(row.name) + (" (baseline)" if row is baseline else "") for row, _, _ in reversed(speeds)]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.margins(x=0.12)
    axes.set_ylim(-0.6, len(names) - 0.4)


def _speed(row: Row, unit: str) -> tuple[float, Interval | None]:
    rate, interval = row.tiles_per_second.mean, row.tiles_per_second_interval
    if unit == "tile":
        return rate, interval
    speed = row.megapixels_per_second.mean
    return speed, Interval(*(edge * speed / rate for edge in (interval.low, interval.high))) if interval else None


def _scale_axes(axes: Axes, points: Sequence[Point]) -> None:
    """Start the axes at zero, or make them logarithmic if they span too much."""
    for name, values in (("x", [p.x for p in points]), ("y", [p.y for p in points])):
        if max(values) <= _WIDE * min(values):
            axes.set(**{f"{name}lim": (0, 1.22 * max(values))})
            continue
        axes.set(**{f"{name}scale": "log", f"{name}lim": (min(values) / 1.8, max(values) * 2.2)})
        getattr(axes, f"{name}axis").set_major_formatter("{x:g}")


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


def _draw_points(axes: Axes, points: Sequence[Point], best: Sequence[int]) -> None:
    """Draw the points, and stairs through those of the front."""
    xs, ys = [points[index].x for index in best], [points[index].y for index in best]
    if len(best) > 1:
        axes.step(xs, ys, where="post", color=_INK, linewidth=1.0, zorder=2)
    ring: dict[str, Any] = {"marker": "o", "linestyle": "none", "markerfacecolor": "none", "markeredgecolor": _INK}
    axes.plot(xs, ys, markersize=15, markeredgewidth=1.0, zorder=2, **ring)
    axes.plot([], [], markersize=8, label="Pareto front", **ring)
    for index, point in enumerate(points):
        score = point.row.mean_iou
        label = _cut(point.row.name) + ("" if score is None else f": mIoU {100 * score:.1f} %")
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        x, y = _whiskers(point.x, point.x_interval), _whiskers(point.y, point.y_interval)
        axes.errorbar(point.x, point.y, xerr=x, yerr=y, fmt="none", ecolor=color, capsize=3, elinewidth=1.2, zorder=4)
        axes.plot(point.x, point.y, marker, color=color, markersize=6.5, zorder=5, label=label)


def _whiskers(center: float, interval: Interval | None) -> list[list[float]] | None:
    return [[max(0.0, center - interval.low)], [max(0.0, interval.high - center)]] if interval else None


def _draw_texts(figure: Any, axes: Axes, below: str, not_comparable: Sequence[str]) -> None:
    """Draw the legend and the remarks, and make the figure higher by as much."""
    higher, legend = 0.0, None
    if labels := axes.get_legend_handles_labels()[1]:
        columns = 2 if max(map(len, labels)) <= 44 and not any(map(_is_wide, labels)) else 1
        legend = figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
        for text in legend.get_texts():
            text.set_parse_math(False)
        higher += 0.18 * math.ceil(len(labels) / columns)
    lines = textwrap.wrap(below, 110, max_lines=4, placeholder=" …")
    figure.supxlabel("\n".join(lines), fontsize=7.5, color=_GREY, x=0.99, ha="right", parse_math=False)
    higher += 0.12 * (len(lines) - 1)
    if not_comparable:
        lines = textwrap.wrap("NOT COMPARABLE: " + "; ".join(not_comparable), 90, max_lines=6, placeholder=" …")
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


# --- a sweep --------------------------------------------------------------------------------------

_OFFSETS = ((7, 4), (7, -9), (-12, 4), (-12, -9), (16, 10), (16, -16), (-22, 10), (-22, -16), (0, 14), (0, -22))
"""Where the number of a point is written, in points from its middle: the first place that is free."""


def sweep_svg(sweep: Sweep) -> str:
    """Inline SVG of mIoU, and of energy, against speed; empty if only speed was measured."""
    panels = [
        (quantity, label, factor)
        for quantity, label, factor in ((SCORE, "mIoU, %", 100.0), (ENERGY, "energy, J per MP of a scene, gross", 1.0))
        if quantity.name in sweep.front_of
    ]
    if not panels:
        return ""
    with style.context(LOOK):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        for axes, (quantity, label, factor) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            values = {p.number: factor * value for p in sweep.points if (value := quantity.of(p)) is not None}
            points = [point for point in sweep.points if point.number in values and SPEED.of(point)]
            axes.set(xlabel="speed, MP of a scene per second", ylabel=label)
            axes.grid(color="#e8e8e8", linewidth=0.5)
            axes.set_axisbelow(True)
            axes.set_xlim(0, 1.15 * max(SPEED.of(point) or 0 for point in points))
            low, high = min(values.values()), max(values.values())
            margin = max(0.3 * (high - low), 0.02 * high, 1e-9)
            axes.set_ylim(max(0.0, low - margin), high + margin)
            axes.annotate(
                "better", (1, 1 if quantity.sign > 0 else 0), (-4, -4 * quantity.sign), xycoords="axes fraction",
                textcoords="offset points", ha="right", va="top" if quantity.sign > 0 else "bottom", color=_GREY,
            )  # fmt: skip
            _draw_sweep_points(sweep, axes, points, values)
        _draw_sweep_legend(sweep, figure)
        return inline_svg(figure, 0.0, "sweep", "mIoU and energy against speed of all points")


def _looks(sweep: Sweep) -> tuple[dict[str, str], dict[str, str]]:
    """A colour for each graph, a marker for each precision."""
    precisions = dict.fromkeys(point.precision for point in sweep.points)
    names = source_names(sweep)
    return (
        {path: COLORS[index % len(COLORS)] for index, path in enumerate(names)},
        {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(precisions)},
    )


def _draw_sweep_points(sweep: Sweep, axes: Axes, points: Sequence[SweepPoint], values: dict[int, float]) -> None:
    colors, markers = _looks(sweep)
    taken: list[tuple[float, float]] = []
    places = {p.number: axes.transData.transform((SPEED.of(p) or 0.0, values[p.number])) for p in points}
    spots = [(float(x), float(y)) for x, y in places.values()]
    for point in points:
        x, y = SPEED.of(point) or 0.0, values[point.number]
        is_chosen = point.number == sweep.chosen
        marker, size = ("*", 11) if is_chosen else (markers[point.precision], 5.5)
        solid = point.status == "valid"
        axes.plot(
            x, y, marker, color=colors[point.source], markersize=size, zorder=4,
            markerfacecolor=colors[point.source] if solid else "white",
        )  # fmt: skip
        if point.front:
            axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=_INK, zorder=3)
        offset = _free_place(places[point.number], taken, spots, axes.figure.dpi / 72)
        axes.annotate(
            str(point.number), (x, y), offset, textcoords="offset points", zorder=5,
            fontweight="bold" if is_chosen else "normal",
        )  # fmt: skip


def _free_place(
    place: Any, taken: list[tuple[float, float]], points: Sequence[tuple[float, float]], scale: float
) -> tuple[int, int]:
    """An offset at which a number covers neither a point nor another number; ``taken`` grows by its place."""

    def distance(offset: tuple[int, int]) -> float:
        middle = place[0] + (offset[0] + 3) * scale, place[1] + (offset[1] + 3) * scale
        return min((math.dist(middle, other) for other in (*taken, *points)), default=math.inf)

    best = next((one for one in _OFFSETS if distance(one) > 8 * scale), max(_OFFSETS, key=distance))
    taken.append((place[0] + (best[0] + 3) * scale, place[1] + (best[1] + 3) * scale))
    return best


def _draw_sweep_legend(sweep: Sweep, figure: Figure) -> None:
    colors, markers = _looks(sweep)
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 5.5}
    names = source_names(sweep)
    handles = [
        Line2D([], [], marker="s", color=colors[path], label=drawable(names[path], 40), **plain) for path in names
    ]
    handles += [
        Line2D([], [], marker=marker, color=_GREY, label=name.upper(), **plain) for name, marker in markers.items()
    ]
    ring: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": _INK, "linestyle": "none"}
    handles.append(Line2D([], [], markersize=8, label="Pareto front", **ring))
    if sweep.chosen:
        handles.append(Line2D([], [], marker="*", color=_INK, linestyle="none", markersize=8, label="to take"))
    if any(point.measured and point.status != "valid" for point in sweep.points):
        handles.append(Line2D([], [], marker="s", color=_GREY, markerfacecolor="white", label="not valid", **plain))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False)
