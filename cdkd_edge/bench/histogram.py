"""The histogram of a run's latencies: its bars, and its drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cdkd_edge.bench.statistics import Latency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]


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
    from matplotlib.figure import Figure

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
        axes.text(
            place, -0.02, f"> {high:.3g}", ha="center", va="top", fontsize=6, transform=axes.get_xaxis_transform()
        )
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high - 0.05 * (high - low)])
    marks = [(f"p{share}", value) for share in (50, 90, 99) if (value := getattr(latency, f"p{share}")) is not None]
    row = 0
    for number, (name, value) in enumerate(marks):
        close = number and min(value, high) - min(marks[number - 1][1], high) < 0.09 * (right - low)
        row = row + 1 if close else 0  # labels that would overlap are stacked
        x = min(value, high)
        axes.axvline(x, color="#d55e00", linewidth=0.8, linestyle=(0, (3, 2)))
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 6}
        axes.annotate(name, (x, 1), (0, 1.5 + 7 * row), xycoords=axes.get_xaxis_transform(), **style)
    return figure
