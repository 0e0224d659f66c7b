"""Drawings of ``report.html``: the trace and a histogram as inline SVG. Colours are classes of ``page.css``."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final

import numpy as np

from cdkd_edge.bench import curves
from cdkd_edge.bench.folder import Run, Series
from cdkd_edge.bench.page.markup import escaped
from cdkd_edge.bench.record import IDLE, LOAD
from cdkd_edge.bench.statistics import Latency

LETTER: Final = 6.2
"""Width of a letter at the drawings' 11 px, about."""
RAILS: Final = 6
"""Classes of thin lines."""


class Panel:
    """A rectangle of a drawing with an axis of its own: ``x`` and ``y`` turn values into pixels."""

    def __init__(self, box: tuple[float, float, float, float], spans: tuple[float, float, float, float]) -> None:
        self.left, self.top, self.width, self.height = box
        self.start, self.stop, self.low, self.high = spans

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + (value - self.start) / (self.stop - self.start) * self.width

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return self.top + (1 - (value - self.low) / (self.high - self.low)) * self.height

    def line(self, times: curves.Floats, values: curves.Floats, name: str) -> str:
        """A curve; a lone point is a dot."""
        if len(times) == 1:
            return f'<circle class="{name} dot" cx="{self.x(times[0]):.1f}" cy="{self.y(values[0]):.1f}" r="1.2"/>'
        points = " ".join(f"{self.x(t):.1f},{self.y(v):.1f}" for t, v in zip(times, values, strict=True))
        return f'<polyline class="{name}" points="{points}"/>'

    def series(self, series: Series, name: str) -> str:
        """A curve that is broken where readings are missing, thinned to two pixels."""
        columns = max(1, int(self.width / 2))
        parts = (curves.thin(*piece, self.start, self.stop, columns) for piece in curves.pieces(series))
        return "".join(self.line(times, values, name) for times, values in parts)

    def steps(self, edges: curves.Floats, values: curves.Floats, name: str) -> str:
        """A value per window."""
        return self.line(np.repeat(edges, 2)[1:-1], np.repeat(values, 2), name)

    def band(self, start: float, stop: float, name: str) -> str:
        """From the lower to the upper edge; at least a pixel wide."""
        width = max(self.x(stop) - self.x(start), 1.0)
        x = f"{self.x(start):.1f}"
        return f'<rect class="{name}" x="{x}" y="{self.top:g}" width="{width:.1f}" height="{self.height:g}"/>'

    def level(self, value: float, name: str) -> str:
        """A horizontal line over the whole width."""
        y = f"{self.y(value):.1f}"
        return f'<line class="{name}" x1="{self.left:g}" x2="{self.left + self.width:g}" y1="{y}" y2="{y}"/>'

    def scale(self, name: str = "", *, right: bool = False, count: int = 5) -> str:
        """Numbers beside it."""
        edge, anchor = (self.left + self.width + 5, "start") if right else (self.left - 5, "end")
        marks = ticks(self.low, self.high, count)
        return "".join(
            text(edge, self.y(value) + 3.5, shown, anchor=anchor, name=name)
            + ("" if right else self.level(value, "grid"))
            for value, shown in marks
        )

    def time_scale(self, count: int) -> str:
        """Numbers below it."""
        below = self.top + self.height
        return "".join(
            f'<line class="axis" x1="{self.x(value):.1f}" x2="{self.x(value):.1f}" y1="{below:g}" y2="{below + 4:g}"/>'
            + text(self.x(value), below + 15, shown)
            for value, shown in ticks(self.start, self.stop, count)
        )


def ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About ``count`` round values between two, and how they are written."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    decimals = max(0, -math.floor(math.log10(step * 1.001)))
    first = math.ceil(low / step - 1e-9)
    return [(k * step, f"{k * step:.{decimals}f}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def text(x: float, y: float, words: str, *, anchor: str = "middle", name: str = "") -> str:
    """A line of words."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">{escaped(words)}</text>'


def drawing(width: float, height: float, name: str, title: str, parts: list[str]) -> str:
    """The parts as an image that a screen reader names."""
    return (
        f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escaped(title)}">'
        f"<title>{escaped(title)}</title>{''.join(parts)}</svg>"
    )


def trace_drawing(run: Run, width: float, name: str) -> str:
    """Power, tiles/s and temperature against time, ``width`` pixels wide; without power, tiles/s and latency.

    The same data, rules and order as ``trace.png``.
    """
    start, stop = curves.bounds(run)
    no_power, heat, found = curves.why_no_power(run), curves.temperature(run), curves.windows(run)
    left, right = 44.0, 8.0 if no_power else 44.0
    inner = width - left - right
    main_height = 230.0 if width > 500 else 200.0
    boxes = [("main", main_height)] + [("latency", 80.0)] * bool(no_power) + [("heat", 60.0)] * bool(heat)
    title = "Throughput and latency" if no_power else "Power and throughput"
    parts: list[str] = []
    top = 40.0
    panel = Panel((left, 20, inner, 18), (start, stop, 0, 1))
    parts += _track(run, panel)
    for kind, height in boxes:
        box = (left, top, inner, height)
        panel = Panel(box, (start, stop, 0, 1))
        parts += [panel.band(span.start, span.stop, f"shade-{span.name}") for span in run.summary.phases]
        if kind == "main":
            parts += _throughput(box, found, panel) if no_power else _power(run, box, found)
            caption = "tiles/s" if no_power else "Power, W"
            parts.append(text(4, 12, caption, anchor="start", name="speed-text" if no_power else ""))
            if not no_power:
                parts.append(text(width - 4, 12, "tiles/s", anchor="end", name="speed-text"))
        elif kind == "latency":
            parts += _latencies(box, found, panel)
            parts.append(text(left, top - 5, "latency, ms: minimum, median, maximum", anchor="start"))
        elif heat:
            label, series = heat
            margin = max(1.0, 0.15 * (max(series.values) - min(series.values)))
            panel = Panel(box, (start, stop, min(series.values) - margin, max(series.values) + margin))
            parts += [panel.series(series, "heat"), panel.scale(count=3)]
            parts.append(text(left, top - 5, f"{label}, °C", anchor="start"))
        parts.append(panel.level(panel.low, "axis"))
        top += height + 20
    parts.append(panel.time_scale(8 if width > 500 else 4))
    parts.append(text(left + inner / 2, top + 12, "time, s"))
    return drawing(width, top + 18, name, f"{title} against time, {stop - start:.0f} s", parts)


def _latencies(box: tuple[float, float, float, float], found: tuple[curves.Windows, ...], panel: Panel) -> list[str]:
    """Minimum, median and maximum; on a logarithmic axis where one batch would press all others onto the axis."""
    highest = max((float(one.latency_ms.max()) for one in found), default=1.0)
    usual = max((float(one.latency_ms[:, 1].max()) for one in found), default=1.0)
    log = highest > 20 * usual > 0
    least = max(min((float(one.latency_ms.min()) for one in found), default=1.0), 1e-6)
    edges = (math.log10(least / 2), math.log10(highest * 2)) if log else (0, max(highest * 1.15, 1e-6))
    own = Panel(box, (panel.start, panel.stop, *edges))
    parts = []
    for one in found:
        values = np.log10(np.maximum(one.latency_ms, least)) if log else one.latency_ms
        for column, line in enumerate(("latency-range", "latency", "latency-range")):
            parts.append(own.steps(one.edges, values[:, column], line))
    if not log:
        return [*parts, own.scale(count=3)]
    for power in range(math.ceil(edges[0]), math.floor(edges[1]) + 1):
        parts.append(
            text(own.left - 5, own.y(power) + 3.5, f"{10.0**power:g}", anchor="end") + own.level(power, "grid")
        )
    return parts


def _track(run: Run, panel: Panel) -> list[str]:
    """A strip with the phases' names, where they fit."""
    repeats = len({span.repeat for span in run.summary.phases if span.name == LOAD})
    parts = []
    for span in run.summary.phases:
        parts.append(panel.band(span.start, span.stop, f"track track-{span.name}"))
        room = panel.x(span.stop) - panel.x(span.start) - 4
        label = curves.span_label(span.name, span.repeat, repeats)
        short = str(span.repeat + 1) if span.name == LOAD and repeats > 1 else ""
        fitting = next((one for one in (label, short) if one and len(one) * LETTER < room), None)
        if fitting:
            parts.append(text(panel.x((span.start + span.stop) / 2), panel.top + 13, fitting, name="on-track"))
    return parts


def _power(run: Run, box: tuple[float, float, float, float], found: tuple[curves.Windows, ...]) -> list[str]:
    start, stop = curves.bounds(run)
    panel = Panel(box, (start, stop, 0, curves.power_top(run)))
    main = curves.main_rails(run)
    parts = [panel.scale()]
    for rail in main[:1]:
        parts += [panel.band(*gap, "gap") for gap in curves.gaps(run.watts[rail], start, stop)]
    lines = rail_classes(run)
    parts += [panel.series(run.watts[rail], lines[rail]) for rail in sorted(lines, key=lambda one: one in main)]
    # Throughput stands where power does not.
    levels = curves.levels(run, panel.high)
    parts += _throughput(box, found, panel, levels)
    for _, (idle, load) in curves.mean_watts(run).items() if len(main) == 1 else ():
        middle = panel.x(_middle_of_load(run))
        peak = max((v for v in run.watts[main[0]].values), default=load)
        parts += [panel.level(idle, "mean"), panel.level(load, "mean")]
        high = panel.y(max(peak, load)) - 5
        low = panel.y(idle) - 4 if panel.y(idle) - high > 16 else panel.y(idle) + 12  # not upon each other
        for y, words in ((low, f"{IDLE} {idle:.2f} W"), (high, f"{LOAD} {load:.2f} W")):
            half = len(words) * LETTER / 2  # kept from the numbers of the other axis, and within the drawing
            x = min(max(middle, panel.left + half), panel.left + panel.width - half)
            parts.append(text(x, y, words, name="halo"))
    return parts


def _throughput(
    box: tuple[float, float, float, float],
    found: tuple[curves.Windows, ...],
    panel: Panel,
    levels: list[float] | None = None,
) -> list[str]:
    """Tiles/s; beside power if there are ``levels`` (0 bottom, 1 top), with the numbers on the right."""
    top = curves.throughput_top(found, levels)
    own = Panel(box, (panel.start, panel.stop, 0, top))
    dashed = " beside" if levels is not None else ""
    parts = [own.steps(one.edges, one.tiles_per_second, f"speed{dashed}") for one in found]
    return [own.scale("speed-text", right=levels is not None), *parts]


def rail_classes(run: Run) -> dict[str, str]:
    """A class of lines for every rail; the one that contains the others is strong."""
    main, thin = curves.main_rails(run), 0
    classes = {}
    for rail in sorted(run.watts, key=lambda name: name not in main):
        if [rail] == list(main):
            classes[rail] = "power"
            continue
        classes[rail] = f"rail rail-{thin % RAILS}"
        thin += 1
    return classes


def _middle_of_load(run: Run) -> float:
    loads = [span for span in run.summary.phases if span.name == LOAD] or list(run.summary.phases)
    widest = max(loads, key=lambda span: span.seconds, default=None)
    return (widest.start + widest.stop) / 2 if widest else sum(curves.bounds(run)) / 2


def histogram_drawing(latencies: curves.Floats, latency: Latency, width: float, name: str) -> str:
    """How often each latency occurred. Nothing is left out: what lies far above all but 1 % is the last bar."""
    height, left, bottom, head = 212.0, 44.0, 34.0, 44.0
    counts, edges, above = histogram(latencies)
    highest = max(int(counts.max()), above, 1)
    panel = Panel((left, head, width - left - 12, height - head - bottom), (edges[0], edges[-1], 0, highest * 1.12))
    if above:  # the last bar stands apart
        panel.width -= 56
    parts = [panel.scale(count=4)]
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        parts.append(_bar(panel, panel.x(low), panel.x(high), int(count), "bar"))
    if above:
        x = panel.left + panel.width + 30
        parts.append(_bar(panel, x, x + 22, above, "bar above"))
        parts.append(text(x + 11, panel.y(above) - 3, str(above)))
        parts.append(text(x + 11, panel.top + panel.height + 15, f"> {ticks_text(edges[-1])}"))
    ends: list[float] = []  # right end of the last label in each row; labels that would collide go one row up
    for label, value in (("p50", latency.p50), ("p90", latency.p90), ("p99", latency.p99)):
        if value is None:
            continue
        x = panel.x(min(value, panel.stop))
        half = len(label) * LETTER / 2 + 1
        row = next((row for row, end in enumerate(ends) if end < x - half), len(ends))
        ends[row : row + 1] = [x + half]
        parts.append(f'<line class="quantile" x1="{x:.1f}" x2="{x:.1f}" y1="{panel.top:g}" y2="{panel.y(0):.1f}"/>')
        parts.append(text(x, panel.top - 3 - 10 * row, label, name="halo"))
    parts += [panel.level(0, "axis"), panel.time_scale(4), text(4, 10, "batches", anchor="start")]
    parts.append(text(panel.left + panel.width / 2, height - 3, "latency, ms"))
    return drawing(width, height, name, f"Histogram of {len(latencies)} latencies", parts)


def ticks_text(value: float) -> str:
    """A limit in three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def histogram(latencies: curves.Floats) -> tuple[curves.Floats, curves.Floats, int]:
    """Counts ``[B]``, edges ``[B + 1]`` in ms, and how many lie above the last edge: 1 % at most, or one."""
    ordered = np.sort(latencies)
    low, high = float(ordered[0]), float(ordered[-1])
    usual = float(ordered[max(0, len(ordered) - 1 - max(1, len(ordered) // 100))])
    spread = max(usual - low, 0.01 * low, 1e-6)
    if high > usual + 2 * spread:
        high = usual + spread / 4
    if high <= low:
        low, high = low - max(low * 0.01, 1e-6), high + max(low * 0.01, 1e-6)
    bins = int(np.clip(2 * len(latencies) ** (1 / 3), 8, 40))  # Rice's rule, as many as can be seen
    counts, edges = np.histogram(latencies[latencies <= high], bins, (low, high))
    return counts.astype(np.float64), edges, int((latencies > high).sum())


def _bar(panel: Panel, left: float, right: float, count: int, name: str) -> str:
    if not count:
        return ""
    top = min(panel.y(count), panel.y(0) - 1)  # one batch among thousands is still seen
    return (
        f'<rect class="{name}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" '
        f'height="{panel.y(0) - top:.1f}"/>'
    )
