"""Sections of ``report.html`` that say how a run was made, on what, and of what.

The section of ``report.html`` with clocks, temperatures, fan and the board's settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

from cdkd_edge.bench.page.markup import ABSENT, Html, bullets, figure, joined, number, pairs, size, table, tag
from cdkd_edge.bench.record import IDLE, LOAD, BenchSummary, RejectedRepeat, Repeat
from cdkd_edge.core.manifest import EngineManifest, FileRecord, TensorRTBuild

_UNITS: Final = {
    "celsius": "°C", "mhz": "MHz", "khz": "kHz", "hz": "Hz", "rpm": "rpm", "percent": "%", "watts": "W", "w": "W",
    "mv": "mV", "bytes": "B", "s": "s",
}  # fmt: skip
_NAMES: Final = {
    "cpu": "CPU", "cuda": "CUDA", "emc": "memory", "gpu": "GPU", "jetpack": "JetPack", "l4t": "L4T", "soc": "SoC",
}  # fmt: skip
_SPREAD: Final = {"min", "mean", "max"}
_IN_WORDS: Final = ("readings", "throttle_events", "power_modes", "memory_available_bytes")
"""Conditions that are no rows of the table; the number of readings says nothing that the load's length does not."""


def conditions(summary: BenchSummary) -> Html:
    """Clocks, temperatures and fan over the loads; the board's settings."""
    rows: list[tuple[str, ...]] = []
    others: list[tuple[str, str]] = []
    for section, value in summary.conditions.items():
        if section in _IN_WORDS:
            others += _in_words(section, value)
            continue
        for name, spread in value.items() if isinstance(value, dict) else ():
            if isinstance(spread, dict) and spread.keys() >= _SPREAD:
                rows.append((_quantity(section, name), *(_value(spread[key]) for key in ("min", "mean", "max"))))
            else:
                others += _flat(f"{section} {name}", spread)
        if not isinstance(value, dict):
            others += _flat(section, value)
    parts: list[Any] = []
    if rows:
        parts.append(table("Over the load phases, read once a second", ("", "minimum", "mean", "maximum"), rows))
    settings = [pair for name, value in (summary.board or {}).items() for pair in _flat(name, _named(value))]
    if settings or others:
        parts.append(pairs([*settings, *others]))
    if not any(span.name == LOAD for span in summary.phases):
        parts.append(tag("p", "There was no load: clocks and temperatures until then are in conditions.csv."))
    return joined(parts) if parts else tag("p", "This machine reports no clocks and temperatures.")


def _quantity(section: str, name: str) -> str:
    """What a row of the table is of, with its unit."""
    word = _NAMES.get(name, name)
    if section == "clocks_mhz":
        return f"{word} clock, MHz"
    if section == "clock_limits_mhz":
        return f"{word} clock, highest allowed, MHz"
    if section == "temperatures":
        return f"{name.removesuffix('-thermal')}, °C"
    return f"{section}, {_UNITS[name]}" if name in _UNITS else f"{section} {name}"  # a fan's are named by their unit


def _in_words(section: str, value: Any) -> Iterator[tuple[str, str]]:
    """Those conditions that are no curves; nothing where there was nothing to read."""
    if section == "memory_available_bytes" and isinstance(value, dict) and value.keys() >= _SPREAD:
        texts = [size(value[key]) if isinstance(value[key], int | float) else ABSENT for key in ("min", "mean", "max")]
        yield "memory available", "minimum {}, mean {}, maximum {}".format(*texts)
    elif section == "throttle_events" and isinstance(value, dict) and value:
        yield "throttling counters rose by", ", ".join(f"{name} {_value(rise)}" for name, rise in value.items())
    elif section == "power_modes" and isinstance(value, list) and value:
        yield "power modes during the loads", ", ".join(map(_value, value))


def _named(value: Any) -> Any:
    """A power mode as its name and number, also within a list."""
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    if isinstance(value, dict) and value.keys() == {"id", "name"}:
        return f"{value['name']} (id {value['id']})"
    return value


def _unit(name: str) -> tuple[str, str]:
    """A column's name in words, and the unit it ends in."""
    label, _, last = name.rpartition("_")
    label, unit = (label, _UNITS[last]) if label and last in _UNITS else (name, "")
    return " ".join(_NAMES.get(word, word) for word in label.replace("_", " ").split()), unit


def _value(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 3)
    return str(value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Nested names and values as rows."""
    if isinstance(value, dict) and value:
        plain = [item for item in value.values() if not isinstance(item, dict | list)]
        if len(plain) == len(value):
            yield _unit(name)[0], ", ".join(f"{key} {_value(item)}" for key, item in value.items())
            return
        for key, item in value.items():
            yield from _flat(f"{name} {key}", item)
    elif isinstance(value, list | tuple):
        yield _unit(name)[0], ", ".join(_value(item) for item in value) or "none"
    else:
        label, unit = _unit(name)
        yield label, f"{_value(value)} {unit}".strip()


def device(summary: BenchSummary) -> str:
    """The board, or else the CPU."""
    return str((summary.board or {}).get("model") or summary.machine.board or summary.machine.cpu)


def protocol(summary: BenchSummary) -> Html:
    """One paragraph, and how well power was sampled."""
    one, engine = summary.protocol, summary.engine
    many = one.repeats > 1
    idle = any(span.name == IDLE for span in summary.phases)  # without power there is none
    parts_of_it = [
        *([f"idle for {one.idle_seconds:g} s"] if idle else []),
        f"warm-up until successive windows of at least {one.window_seconds:.3g} s agree, for at most "
        f"{one.warm_up_cap_seconds:g} s",
        f"load for at least {one.load_seconds:g} s and {one.min_batches} batches",
    ]
    course = (f"{one.repeats} times: " if many else "") + "; ".join(parts_of_it)
    words = (
        f"Preset “{one.preset}”. The engine is loaded first and stays loaded. {course[0].upper()}{course[1:]}"
        + ("; idle once more after the last load. " if idle else ". ")
        + f"Tiles come from memory, one batch ({engine.batch} {'tile' if engine.batch == 1 else 'tiles'}) after the "
        "other. "
        + (
            "Idle power is the mean of the idle phases before and after a load, net is load without idle. "
            if idle
            else ""
        )
        + f"Throughput{', latency and power' if idle else ' and latency'} are of the same load phases."
    )
    parts = [tag("p", words)]
    power = summary.figures.power if summary.figures else None
    if power:
        sampled = f"Power: {power.source}, {number(power.readings_per_second, 3)} readings/s; {power.late} late, "
        sampled += f"{power.gaps} gaps of {power.gap_seconds:.1f} s in all. Missing readings are not filled in."
        if power.bound_holds:
            sampled += f" The sampling's bound on joules (±, under Repeats) holds {power.bound_holds}."
        parts.append(tag("p", sampled))
        if power.problems:
            parts += [tag("p", "Met while sampling:"), bullets(power.problems)]
    return joined(parts)


def repeats(summary: BenchSummary) -> Html:
    """A row per repeat; of an invalid run, only what helps to find the cause."""
    if summary.figures is None:
        return _rejected(summary)
    total = summary.figures.power.total if summary.figures.power else None
    rail = next((_rail(one.rails, total) for one in summary.repeats if one.rails), None)
    header = ["repeat", "steady", "warm-up, s", "load, s", "tiles", "tiles/s", "p50, ms", "p99, ms"]
    if rail:
        header += ["idle before, W", "idle after, W", "load, W", "load, J", "± J", "covered, %"]
    rows = []
    for index, one in enumerate(summary.repeats):
        row = [*_course(index, one), number(one.tiles_per_second)]
        row += [number(one.latency_ms.p50), number(one.latency_ms.p99)]
        if rail:
            power = (one.rails or {}).get(rail)
            if power:
                watts = (power.idle_before_watts, power.idle_after_watts, power.load_watts)
                row += [*map(number, watts), number(power.load_joules), number(power.bound_joules, 2)]
            row += [f"{100 * power.covered:.1f}"] if power else [ABSENT] * 6
        rows.append(row)
    one_or_more = "One repeat" if len(rows) == 1 else f"{len(rows)} repeats"
    caption = f"Power of {rail}; ± is the sampling's bound: see Protocol" if rail else one_or_more
    return table(caption, header, rows, class_="wide")


def _rejected(summary: BenchSummary) -> Html:
    """Of an invalid run."""
    if not summary.rejected_repeats:
        return tag("p", "No repeat was finished.")
    rail = next((_rail(one.covered, None) for one in summary.rejected_repeats if one.covered), None)
    header = ["repeat", "steady", "warm-up, s", "load, s", "tiles", *(["covered, %"] if rail else [])]
    rows = []
    for index, one in enumerate(summary.rejected_repeats):
        share = (one.covered or {}).get(rail or "")
        covered = [ABSENT if share is None else f"{100 * share:.1f}"] if rail else []
        rows.append([*_course(index, one), *covered])
    caption = f"{len(rows)} repeats" if len(rows) > 1 else "One repeat"
    return table(f"{caption}; rates, latencies and watts of an invalid run are left out", header, rows, class_="wide")


def _course(index: int, one: Repeat | RejectedRepeat) -> list[str]:
    steady = "yes" if one.steady else "no"
    return [str(index + 1), steady, f"{one.warm_up_seconds:.1f}", f"{one.seconds:.1f}", str(one.tiles)]


def _rail(rails: Collection[str], total: str | None) -> str | None:
    """The total, or else the first rail."""
    return total if total in rails else next(iter(rails), None)


def rails(summary: BenchSummary) -> Html:
    """A row per rail; empty without power."""
    power = summary.figures.power if summary.figures else None
    if power is None:
        return Html("")
    rows = [
        (
            f"{name} (total)" if name == power.total else name,
            figure(rail.idle_watts), figure(rail.load_watts), figure(rail.net_watts),
            figure(rail.gross_joules_per_tile), figure(rail.net_joules_per_tile),
            figure(rail.gross_joules_per_megapixel), figure(rail.net_joules_per_megapixel),
        )
        for name, rail in power.rails.items()
    ]  # fmt: skip
    header = ("rail", "idle, W", "load, W", "net, W", "gross, J/tile", "net, J/tile", "gross, J/MP", "net, J/MP")
    return table(f"{power.source}, {power.scope}: {power.covers}", header, rows, class_="wide")


def end_to_end(summary: BenchSummary) -> Html:
    """A scene from file to label map; empty where none was done."""
    scene = summary.end_to_end
    if scene is None:
        return Html("")
    overhead = "no tile was computed" if scene.overhead is None else f"{scene.overhead:.3f} x the engine's own time"
    rates = f"{number(scene.tiles_per_second)} tiles/s, {number(scene.megapixels_per_second)} MP/s of scene"
    rows = [
        ("scene", f"{scene.scene}, {scene.width} x {scene.height} px, {scene.tiles} tiles"),
        ("time", f"{number(scene.seconds, 3)} s, of which the engine {number(scene.engine_seconds, 3)} s"),
        ("throughput", rates),
        ("the whole", overhead),
    ]
    return pairs(rows)


def bound(summary: BenchSummary) -> Html:
    """The roofline, marked as modelled."""
    mark = tag("p", tag("span", "MODELLED, NOT MEASURED", class_="modelled"))
    model = summary.roofline
    if model is None:
        return tag("p", f"There is no modelled bound: {summary.roofline_reason or 'no reason was recorded'}.")
    low, high = model.expected_tiles_per_second
    share = "no measured figure to compare with"
    # An invalid run's share of the bound would be its throughput by another name.
    if model.share_of_bound is not None and summary.figures is not None:
        share = f"{100 * model.share_of_bound:.1f} % of the bound"
    rows = [
        ("device", f"{model.device}, mode {model.mode}, {model.precision.upper()}"),
        ("bound at peak rates", f"{number(model.bound_tiles_per_second, 3)} tiles/s (modelled)"),
        ("realistic range", f"{number(low, 3)} … {number(high, 3)} tiles/s (modelled)"),
        ("achieved (measured)", share),
    ]
    words = (
        "From the operators of the engine's graph and the device's data sheet; `cdkd-edge roofline` shows the parts."
    )
    return joined([mark, pairs(rows), tag("p", words.replace("`", ""), class_="quiet")])


def engine(manifest: EngineManifest) -> Html:
    """What the engine is, and from what it was made."""
    check = manifest.graph_check
    classes = manifest.labels.get("classes")
    names = [str(one.get("name", one) if isinstance(one, dict) else one) for one in classes or ()]
    checked = f"{100 * check.label_agreement:.4f} % of labels the same on {check.tiles} tiles "
    checked += f"({check.graph_runtime}, {check.network_runtime})"
    rows: list[tuple[object, object]] = [
        ("name", manifest.name),
        ("runtime, precision", f"{manifest.runtime}, {manifest.precision.upper()}"),
        ("input", f"{manifest.batch} x {manifest.tile} x {manifest.tile} px, {manifest.preprocessing.channels}, uint8"),
        ("engine", _file(manifest.artefact)),
        ("graph", _file(manifest.graph)),
        ("built for", manifest.device),
        ("attention", f"{manifest.attention_fused} of {manifest.attention_blocks} blocks fused"),
        ("build", f"{number(manifest.build_seconds, 3)} s, {manifest.created}, {manifest.tool}"),
        ("graph against network", checked if check.tiles else "not checked"),
    ]
    if names:
        rows.append(("classes", f"{len(names)}: {', '.join(names)}"))
    if manifest.tensorrt:
        rows += _tensorrt(manifest.tensorrt)
    if manifest.libraries:
        rows.append(("libraries at build", _versions(manifest.libraries)))
    return pairs(rows)


def _file(record: FileRecord) -> Html:
    return joined([f"{record.file}, {size(record.bytes)}, SHA-256 ", tag("code", record.sha256)])


def _tensorrt(build: TensorRTBuild) -> list[tuple[object, object]]:
    where = f"{build.gpu}, sm {build.compute_capability}" if build.gpu else f"compiled for {', '.join(build.targets)}"
    kinds = ", ".join(f"{count} {name}" for name, count in build.layer_precisions.items())
    builder = f"level {build.optimization_level}, flags {', '.join(build.flags) or 'none'}, workspace "
    builder += f"{size(build.workspace_bytes)}, timing cache {'used' if build.timing_cache else 'not used'}"
    memory = f"weights {size(build.weights_bytes)}, scratch {size(build.scratch_bytes)}, layer traffic "
    return [
        ("TensorRT", f"{build.version}, {where}, CUDA {build.cuda or 'not known'}, L4T {build.l4t or 'not known'}"),
        ("typing", "strong" if build.strongly_typed else "weak"),
        ("builder", builder),
        ("layers", f"{build.layers}" + (f" ({kinds})" if kinds else "")),
        ("memory", memory + f"{size(build.traffic_bytes)} per batch"),
        *(("note", note) for note in build.notes),
    ]


def machine(summary: BenchSummary) -> Html:
    """The machine and what ran on it."""
    one = summary.machine
    rows = [
        ("board", one.board or ABSENT),
        ("CPU", f"{one.cpu}, {one.cores} cores usable"),
        ("memory", size(one.memory_bytes)),
        ("system", f"{one.os}, kernel {one.kernel}" + (f", L4T {one.l4t}" if one.l4t else "")),
        ("libraries", _versions(summary.libraries)),
        ("peak memory of the process, measuring", size(summary.peak_memory_bytes)),
    ]
    return pairs(rows)


def _versions(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items())
