"""Pictures of a run: ``trace.png``, and the trace and histogram of ``report.html`` as SVG.

The trace shows power, tiles per second and temperature against time, one column of a paper wide.
"""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from cdkd_edge.benchmark import curves
from cdkd_edge.benchmark.folder import Run, Series
from cdkd_edge.benchmark.record import IDLE, INVALID, LOAD, VALID, WARM_UP
from cdkd_edge.benchmark.statistics import Latency
from cdkd_edge.core.files import whole_file

WIDTH: Final = 3.5  # inches: a column of a two-column paper
DPI: Final = 300
SVG_COLUMNS: Final = 350  # columns to which curves are thinned in SVG, where every point costs some 20 bytes

# From Okabe and Ito's palette, which is clear to colour-blind readers; dashes help in greyscale.
POWER, SPEED, GREY = "#003f6b", "#d55e00", "#595959"
RAILS: Final = ("#0072b2", "#009e73", "#cc79a7", "#7f6000", "#56b4e9")
DASHES: Final = ("-", "--", ":")
SHADES: Final = {IDLE: "#ffffff", WARM_UP: "#f4f4f4", LOAD: "#e6e6e6"}
TRACK: Final = {IDLE: "#ffffff", WARM_UP: "#dcdcdc", LOAD: "#b0b0b0"}

STYLE: Final = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 6.5, "axes.labelsize": 6.5, "legend.fontsize": 6, "xtick.labelsize": 6, "ytick.labelsize": 6,
    "axes.linewidth": 0.5, "hatch.linewidth": 0.4, "lines.linewidth": 0.7, "axes.spines.top": False,
    "xtick.major.width": 0.5, "ytick.major.width": 0.5, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "cdkd-edge",  # the same names in every run
    "text.parse_math": False,  # names of engines and rails may contain dollar signs
}  # fmt: skip
LOOK: Final[list[Any]] = ["default", STYLE]  # whatever the user's matplotlibrc says


def write_trace_picture(run: Run, path: Path) -> None:
    """Draw a run as a PNG, 3.5 inches wide at 300 dots per inch.

    The main rail is drawn strong, others thin. Times without readings are hatched, and no line crosses them. Means are
    drawn only if the run's figures may be quoted. Without power, the picture shows tiles/s, latency and the reason.
    """
    with style.context(LOOK):
        figure, bottom = TracePicture(run, int(WIDTH * DPI)).draw()
        with whole_file(path) as temporary:
            _save(figure, str(temporary), "png", bottom, {"Software": run.summary.tool})


def trace_svg(run: Run) -> str:
    """The same picture as inline SVG."""
    with style.context(LOOK):
        return inline_svg(
            *TracePicture(run, SVG_COLUMNS).draw(), "trace", "Power, throughput and temperature against time"
        )


def histogram_svg(latencies: curves.Floats, latency: Latency) -> str:
    """A histogram of latencies (ms) as inline SVG. Nothing is left out: far outliers are counted in the last bar."""
    with style.context(LOOK):
        title = f"Histogram of {len(latencies)} latencies"
        return inline_svg(curves.draw_histogram(latencies, latency), 0.0, "histogram", title)


def _save(figure: Figure, file: Any, form: str, bottom: float, metadata: dict[str, Any]) -> None:
    crop = Bbox.from_extents(0, bottom, *figure.get_size_inches())
    figure.savefig(file, dpi=DPI, format=form, bbox_inches=crop, metadata=metadata)


def inline_svg(figure: Figure, bottom: float, name: str, title: str) -> str:
    """A figure as SVG for a page, without what is below ``bottom`` inches; ``name`` tells it from others there."""
    file = io.BytesIO()
    _save(figure, file, "svg", bottom, dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    # Names within one page must differ between its drawings, and the style must not reach beyond them.
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{name}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg class="{name}" role="img" aria-label="{title}" ', 1)


def banner_lines(run: Run) -> list[str]:
    """Lines that say why the run is not valid; none for a valid run."""
    verdict = run.summary.verdict
    if verdict.status == VALID:
        return []
    words = [verdict.status.upper().replace("_", " "), "; ".join(verdict.reasons)]
    return textwrap.wrap(drawable(": ".join(filter(None, words))), 48, max_lines=3, placeholder=" …")


def drawable(text: str, length: int = 200) -> str:
    """A text on one line, with the letters that the font has."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    text = "".join(one for one in " ".join(text.split()) if unicodedata.category(one) not in ("Cc", "Cf"))
    text = "".join(letter if ord(letter) in known else "?" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


class TracePicture:
    """The trace; places its panels from the top down, in inches."""

    left = 0.43
    legend_columns = 3

    def __init__(self, run: Run, columns: int) -> None:
        self.run, self.columns = run, columns
        self.start, self.stop = curves.bounds(run)
        self.windows = curves.windows(run)
        self.heat = curves.temperature(run)
        self.no_power = curves.why_no_power(run)
        self.right = 0.12 if self.no_power else 0.43  # room for a second axis
        self.repeats = len({phase.repeat for phase in run.summary.phases if phase.name == LOAD})
        self.handles: list[Any] = []
        self.labels_dropped = False

    def draw(self) -> tuple[Figure, float]:
        """The figure, and the height of its lower edge, in inches; below it there is nothing."""
        banner = banner_lines(self.run)
        head, caption, track, gap, axis = 0.06 + 0.125 * len(banner) if banner else 0.0, 0.17, 0.13, 0.1, 0.28
        panels = [(self._draw_main, 1.45)]
        if self.no_power:
            panels.append((self._draw_latency, 0.7))
        if self.heat:
            panels.append((self._draw_heat, 0.42))
        legend = 0.08 + 0.12 * (1 + (len(self.run.watts) + 6) // self.legend_columns)
        body = sum(size for _, size in panels) + gap * (len(panels) - 1)
        self.height = head + caption + track + body + axis + legend
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI)
        if banner:
            self._draw_banner(banner, self.height - head, head)
        top = self.height - head - caption
        self._draw_caption(top)
        top -= track
        self._draw_track(self._axes(top, track))
        for number, (draw, size) in enumerate(panels):
            top -= size + (gap if number else 0.0)
            axes = self._axes(top, size)
            axes.spines["right"].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 3, 5, 6, 10]))
            axes.tick_params(labelbottom=number == len(panels) - 1)
            for phase in self.run.summary.phases:
                axes.axvspan(phase.start, phase.stop, color=SHADES[phase.name], linewidth=0, zorder=0)
            draw(axes)
        axes.set_xlabel("Time (s)", labelpad=1.5)
        return self.figure, self._draw_legend(legend)

    def _axes(self, bottom: float, height: float) -> Axes:
        box = (self.left / WIDTH, bottom / self.height, 1 - (self.left + self.right) / WIDTH, height / self.height)
        return self.figure.add_axes(box, xlim=(self.start, self.stop))

    def _draw_banner(self, lines: list[str], bottom: float, size: float) -> None:
        paper, ink = ("#a50000", "white") if self.run.summary.verdict.status == INVALID else ("#f5c242", "black")
        box = (0, bottom / self.height), 1, size / self.height
        self.figure.add_artist(Rectangle(*box, color=paper, transform=self.figure.transFigure, linewidth=0))
        self.figure.text(
            0.5, (bottom + size / 2) / self.height, "\n".join(lines), ha="center", va="center", linespacing=1.15,
            color=ink, weight="bold", fontsize=7.5,
        )  # fmt: skip

    def _draw_caption(self, bottom: float) -> None:
        engine, figures = self.run.summary.engine, self.run.summary.figures
        board, machine = self.run.summary.board or {}, self.run.summary.machine
        parts = [engine.name, f"{engine.precision.upper()}, {engine.tile} px, batch {engine.batch}"]
        if figures and figures.power:
            parts.append(f"{figures.power.source} ({figures.power.scope})")
        parts.append(str(board.get("model") or machine.board or machine.cpu))
        text = self.figure.text(
            self.left / WIDTH, (bottom + 0.055) / self.height, drawable(" · ".join(parts)), fontsize=5.5, color=GREY
        )
        while self.inches(text) > WIDTH - self.left - 0.05 and len(text.get_text()) > 1:
            text.set_text(text.get_text().rstrip("…")[: -1 - len(text.get_text()) // 50].rstrip() + "…")

    def inches(self, text: Any) -> float:
        """Width of a text."""
        return float(text.get_window_extent(self.renderer()).width) / DPI

    def renderer(self) -> Any:
        """What measures texts."""
        return RendererAgg(int(WIDTH * DPI), int(self.height * DPI), DPI)  # type: ignore[no-untyped-call]

    def _draw_track(self, axes: Axes) -> None:
        """A strip with the names of the phases, where they fit."""
        axes.set_ylim(0, 1)
        axes.axis("off")
        scale = (WIDTH - self.left - self.right) / (self.stop - self.start)
        for phase in self.run.summary.phases:
            axes.axvspan(phase.start, phase.stop, 0.06, 0.94, fc=TRACK[phase.name], ec=GREY, linewidth=0.3)
            names: list[str] = [phase.name]
            if phase.name == LOAD and self.repeats > 1:
                names = [f"{LOAD} {phase.repeat + 1}", str(phase.repeat + 1)]
            for name in names:
                text = axes.text((phase.start + phase.stop) / 2, 0.47, name, ha="center", va="center", fontsize=5.5)
                if self.inches(text) < phase.seconds * scale - 0.02:
                    break
                text.remove()
                self.labels_dropped = True

    def _draw_main(self, axes: Axes) -> None:
        if self.no_power:
            self._draw_speed(axes, None)
            reason = drawable(f"Power was not measured: {self.no_power}")
            words = "\n".join(textwrap.wrap(reason, 62, max_lines=3, placeholder=" …"))
            box = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.4, "pad": 2}
            axes.text(0.5, 0.3, words, transform=axes.transAxes, ha="center", va="center", fontsize=6, bbox=box)
            return
        top = self._draw_power(axes)
        twin = axes.twinx()
        twin.spines["right"].set_color(SPEED)
        self._draw_speed(twin, top)

    def _draw_power(self, axes: Axes) -> float:
        """Draw the rails; return the top of the axis, W."""
        main, top = curves.main_rails(self.run), curves.power_top(self.run)
        axes.set_ylim(0, top)
        axes.set_ylabel("Power (W)", labelpad=2)
        thin = zip(cycle(RAILS), cycle(DASHES))
        for rail in sorted(self.run.watts, key=lambda name: name not in main):
            strong = [rail] == list(main)
            colour, dash = (POWER, "-") if strong else next(thin)
            line = self._draw_series(axes, self.run.watts[rail], colour, dash, 0.9 if strong else 0.5, 3 - (not strong))
            line.set_label(drawable(rail, 22) + (" (total)" if strong and len(self.run.watts) > 1 else ""))
            self.handles.append(line)
        self._draw_gaps(axes, self.run.watts[main[0]])
        for rail, (idle, load) in curves.mean_watts(self.run).items() if len(main) == 1 else ():
            low = self._draw_mean(axes, f"{IDLE} {idle:.2f} W", idle, self.run.watts[rail], above=False)
            high = self._draw_mean(axes, f"{LOAD} {load:.2f} W", load, self.run.watts[rail], above=True)
            if low and high and high.xy[1] - low.xy[1] < 0.1 * top:  # the words would overlap
                if low.xy[1] > 0.15 * top:
                    low.set(verticalalignment="top", position=(0, -2))
                else:  # the axis is just below
                    high.set_position((0, 10))
        return top

    def _draw_series(self, axes: Axes, series: Series, colour: str, dash: Any, width: float, order: int = 2) -> Any:
        for times, values in curves.pieces(series):
            if len(times) == 1:
                axes.plot(times, values, color=colour, marker=".", markersize=1.5, linestyle="none", zorder=order)
                continue
            times, values = curves.thin(times, values, self.start, self.stop, self.columns)
            axes.plot(times, values, color=colour, linestyle=dash, linewidth=width, zorder=order)
        return Line2D([], [], color=colour, linestyle=dash, linewidth=max(width, 0.8))

    def _draw_gaps(self, axes: Axes, series: Series) -> None:
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": "#a0a0a0", "hatch": "//////", "linewidth": 0.4}
        missing = curves.gaps(series, self.start, self.stop)
        for start, stop in missing:
            axes.axvspan(start, stop, zorder=1, **look)
        if missing:
            self.handles.append(Patch(label="no readings", **look))

    def _draw_mean(self, axes: Axes, words: str, watts: float, series: Series, *, above: bool) -> Any:
        """A dashed line at a mean, with its value; returns the text, or None if there was no load."""
        if above:
            axes.axhline(watts, color="white", linewidth=0.9, zorder=4)  # lets the dashes show on a dark band
        axes.axhline(watts, color="black", linewidth=0.6, linestyle=(0, (3, 2)), zorder=4)
        loads = [phase for phase in self.run.summary.phases if phase.name == LOAD]
        if not loads:
            return None
        widest = max(loads, key=lambda phase: phase.seconds)
        # The load's value is written above the trace; the idle one on its line, where the load leaves room.
        height = max(watts, *series.within(widest)) if above else watts
        text = axes.annotate(
            words, ((widest.start + widest.stop) / 2, height), (0, 1.5), textcoords="offset points", ha="center",
            va="bottom", fontsize=6, zorder=6, bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        )  # fmt: skip
        # Beside a short load at the end it would cover the numbers of the other axis.
        half = (self.inches(text) / 2 + 0.02) * (self.stop - self.start) / (WIDTH - self.left - self.right)
        text.xy = (min(max(text.xy[0], self.start + half), self.stop - half), height)
        return text

    def _draw_speed(self, axes: Axes, watts: float | None) -> None:
        """Tiles/s; if ``watts`` is given, the top of the power axis, at a height where power is not."""
        top = curves.throughput_top(self.windows, curves.levels(self.run, watts) if watts else None)
        axes.set_ylim(0, top)
        if top >= 10_000:  # written 12k: there is no room for more digits
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel("Throughput (tiles/s)", labelpad=3 if watts else 2, color=SPEED)
        axes.tick_params(axis="y", colors=SPEED)
        dash: Any = (0, (6, 1.5, 1, 1.5)) if watts else "-"
        for one in self.windows:
            axes.stairs(one.tiles_per_second, one.edges, baseline=None, color=SPEED, linewidth=1.1, linestyle=dash)
        length = curves.typical_window(self.windows)
        label = f"tiles/s over {length:.2g} s" if length < 100 else f"tiles/s over {length:.0f} s"
        self.handles.append(Line2D([], [], color=SPEED, linestyle=dash, linewidth=1.1, label=label))

    def _draw_latency(self, axes: Axes) -> None:
        highest = usual = 0.0
        for one in self.windows:
            low, middle, high = one.latency_ms.T
            axes.stairs(high, one.edges, baseline=low, fill=True, color="#9ecae1", linewidth=0)
            axes.stairs(middle, one.edges, baseline=None, color=POWER, linewidth=0.9)
            highest, usual = max(highest, float(high.max())), max(usual, float(middle.max()))
        axes.set_ylim(0, max(highest * 1.15, 1e-6))
        axes.set_ylabel("Latency (ms)", labelpad=2)
        logarithmic = highest > 20 * usual > 0  # one batch would press all others onto the axis
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(max(min(float(one.latency_ms.min()) for one in self.windows) / 2, 1e-6), highest * 2)
            axes.yaxis.set_minor_locator(NullLocator())
        if logarithmic or highest >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        self.handles.append(Patch(facecolor="#9ecae1", edgecolor=POWER, linewidth=0, label="latency: median, range"))

    def _draw_heat(self, axes: Axes) -> None:
        assert self.heat is not None
        name, series = self.heat
        self._draw_series(axes, series, "black", "-", 0.7)
        low, high = min(series.values), max(series.values)
        margin = max(1.0, 0.15 * (high - low))
        axes.set_ylim(low - margin, high + margin)
        axes.set_ylabel(drawable(f"{name} (°C)", 14), labelpad=2)
        axes.locator_params(axis="y", nbins=3)

    def _draw_legend(self, room: float) -> float:
        """Draw the legend row by row below the panels, in ``room`` inches; return the height that is left."""
        had = {phase.name for phase in self.run.summary.phases} if self.labels_dropped else ()
        handles = [Patch(fc=TRACK[name], ec=GREY, linewidth=0.3, label=name) for name in TRACK if name in had]
        handles = [*self.handles, *handles]
        columns = min(self.legend_columns, len(handles))
        legend = self.figure.legend(
            handles=[handle for first in range(columns) for handle in handles[first::columns]], frameon=False,
            loc="upper center", bbox_to_anchor=(0.5, room / self.height), ncols=columns, borderpad=0, borderaxespad=0.6,
            handlelength=2.2, columnspacing=1.2, labelspacing=0.25, handletextpad=0.5,
        )  # fmt: skip
        return float(legend.get_window_extent(self.renderer()).y0) / DPI - 0.05
