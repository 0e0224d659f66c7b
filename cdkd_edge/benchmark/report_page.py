"""``report.html`` and ``sweep.html``: a run or a sweep as one page without scripts, fonts or pictures from elsewhere.

Text and layout are in ``templates``, the look in ``templates/report.css``; this module prepares the rows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cdkd_edge.benchmark import curves, describe, sweep_table
from cdkd_edge.benchmark.folder import CONDITIONS, LAYERS, PAGE, PICTURE, SUMMARY, TILES, TRACE, Run
from cdkd_edge.benchmark.pareto import sweep_svg
from cdkd_edge.benchmark.picture import histogram_svg, trace_svg
from cdkd_edge.benchmark.record import IDLE, LOAD, BenchSummary, Figures, RejectedRepeat, Repeat
from cdkd_edge.benchmark.sweep_table import Sweep
from cdkd_edge.core.files import write_text
from cdkd_edge.core.manifest import EngineManifest, FileRecord, TensorRTBuild
from cdkd_edge.core.numbers import ABSENT, percent, significant, size

FILES: Final = {
    SUMMARY: "everything on this page, and the values of each repeat, as JSON",
    TILES: "every batch: phase, start, latency",
    TRACE: "every reading of power",
    LAYERS: "the time of every kernel in runs with the runtime's profiler",
    CONDITIONS: "clocks, temperatures and fan against time",
    PICTURE: "the trace as a picture for print",
}

Rows = list[tuple[str, ...]]


def write_report_page(run: Run, path: Path) -> None:
    """Write a run as one HTML file; it links the other files of the run that are in the same folder."""
    from markupsafe import Markup

    latencies = curves.load_latencies_ms(run)
    figures, summary = run.summary.figures, run.summary
    names = {phase.name for phase in summary.phases}
    histogram = histogram_svg(latencies, figures.latency_ms) if figures and len(latencies) else ""
    _write_page(
        path, "report.html", summary=summary, verdict=summary.verdict, engine=summary.engine, protocol=summary.protocol,
        power=figures.power if figures else None, status=describe.status_words(summary),
        device=describe.device_of(summary), has_idle=IDLE in names, has_load=LOAD in names,
        paper=describe.PAPER, paper_device=describe.PAPER_DEVICE, computed=describe.COMPUTED,
        main_figures=describe.main_figures(figures) if figures else [],
        total=describe.total_rail(figures) if figures else None,
        differences=describe.differences(summary), no_power=curves.why_no_power(run),
        trace=Markup(trace_svg(run)), histogram=Markup(histogram),  # matplotlib escapes texts
        repeats=repeat_table(summary), rail_header=["rail", *(one.heading for one in describe.RAIL_FIGURES)],
        rail_rows=rail_rows(figures), scene_rows=describe.scene_rows(summary),
        layer_texts=describe.layer_texts(summary), layer_tables=describe.layer_tables(summary),
        condition_rows=condition_rows(summary), setting_rows=setting_rows(summary),
        engine_rows=engine_rows(summary.engine), machine_rows=machine_rows(summary),
        files=[(name, text) for name, text in FILES.items() if (path.parent / name).exists()],
    )  # fmt: skip


def write_sweep_page(sweep: Sweep, path: Path) -> None:
    """Write a sweep as one HTML file; it links the pages of its runs, which lie below the same folder."""
    from markupsafe import Markup

    header, rows = sweep_table.table(sweep)
    chosen = next((point for point in sweep.points if point.number == sweep.chosen), None)
    pages = {point.number: f"{point.run}/{PAGE}" for point in sweep.points if point.run}
    _write_page(
        path, "sweep.html", sweep=sweep, picture=Markup(sweep_svg(sweep)), header=header,
        rows=[(point, cells, pages.get(point.number)) for point, cells in zip(sweep.points, rows, strict=True)],
        measured=sum(point.measured for point in sweep.points), chosen=chosen, sources=sweep_table.sources(sweep),
        chosen_figures=[f"{name} {cell}" for name, cell in zip(header, rows[chosen.number - 1], strict=True) if name]
        if chosen else [],
        troubles=sweep_table.troubles(sweep), energy=next((p.energy for p in sweep.points if p.energy), None),
        no_energy=next((p.energy_reason for p in sweep.points if p.energy_reason), ""),
        overlaps=sorted({(p.tile, p.overlap) for p in sweep.points if p.measured}),
    )  # fmt: skip


def _write_page(path: Path, template: str, **values: Any) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    texts, strict = PackageLoader("cdkd_edge.benchmark", "templates"), StrictUndefined
    environment = Environment(loader=texts, autoescape=True, undefined=strict, finalize=visible, lstrip_blocks=True)
    environment.filters.update(number=lambda value, digits=4: significant(value, digits), percent=percent)
    page = environment.get_template(template).render(values)
    write_text(path, re.sub(r"\n\s*\n", "\n", page).strip() + "\n")


def visible(value: Any) -> Any:
    """Replace letters that cannot be seen, or that change the direction of writing, by U+FFFD."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn")
    return "".join("\ufffd" if unicodedata.category(one) in hidden and one not in "\n\t" else one for one in value)


def rail_rows(figures: Figures | None) -> Rows:
    """The figures of every rail."""
    if figures is None or figures.power is None:
        return []
    titles = {figures.power.total: f"{figures.power.total} (total)"}
    return [
        (titles.get(name, name), *(one.show(rail) for one in describe.RAIL_FIGURES))
        for name, rail in figures.power.rails.items()
    ]


def repeat_table(summary: BenchSummary) -> tuple[str, list[str], Rows]:
    """Caption, header and rows of the repeats; of an invalid run, only what helps to find the cause."""
    header = ["repeat", "steady", "warm-up, s", "load, s", "tiles"]
    if summary.figures is None:
        rejected = summary.rejected_repeats
        rail = next((next(iter(one.covered)) for one in rejected if one.covered), None)
        rows = [_course(number, one) for number, one in enumerate(rejected)]
        if rail:
            header.append("covered")
            shares = [percent((one.covered or {}).get(rail)) for one in rejected]
            rows = [(*row, share) for row, share in zip(rows, shares, strict=True)]
        return f"{_repeats(len(rows))}; rates, latencies and watts of an invalid run are left out", header, rows
    total = summary.figures.power.total if summary.figures.power else None
    rails = next((one.rails for one in summary.repeats if one.rails), {})
    rail = total if total in rails else next(iter(rails), None)
    header += ["tiles/s", "p50, ms", "p99, ms"]
    if rail:
        header += ["idle before, W", "idle after, W", "load, W", "load, J", "± J", "covered"]
    rows = []
    for number, one in enumerate(summary.repeats):
        values = [one.tiles_per_second, one.latency_ms.p50, one.latency_ms.p99]
        power = (one.rails or {}).get(rail or "")
        if power:
            values += [power.idle_before_watts, power.idle_after_watts, power.load_watts, power.load_joules]
        row = (*_course(number, one), *(significant(value, 4) for value in values))
        more = (significant(power.bound_joules, 2), percent(power.covered)) if power else ()
        rows.append((*row, *more, *[ABSENT] * (len(header) - len(row) - len(more))))
    caption = f"Power of {rail}; ± is the largest error, see Protocol" if rail else _repeats(len(rows))
    return caption, header, rows


def _course(number: int, one: Repeat | RejectedRepeat) -> tuple[str, ...]:
    steady = "yes" if one.steady else "no"
    return (str(number + 1), steady, f"{one.warm_up_seconds:.1f}", f"{one.seconds:.1f}", str(one.tiles))


def _repeats(count: int) -> str:
    return "One repeat" if count == 1 else f"{count} repeats"


_UNITS: Final = {
    "celsius": "°C", "mhz": "MHz", "khz": "kHz", "hz": "Hz", "rpm": "rpm", "percent": "%", "watts": "W", "w": "W",
    "mv": "mV", "bytes": "B", "s": "s",
}  # fmt: skip
_NAMES: Final = {
    "cpu": "CPU", "cuda": "CUDA", "emc": "memory", "gpu": "GPU", "jetpack": "JetPack", "l4t": "L4T", "soc": "SoC",
}  # fmt: skip
_SPREAD: Final = ("min", "mean", "max")
_NOT_IN_TABLE: Final = ("readings", "throttle_events", "power_modes", "memory_available_bytes")


def condition_rows(summary: BenchSummary) -> Rows:
    """Minimum, mean and maximum of clocks, temperatures and fan over the loads."""
    return [
        (_quantity(section, name), *(_text(spread[key]) for key in _SPREAD))
        for section, values in summary.conditions.items()
        if isinstance(values, dict) and section not in _NOT_IN_TABLE
        for name, spread in values.items()
        if _is_spread(spread)
    ]


def setting_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """The settings of the board, and the conditions that have no minimum, mean and maximum."""
    rows = [pair for name, value in (summary.board or {}).items() for pair in _flat(name, _mode_names(value))]
    for section, value in summary.conditions.items():
        if section in _NOT_IN_TABLE:
            rows += _event_rows(section, value)
        elif isinstance(value, dict):
            for name, one in value.items():
                rows += [] if _is_spread(one) else _flat(f"{section} {name}", one)
        else:
            rows += _flat(section, value)
    return rows


def _is_spread(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= set(_SPREAD)


def _quantity(section: str, name: str) -> str:
    """The heading of a row, with its unit."""
    word = _NAMES.get(name, name)
    if section == "clocks_mhz":
        return f"{word} clock, MHz"
    if section == "clock_limits_mhz":
        return f"{word} clock, highest allowed, MHz"
    if section == "temperatures":
        return f"{name.removesuffix('-thermal')}, °C"
    return f"{section}, {_UNITS[name]}" if name in _UNITS else f"{section} {name}"  # fan values are named by unit


def _event_rows(section: str, value: Any) -> Iterator[tuple[str, str]]:
    if section == "memory_available_bytes" and _is_spread(value):
        texts = [size(value[key]) if isinstance(value[key], int | float) else ABSENT for key in _SPREAD]
        yield "memory available", "minimum {}, mean {}, maximum {}".format(*texts)
    elif section == "throttle_events" and isinstance(value, dict) and value:
        yield "throttling counters rose by", ", ".join(f"{name} {_text(rise)}" for name, rise in value.items())
    elif section == "power_modes" and isinstance(value, list) and value:
        yield "power modes during the loads", ", ".join(map(_text, value))


def _mode_names(value: Any) -> Any:
    """Power modes as their names and numbers, also within a list."""
    if isinstance(value, list | tuple):
        return [_mode_names(one) for one in value]
    is_mode = isinstance(value, dict) and value.keys() == {"id", "name"}
    return f"{value['name']} (id {value['id']})" if is_mode else value


def _text(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return significant(value) if isinstance(value, float) else str(value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested names and values as rows."""
    stem, _, last = name.rpartition("_")
    label, unit = (stem, _UNITS[last]) if stem and last in _UNITS else (name, "")
    label = " ".join(_NAMES.get(word, word) for word in label.replace("_", " ").split())
    if isinstance(value, dict) and value:
        if not any(isinstance(item, dict | list) for item in value.values()):
            yield label, ", ".join(f"{key} {_text(item)}" for key, item in value.items())
            return
        for key, item in value.items():
            yield from _flat(f"{name} {key}", item)
    elif isinstance(value, list | tuple):
        yield label, ", ".join(map(_text, value)) or "none"
    else:
        yield label, f"{_text(value)} {unit}".strip()


def engine_rows(engine: EngineManifest) -> list[tuple[str, str]]:
    """What the engine is, and what it was made from."""
    check = engine.graph_check
    classes = engine.labels.get("classes") or ()
    names = [str(one.get("name", one) if isinstance(one, dict) else one) for one in classes]
    checked = (
        f"{percent(check.label_agreement)} of labels the same on {check.tiles} tiles ({check.graph_runtime}, "
        f"{check.network_runtime})"
    )
    return [
        ("name", engine.name),
        ("runtime, precision", f"{engine.runtime}, {engine.precision.upper()}"),
        ("input", f"{engine.batch} x {engine.tile} x {engine.tile} px, {engine.preprocessing.channels}, uint8"),
        ("engine", _file(engine.artefact)),
        ("graph", _file(engine.graph)),
        ("built for", engine.device),
        ("attention", f"{engine.attention_fused} of {engine.attention_blocks} blocks fused"),
        ("build", f"{significant(engine.build_seconds)} s, {engine.created}, {engine.tool}"),
        ("graph against network", checked if check.tiles else "not checked"),
        *([("classes", f"{len(names)}: {', '.join(names)}")] if names else []),
        *(_tensorrt_rows(engine.tensorrt) if engine.tensorrt else []),
        *([("libraries at build", _versions(engine.libraries))] if engine.libraries else []),
    ]


def _file(record: FileRecord) -> str:
    return f"{record.file}, {size(record.bytes)}, SHA-256 {record.sha256}"


def _tensorrt_rows(build: TensorRTBuild) -> list[tuple[str, str]]:
    where = f"{build.gpu}, sm {build.compute_capability}" if build.gpu else f"compiled for {', '.join(build.targets)}"
    where += f", {build.multiprocessors} multiprocessors" if build.multiprocessors else ""
    kinds = ", ".join(f"{count} {name}" for name, count in build.layer_precisions.items())
    flags, cache = ", ".join(build.flags) or "none", "used" if build.timing_cache else "not used"
    workspace, weights, scratch = size(build.workspace_bytes), size(build.weights_bytes), size(build.scratch_bytes)
    return [
        ("TensorRT", f"{build.version}, {where}, CUDA {build.cuda or 'not known'}, L4T {build.l4t or 'not known'}"),
        ("typing", "strong" if build.strongly_typed else "weak"),
        ("builder", f"level {build.optimization_level}, flags {flags}, workspace {workspace}, timing cache {cache}"),
        ("layers", f"{build.layers}" + (f" ({kinds})" if kinds else "")),
        ("memory", f"weights {weights}, scratch {scratch}, layer traffic {size(build.traffic_bytes)} per batch"),
        *(("note", note) for note in build.notes),
    ]


def machine_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """The machine and what ran on it."""
    one = summary.machine
    return [
        ("board", one.board or ABSENT),
        ("CPU", f"{one.cpu}, {one.cores} cores usable"),
        ("memory", size(one.memory_bytes)),
        ("system", f"{one.os}, kernel {one.kernel}" + (f", L4T {one.l4t}" if one.l4t else "")),
        ("libraries", _versions(summary.libraries)),
        *((name, show(summary)) for name, show in describe.FACTS),
    ]


def _versions(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items())
