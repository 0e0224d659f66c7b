"""``report.html``: a run as one page that needs nothing but itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Final

from cdkd_edge.bench import curves
from cdkd_edge.bench.folder import CONDITIONS, PICTURE, SUMMARY, TILES, TRACE, Run
from cdkd_edge.bench.page import sections as facts
from cdkd_edge.bench.page.markup import ABSENT, Html, bullets, escaped, figure, joined, number, table, tag
from cdkd_edge.bench.page.sections import conditions
from cdkd_edge.bench.page.svg import histogram_drawing, rail_classes, trace_drawing
from cdkd_edge.bench.published import ORIN_NX, PAPER, differences
from cdkd_edge.bench.record import INVALID, NOT_STEADY, VALID, BenchSummary, RailFigures
from cdkd_edge.core.files import write_text

WIDE, NARROW = 800, 358
"""Pixels of the drawings: on a desktop or paper, and on a phone of 390 px."""

_MEANING: Final = {
    VALID: "The figures may be quoted.",
    INVALID: "The figures may not be quoted.",
    NOT_STEADY: "The machine had not settled when it was measured: the figures hold for this run alone.",
}
# Should anything get past the escaping, a browser loads and runs nothing.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report_page(run: Run, path: Path) -> None:
    """Write a run as one HTML file without scripts, fonts or pictures from elsewhere.

    It links the other files of the run that lie in the same folder at that moment.

    Raises:
        OSError: it cannot be written.
    """
    sections = [
        ("figures", "Figures", _figures(run.summary)),
        ("trace", "Trace", _trace(run)),
        ("latency", "Latency", _latency(run)),
        ("protocol", "Protocol", facts.protocol(run.summary)),
        ("repeats", "Repeats", facts.repeats(run.summary)),
        ("rails", "Power rails", facts.rails(run.summary)),
        ("scene", "A scene, end to end", facts.end_to_end(run.summary)),
        ("bound", "Modelled bound", facts.bound(run.summary)),
        ("conditions", "Conditions", conditions(run.summary)),
        ("engine", "Engine", facts.engine(run.summary.engine)),
        ("machine", "Machine and libraries", facts.machine(run.summary)),
        ("again", "Files, and how to repeat this", _again(run, path.parent)),
    ]
    shown = [section for section in sections if section[2]]
    style = resources.files("cdkd_edge.bench.page").joinpath("page.css").read_text(encoding="utf-8")
    summary = run.summary
    word = summary.verdict.status.replace("_", " ")
    title = f"{summary.engine.name} on {facts.device(summary)}"
    contents = bullets(tag("a", name, href=f"#{ident}") for ident, name, _ in shown)
    main = joined(
        tag("section", joined([tag("h2", name, id=f"{ident}-title"), body]), id=ident, aria_labelledby=f"{ident}-title")
        for ident, name, body in shown
    )
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            tag("title", f"{title}: {word} — cdkd-edge bench"),
            tag("style", Html(style)),
        ],
        "\n",
    )
    header = joined([tag("h1", title), tag("p", _subtitle(summary), class_="quiet"), _verdict(summary)])
    body = joined(
        [
            tag("header", header),
            tag("nav", contents, aria_label="Contents"),
            tag("main", main),
            tag("footer", tag("p", f"Written by {summary.tool}.", class_="quiet")),
        ],
        "\n",
    )
    page = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    write_text(path, page)


def _subtitle(summary: BenchSummary) -> str:
    engine = summary.engine
    shape = f"{engine.tile} x {engine.tile} px, batch {engine.batch}"
    return f"{engine.precision.upper()}, {engine.runtime}, {shape} · {summary.started.replace('T', ' ')}"


def _verdict(summary: BenchSummary) -> Html:
    verdict = summary.verdict
    sign = {VALID: "✓", INVALID: "✕", NOT_STEADY: "!"}[verdict.status]
    parts = [tag("strong", f"{sign} {verdict.status.replace('_', ' ').upper()}"), tag("p", _MEANING[verdict.status])]
    if verdict.reasons:
        parts.append(bullets(verdict.reasons))
    if verdict.warnings:
        parts += [tag("p", "Warnings:"), bullets(verdict.warnings)]
    return tag("div", joined(parts), class_=f"verdict {verdict.status}", role="status", aria_label="Verdict")


def _figures(summary: BenchSummary) -> Html:
    figures = summary.figures
    if figures is None:
        return tag("p", "An invalid run has no figures. The reasons are given above; the trace may show the cause.")
    rows: list[tuple[object, object, object]] = [
        ("Throughput, tiles/s", figure(figures.tiles_per_second), f"{ORIN_NX.tiles_per_second:g}"),
        ("Throughput, MP/s", figure(figures.megapixels_per_second), _computed(ORIN_NX.megapixels_per_second)),
        ("Latency p50, ms per batch", number(figures.latency_ms.p50), ABSENT),
        ("Latency p99, ms per batch", number(figures.latency_ms.p99), ABSENT),
    ]
    notes = []
    if figures.power is None:
        notes.append(tag("p", f"Power was not measured: {figures.power_reason or 'no reason was recorded'}."))
    else:
        power = figures.power
        rail = power.total or (next(iter(power.rails)) if len(power.rails) == 1 else None)
        if rail in power.rails:
            rows += _power_rows(power.rails[rail])
            notes.append(
                tag("p", f"Power is that of {rail} ({power.scope}: {power.covers}), read through {power.source}.")
            )
        else:
            notes.append(tag("p", "No rail contains the others, so there is no total: see the power rails."))
    count = len(figures.tiles_per_second.values)
    caption = (
        f"Means of {count} repeats, below them the 95 % t-interval"
        if count > 1
        else "One repeat: an interval needs two"
    )
    if summary.verdict.status != VALID:  # a table travels without the page's head
        caption = f"{summary.verdict.status.replace('_', ' ').upper()}. {caption}"
    header = ("quantity", "this run", joined([f"{ORIN_NX.device}, as published", tag("small", PAPER)]))
    return joined([table(caption, header, rows, class_="main"), *notes, _comparable(summary)])


def _power_rows(rail: RailFigures) -> list[tuple[object, object, object]]:
    return [
        ("Idle power, W", figure(rail.idle_watts), f"{ORIN_NX.idle_watts:g}"),
        ("Load power, W", figure(rail.load_watts), f"{ORIN_NX.load_watts:g}"),
        ("Net power, W", figure(rail.net_watts), f"{ORIN_NX.net_watts:.2f}"),
        ("Energy, gross, J/tile", figure(rail.gross_joules_per_tile), _computed(ORIN_NX.gross_joules_per_tile)),
        ("Energy, net, J/tile", figure(rail.net_joules_per_tile), _computed(ORIN_NX.net_joules_per_tile)),
        ("Energy, gross, J/MP", figure(rail.gross_joules_per_megapixel), _computed(ORIN_NX.gross_joules_per_megapixel)),
        ("Energy, net, J/MP", figure(rail.net_joules_per_megapixel), _computed(ORIN_NX.net_joules_per_megapixel)),
    ]


def _computed(value: float) -> Html:
    return joined([f"{value:.3g}", tag("small", "computed")])


def _comparable(summary: BenchSummary) -> Html:
    words = (
        "As published: the figures of the paper (" + PAPER + ") for TensorRT, FP16, 1024 x 1024 px. “Computed” are "
        "18.95 W or 13.21 W over 2.5 images/s, and 1.049 MP per tile. Gross contains idle power, net does not. "
    )
    found = differences(summary)
    if not found:
        return tag("p", words + "Nothing recorded here stands against a comparison.", class_="quiet")
    words += "This run is another measurement; the paper's figures are beside it for orientation only:"
    return joined([tag("p", words), bullets(found)])


def _trace(run: Run) -> Html:
    length = curves.typical_window(curves.windows(run))
    reason = curves.why_no_power(run)
    drawings = [trace_drawing(run, WIDE, "wide-drawing"), trace_drawing(run, NARROW, "narrow")]
    keys = [] if reason else [(name, rail) for rail, name in rail_classes(run).items()]
    keys.append(("speed" if reason else "speed beside", f"tiles/s over {length:.2g} s"))
    main = curves.main_rails(run)[:1]
    if not reason and curves.gaps(run.watts[main[0]], *curves.bounds(run)):
        keys.append(("gap", "no readings"))
    caption = (
        f"Power was not measured: {reason}."
        if reason
        else "Where there are more readings than pixels, the lowest and highest of each column are drawn."
    )
    legend = bullets((joined([_swatch(name), label]) for name, label in keys), "key")
    return tag("figure", joined([Html("".join(drawings)), legend, tag("figcaption", caption)]))


def _swatch(name: str) -> Html:
    shape = (
        f'<rect class="{escaped(name)}" width="26" height="10"/>'
        if name == "gap"
        else f'<polyline class="{escaped(name)}" points="0,5 26,5"/>'
    )
    return Html(f'<svg viewBox="0 0 26 10" aria-hidden="true">{shape}</svg>')


def _latency(run: Run) -> Html:
    figures = run.summary.figures
    if figures is None:
        return Html("")
    latency = figures.latency_ms
    names = ("minimum", "mean", "p50", "p90", "p99", "maximum")
    batch = run.summary.engine.batch
    caption = f"All load phases: {latency.samples} batches of {'one tile' if batch == 1 else f'{batch} tiles'}"
    caption += f"; {latency.absent}" if latency.absent else ""
    rows = [("latency, ms", *(number(getattr(latency, name)) for name in names))]
    parts: list[Any] = [table(caption, ("", *names), rows)]
    measured = curves.load_latencies_ms(run)
    if len(measured):
        words = "Percentiles are observed samples (nearest rank); nothing is clipped or left out."
        drawn = Html(histogram_drawing(measured, latency, NARROW, "histogram"))
        parts.append(tag("figure", joined([drawn, tag("figcaption", words)])))
    return joined(parts)


def _again(run: Run, folder: Path) -> Html:
    described = {
        SUMMARY: "everything on this page, and the per-repeat values, as JSON",
        TILES: "every batch: phase, start, latency",
        TRACE: "every reading of power",
        CONDITIONS: "clocks, temperatures, fan against time",
        PICTURE: "the trace as a picture for print",
    }
    files = [
        joined([tag("a", name, href=name), f": {words}"])
        for name, words in described.items()
        if (folder / name).exists()
    ]
    command = run.summary.command
    return joined(
        [
            tag("pre", tag("code", command)) if command else tag("p", "The run was made from Python."),
            bullets(files) if files else "",
        ]
    )
