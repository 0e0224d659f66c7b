"""What ``cdkd-edge bench`` shows: a line while it measures, then one table."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.cli.show.live import lines
from cdkd_edge.cli.show.table import Console, Listing, Report, cell, plain
from cdkd_edge.core.signals import check

if TYPE_CHECKING:
    from cdkd_edge.bench.course import Live
    from cdkd_edge.bench.record import BenchSummary, Figures
    from cdkd_edge.bench.statistics import Figure


def describe_bench(summary: BenchSummary, folder: Path) -> Report:
    """``cdkd-edge bench``."""
    return Report(
        f"benchmark {folder}",
        tuple(bench_rows(summary)),
        {"folder": str(folder), "summary": plain(summary)},
        _beside_the_paper(summary),
    )


def bench_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """Of a run, also where it is part of something else."""
    verdict, protocol, engine = summary.verdict, summary.protocol, summary.engine
    idle = f"{protocol.idle_seconds:g} s idle, " if any(span.name == "idle" for span in summary.phases) else ""
    warm_ups = [f"{span.seconds:.0f}" for span in summary.phases if span.name == "warm-up"]
    times = f", {protocol.repeats} times" if protocol.repeats > 1 else ""
    rows = [
        ("verdict", verdict.status.replace("_", " ").upper() if verdict.reasons else verdict.status),
        *(("", reason) for reason in verdict.reasons),
        *(("note", warning) for warning in verdict.warnings),
        ("machine", f"{summary.machine.board or summary.machine.cpu}, {summary.machine.cores} cores" + _mode(summary)),
        ("engine", f"{engine.artefact.file}, {engine.precision}, {engine.batch} x {engine.tile} px, {engine.runtime}"),
        ("protocol", f"{idle}{', '.join(warm_ups) or 0} s warm-up, {protocol.load_seconds:g} s load{times}"),
    ]
    if summary.figures is None:
        return [*rows, ("figures", "none: the run is invalid (--keep-invalid gives them all the same)")]
    figures = summary.figures
    latency = figures.latency_ms
    percentiles = (("p50", latency.p50), ("p90", latency.p90), ("p99", latency.p99))
    rows += [
        (
            "engine only",
            f"{_figure(figures.tiles_per_second)} tiles/s, {figures.megapixels_per_second.mean:.2f} MP/s",
        ),
        (
            "latency",
            ", ".join(f"{name} {value:.{_decimals(value)}f}" for name, value in percentiles if value is not None)
            + f" ms over {latency.samples} runs"
            + (f"; {latency.absent}" if latency.absent else ""),
        ),
        *_power_rows(summary, figures),
        *_scene_rows(summary),
        *_bound_rows(summary),
        ("peak memory", f"{summary.peak_memory_bytes / 1e6:.0f} MB"),
        *_caveats(summary),
    ]
    return rows


def _mode(summary: BenchSummary) -> str:
    if not summary.board:
        return ""
    mode, clocks = summary.board.get("power_mode"), summary.board.get("jetson_clocks")
    return (f", {mode['name']}" if mode else ", power mode unknown") + (", jetson_clocks" if clocks else "")


def _figure(figure: Figure) -> str:
    """A mean, with its interval if there is one."""
    digits = _decimals(figure.mean)
    text = f"{figure.mean:.{digits}f}"
    if figure.interval is not None:
        text += f" ({figure.interval.low:.{digits}f} .. {figure.interval.high:.{digits}f})"
    return text


def _decimals(value: float) -> int:
    """Two, and more of what is small: at least three digits that say something, as far as a millionth."""
    return 2 if abs(value) < 1e-4 else max(2, 2 - math.floor(math.log10(abs(value))))


def _power_rows(summary: BenchSummary, figures: Figures) -> list[tuple[str, str]]:
    power = figures.power
    if power is None:
        return [("power", f"not measured: {figures.power_reason}")]
    rows = []
    for rail, one in power.rails.items():
        gross, net = one.gross_joules_per_tile.mean, one.net_joules_per_tile.mean
        rows.append(
            (
                f"power ({power.scope})",
                f"{rail}: idle {_figure(one.idle_watts)} W, load {_figure(one.load_watts)} W, net "
                f"{_figure(one.net_watts)} W; per tile {gross:.{_decimals(gross)}f} J gross, "
                f"{net:.{_decimals(net)}f} J net",
            )
        )
    gaps = f", {power.gaps} gaps of {power.gap_seconds:.1f} s together" if power.gaps else ", no gap"
    rows.append(("", f"{power.source}: {power.covers}; {power.readings_per_second:.1f} readings/s{gaps}"))
    rail = power.total or next(iter(power.rails))
    shares = [
        one.rails[rail].bound_joules / one.rails[rail].load_joules
        for one in summary.repeats
        if one.rails and one.rails[rail].load_joules > 0
    ]
    if shares and power.bound_holds:
        rows.append(("", f"load joules of {rail} within {100 * max(shares):.2g} %, {power.bound_holds}"))
    return rows


def _scene_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    scene = summary.end_to_end
    if scene is None:
        return []
    overhead = "" if scene.overhead is None else f", {scene.overhead:.3f} x the engine's time"
    return [
        (
            "end to end",
            f"{scene.width} x {scene.height} px in {scene.seconds:.1f} s: {scene.tiles_per_second:.2f} tiles/s, "
            f"{scene.megapixels_per_second:.2f} MP/s" + overhead,
        )
    ]


def _bound_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    bound = summary.roofline
    if bound is None:
        return [("roofline", f"none: {summary.roofline_reason}")]
    low, high = bound.expected_tiles_per_second
    share = "" if bound.share_of_bound is None else f"{bound.share_of_bound:.0%} of "
    return [
        (
            "roofline",
            f"{share}{bound.bound_tiles_per_second:.1f} tiles/s, MODELLED ({bound.device}, {bound.mode}, "
            f"{bound.precision}; expected {low:.1f} .. {high:.1f})",
        )
    ]


def _caveats(summary: BenchSummary) -> list[tuple[str, str]]:
    """What stands between this run and the paper's figures beside it."""
    from cdkd_edge.bench.published import differences

    if summary.figures is None or summary.figures.power is None:
        return []
    return [("unlike the paper" if not number else "", text) for number, text in enumerate(differences(summary))]


def _beside_the_paper(summary: BenchSummary) -> Listing | None:
    """The paper's figures beside those of a run that has power figures."""
    from cdkd_edge.bench.published import ORIN_NX, PAPER

    figures = summary.figures
    if figures is None or figures.power is None or figures.power.total is None:
        return None
    one = figures.power.rails[figures.power.total]
    pairs = (
        ("tiles/s", figures.tiles_per_second, ORIN_NX.tiles_per_second),
        ("idle W", one.idle_watts, ORIN_NX.idle_watts),
        ("load W", one.load_watts, ORIN_NX.load_watts),
        ("net W", one.net_watts, ORIN_NX.net_watts),
        ("J per tile, gross", one.gross_joules_per_tile, ORIN_NX.gross_joules_per_tile),
        ("J per tile, net", one.net_joules_per_tile, ORIN_NX.net_joules_per_tile),
        ("J per MP, gross", one.gross_joules_per_megapixel, ORIN_NX.gross_joules_per_megapixel),
    )
    rows = tuple((name, _figure(figure), f"{paper:.2f}") for name, figure, paper in pairs)
    return Listing(("", "this run", f"{ORIN_NX.device}, {PAPER}"), rows)


@contextlib.contextmanager
def live_bench() -> Iterator[tuple[Callable[[str], None], Callable[[Live], None]]]:
    """A line on stderr that says what is being measured; drawn only when told, so that it takes no time meanwhile."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines(console) as tell:
            yield tell, lambda live: tell(live_text(live))
        return

    from rich.live import Live as LiveLine

    with LiveLine(console=console, auto_refresh=False, transient=True) as line:

        def draw(text: str) -> None:
            check()
            line.update(cell(text), refresh=True)

        yield draw, lambda live: draw(live_text(live))


def live_text(live: Live) -> str:
    """The line, e.g. ``load 2/3   12.41 tiles/s   18.9 W   61 °C   34 s left``."""
    parts = [live.phase + (f" {min(live.repeat + 1, live.repeats)}/{live.repeats}" if live.repeats > 1 else "")]
    for value, form in (
        (live.tiles_per_second, "{:.2f} tiles/s"),
        (live.watts, "{:.1f} W"),
        (live.celsius, "{:.0f} °C"),
        (live.seconds_left, "{:.0f} s left" if live.phase != "warm-up" else "{:.0f} s left at most"),
    ):
        if value is not None:
            parts.append(form.format(value))
    return "   ".join(parts)
