"""The curves of a run's pictures (rates over windows, lines broken at gaps, thinned but with all peaks), and the
histogram of its latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from cdkd_edge.benchmark.folder import Run, Series
from cdkd_edge.benchmark.record import LOAD, WARM_UP
from cdkd_edge.benchmark.statistics import Latency
from cdkd_edge.board.power.ina3221 import TOTAL
from cdkd_edge.board.power.protocol import longest_step

Floats = npt.NDArray[np.float64]

WINDOWS = 150  # largest number of windows in a run, about
SHORTEST = 1.0  # least length of a window, s


@dataclass(frozen=True)
class Windows:
    """The warm-up or load of a repeat, divided into windows at the starts of batches."""

    repeat: int
    phase: str
    edges: Floats  # ``[W + 1]``: s from the start of the run
    tiles_per_second: Floats  # ``[W]``
    latency_ms: Floats  # ``[W, 3]``: minimum, median, maximum


def bounds(run: Run) -> tuple[float, float]:
    """First and last moment of a run, s. They include 0, the start of the run."""
    ends = [(phase.start, phase.stop) for phase in run.summary.phases]
    ends += [(series.times[0], series.times[-1]) for series in run.watts.values() if series.times]
    ends += [(batch.start, batch.start + batch.latency) for batch in (*run.tiles[:1], *run.tiles[-1:])]
    if not ends:
        return 0.0, 1.0
    start, stop = min(0.0, *(a for a, _ in ends)), max(b for _, b in ends)
    return start, max(stop, start + 1e-3)


def typical_window(found: Sequence[Windows]) -> float:
    """Median length of windows, s; where a batch takes longer than a window, it is the batch's."""
    lengths = np.concatenate([np.diff(one.edges) for one in found]) if found else np.zeros(1)
    return float(np.median(lengths))


def windows(run: Run) -> tuple[Windows, ...]:
    """Tiles per second and latency over windows, for every warm-up and load."""
    groups: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for batch in run.tiles:
        groups.setdefault((batch.repeat, batch.phase), []).append((batch.start, batch.latency))
    start, stop = bounds(run)
    length, tiles = max(SHORTEST, (stop - start) / WINDOWS), run.summary.engine.batch
    return tuple(_windows(*place, np.asarray(sorted(group)), length, tiles) for place, group in groups.items())


def _windows(repeat: int, phase: str, batches: Floats, length: float, tiles: int) -> Windows:
    starts, latencies = batches.T
    firsts = [0]
    while (following := int(np.searchsorted(starts, starts[firsts[-1]] + length - 1e-9))) < len(starts):
        firsts.append(following)
    stop = starts[-1] + latencies[-1]
    if len(firsts) > 1 and stop - starts[firsts[-1]] < length / 2:
        firsts.pop()  # a last window of one or two batches would be noise
    edges = np.append(starts[firsts], stop)
    counts = np.diff([*firsts, len(starts)])
    spread = [(piece.min(), np.median(piece), piece.max()) for piece in np.split(latencies * 1e3, firsts[1:])]
    return Windows(repeat, phase, edges, counts * tiles / np.maximum(np.diff(edges), 1e-9), np.asarray(spread))


def gap_seconds(series: Series) -> float:
    """Longest time between two readings that is not a gap, from their median interval."""
    if len(series.times) < 2:
        return float("inf")
    return longest_step(float(np.median(np.diff(np.sort(series.times)))))


def pieces(series: Series) -> list[tuple[Floats, Floats]]:
    """Times and values between gaps; a piece may be a single reading."""
    order = np.argsort(series.times, kind="stable")
    times, values = np.asarray(series.times)[order], np.asarray(series.values)[order]
    cuts = np.flatnonzero(np.diff(times) > gap_seconds(series)) + 1
    return list(zip(np.split(times, cuts), np.split(values, cuts), strict=True)) if series.times else []


def gaps(series: Series, start: float, stop: float) -> list[tuple[float, float]]:
    """Stretches without readings between ``start`` and ``stop``."""
    limit = gap_seconds(series) if series.times else 0.0
    moments = [start, *(float(end) for times, _ in pieces(series) for end in (times[0], times[-1])), stop]
    return [(a, b) for a, b in zip(moments[::2], moments[1::2], strict=True) if b - a > limit]


def thin(times: Floats, values: Floats, start: float, stop: float, columns: int) -> tuple[Floats, Floats]:
    """At most four points per column of the picture: first, lowest, highest, last, so that peaks are kept."""
    if len(times) <= 4 * columns:
        return times, values
    cuts = np.searchsorted(times, np.linspace(start, stop, columns + 1)[1:-1])
    kept: list[int] = []
    for a, b in pairwise([0, *cuts.tolist(), len(times)]):
        if b > a:
            part = values[a:b]
            kept += sorted({a, a + int(part.argmin()), a + int(part.argmax()), b - 1})
    return times[kept], values[kept]


def power_top(run: Run) -> float:
    """Top of the power axis, W; at least what sensors can tell from zero."""
    highest = max((max(series.values) for series in run.watts.values() if series.values), default=1.0)
    return max(1.2 * highest, 0.1)


def clear_height(occupied: Sequence[float]) -> float:
    """A height in the picture (0 bottom, 1 top) that is far from what is drawn already."""
    return max((0.5, 0.4, 0.6, 0.3, 0.7), key=lambda height: min((abs(height - one) for one in occupied), default=1.0))


def throughput_top(found: Sequence[Windows], occupied: Sequence[float] | None = None) -> float:
    """Top of the tiles/s axis, chosen so that the curve keeps clear of ``occupied`` heights."""
    top = 1.2 * max((float(one.tiles_per_second.max()) for one in found), default=1.0)
    if occupied is not None and found:
        typical = max(float(np.median(one.tiles_per_second)) for one in found)
        top = max(top, typical / clear_height(occupied))
    return max(top, 1e-9)


def levels(run: Run, top: float) -> list[float]:
    """Heights at which power is drawn on an axis up to ``top`` W: the medians of each rail in idle and load phases."""
    phases = [phase for phase in run.summary.phases if phase.name != WARM_UP]
    inside = [series.within(phase) for series in run.watts.values() for phase in phases]
    return [float(np.median(values)) / top for values in inside if values]


def temperature(run: Run) -> tuple[str, Series] | None:
    """Name (without unit) and curve of the junction temperature, or else of the first one."""
    names = [name for name, series in run.conditions.items() if name.endswith("_celsius") and series.times]
    names.sort(key=lambda name: name != "tj_celsius")
    return (names[0].removesuffix("_celsius"), run.conditions[names[0]]) if names else None


def main_rails(run: Run) -> tuple[str, ...]:
    """The rail that contains all others; all rails if none does."""
    power = run.summary.figures.power if run.summary.figures else None
    total = power.total if power else None
    if total in run.watts:
        return (str(total),)
    # The figures name the total, but an invalid run has none.
    return (TOTAL,) if TOTAL in run.watts else tuple(run.watts)


def load_latencies_ms(run: Run) -> Floats:
    """Latency of every batch in the load phases."""
    return np.asarray([batch.latency * 1e3 for batch in run.tiles if batch.phase == LOAD], np.float64)


def why_no_power(run: Run) -> str:
    """Why there are no power readings; empty if there are some."""
    if any(series.times for series in run.watts.values()):
        return ""
    figures = run.summary.figures
    return (figures.power_reason if figures else "") or "there are no readings in the run's folder"


def mean_watts(run: Run) -> dict[str, tuple[float, float]]:
    """Mean watts, idle and load, of the main rails; empty for an invalid run."""
    power = run.summary.figures.power if run.summary.figures else None
    rails = {name: power.rails[name] for name in main_rails(run) if name in power.rails} if power else {}
    return {name: (rail.idle_watts.mean, rail.load_watts.mean) for name, rail in rails.items()}


def histogram(latencies: Floats) -> tuple[Floats, Floats, int]:
    """Counts ``[B]``, edges ``[B + 1]`` in ms, and how many lie above the last edge: at most 1 %, or one."""
    ordered = np.sort(latencies)
    low, high = float(ordered[0]), float(ordered[-1])
    usual = float(ordered[max(0, len(ordered) - 1 - max(1, len(ordered) // 100))])
    spread = max(usual - low, 0.01 * low, 1e-6)
    if high > usual + 2 * spread:  # an outlier must not squeeze all others into one bar
        high = usual + spread / 4
    if high <= low:
        low, high = low - max(low * 0.01, 1e-6), high + max(low * 0.01, 1e-6)
    bins = int(np.clip(2 * len(latencies) ** (1 / 3), 8, 40))  # Rice's rule, within what can be seen
    counts, edges = np.histogram(latencies[latencies <= high], bins, (low, high))
    return counts.astype(np.float64), edges, int((latencies > high).sum())


def draw_histogram(latencies: Floats, latency: Latency) -> Figure:
    """Bars of how often each latency (ms) occurred, with lines at the percentiles."""
    counts, edges, above = histogram(latencies)
    low, high = float(edges[0]), float(edges[-1])
    right = high + (0.16 if above else 0.02) * (high - low)
    figure = Figure(figsize=(3.5, 1.7), dpi=300)
    axes = figure.add_axes((0.13, 0.2, 0.84, 0.62))
    axes.spines["right"].set_visible(False)
    axes.set(xlim=(low, right), ylim=(0, 1.15 * max(counts.max(), above, 1)))
    axes.set_xlabel("Latency (ms)", labelpad=1.5)
    axes.set_ylabel("Batches", labelpad=2)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#0072b2", edgecolor="white", linewidth=0.3)
    if above:  # this bar stands apart
        place = high + 0.1 * (high - low)
        axes.bar(place, above, 0.05 * (high - low), color="#595959")
        axes.text(place, above, str(above), ha="center", va="bottom", fontsize=6)
        transform = axes.get_xaxis_transform()
        axes.text(place, -0.02, f"> {high:.3g}", ha="center", va="top", fontsize=6, transform=transform)
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high - 0.05 * (high - low)])
    row, before = 0, float("-inf")
    for name in ("p50", "p90", "p99"):
        if (value := getattr(latency, name)) is None:
            continue
        x = min(value, high)
        row = row + 1 if x - before < 0.09 * (right - low) else 0  # labels that would overlap are stacked
        before = x
        axes.axvline(x, color="#d55e00", linewidth=0.8, linestyle=(0, (3, 2)))
        axes.annotate(
            name, (x, 1), (0, 1.5 + 7 * row), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
            ha="center", va="bottom", fontsize=6,
        )  # fmt: skip
    return figure
