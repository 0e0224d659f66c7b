"""How the figures of a run are shown: one table, used by the terminal, ``report.html``, and the comparison of runs.

To add a figure: a field in :mod:`.record`, its computation in :mod:`.results` (or :mod:`.run`), and a line in
:data:`SPEEDS`, :data:`LATENCIES`, :data:`RAIL_FIGURES` or :data:`FACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from cdkd_edge.benchmark.record import IDLE, VALID, WARM_UP, BenchSummary, Figures, LayerTime, RailFigures
from cdkd_edge.benchmark.statistics import Figure
from cdkd_edge.board.power.protocol import MODULE
from cdkd_edge.core.numbers import ABSENT, estimate, percent, significant, size

PAPER: Final = "Mask-CDKD, ISPRS 2026"
PAPER_DEVICE: Final = "Orin NX"
# As the paper prints them: side of a tile in px, images/s, W idle, W under load; TensorRT, FP16.
_TILE, _RATE, _IDLE, _LOAD = 1024, 2.5, 5.74, 18.95
_BLOCKS = 12  # attention blocks of the paper's network
_MEGAPIXELS = _TILE**2 / 1e6
# The paper's figures, and those that follow from them, by the names of :class:`Quantity`.
PRINTED: Final = {"tiles_per_second": _RATE, "idle_watts": _IDLE, "load_watts": _LOAD, "net_watts": _LOAD - _IDLE}
COMPUTED: Final = {
    "megapixels_per_second": _RATE * _MEGAPIXELS,
    "gross_joules_per_tile": _LOAD / _RATE,
    "net_joules_per_tile": (_LOAD - _IDLE) / _RATE,
    "gross_joules_per_megapixel": _LOAD / _RATE / _MEGAPIXELS,
    "net_joules_per_megapixel": (_LOAD - _IDLE) / _RATE / _MEGAPIXELS,
}


@dataclass(frozen=True)
class Quantity:
    """A measured quantity: where it is in the record, and how it is shown."""

    path: str  # its attribute in ``Figures`` or ``RailFigures``; the paper's figure has the same name
    title: str
    unit: str

    @property
    def heading(self) -> str:
        """Title and unit, for a table."""
        return f"{self.title}, {self.unit}"

    @property
    def published(self) -> str:
        """The paper's figure as text."""
        value = (PRINTED | COMPUTED).get(self.path)
        return ABSENT if value is None else f"{value:.2f}"

    def show(self, source: Figures | RailFigures) -> str:
        """Its value, with the 95 % interval if there is one."""
        value: Figure | float | None = attrgetter(self.path)(source)
        mean, span = (value.mean, value.interval) if isinstance(value, Figure) else (value, None)
        if mean is None or span is None or span.high - span.low < 1e-9 * abs(mean):  # equal repeats, but for rounding
            return significant(mean, 4)
        return estimate(mean, span.low, span.high, digits=4)


SPEEDS: Final = (
    Quantity("tiles_per_second", "throughput", "tiles/s"),
    Quantity("megapixels_per_second", "throughput", "MP/s"),
)
LATENCIES: Final = (
    Quantity("latency_ms.p50", "latency p50", "ms"),
    Quantity("latency_ms.p90", "latency p90", "ms"),
    Quantity("latency_ms.p99", "latency p99", "ms"),
)
RAIL_FIGURES: Final = (
    Quantity("idle_watts", "idle", "W"),
    Quantity("load_watts", "load", "W"),
    Quantity("net_watts", "net", "W"),
    Quantity("gross_joules_per_tile", "gross", "J/tile"),
    Quantity("net_joules_per_tile", "net", "J/tile"),
    Quantity("gross_joules_per_megapixel", "gross", "J/MP"),
    Quantity("net_joules_per_megapixel", "net", "J/MP"),
)
# Other facts about the measurement: name, and how to print it.
FACTS: Final[tuple[tuple[str, Callable[[BenchSummary], str]], ...]] = (
    ("peak memory", lambda summary: size(summary.peak_memory_bytes)),
)


def total_rail(figures: Figures) -> str | None:
    """The rail that contains all others, or the only one; None without power or without a total."""
    if figures.power is None:
        return None
    rails = figures.power.rails
    rail = figures.power.total or (next(iter(rails)) if len(rails) == 1 else None)
    return rail if rail in rails else None


def main_figures(figures: Figures) -> list[tuple[Quantity, str]]:
    """Speeds, latencies, and the power and energy of the total rail, with their values."""
    rail = total_rail(figures)
    found = [(one, one.show(figures)) for one in (*SPEEDS, *LATENCIES)]
    if figures.power and rail:
        found += [(one, one.show(figures.power.rails[rail])) for one in RAIL_FIGURES]
    return found


def device_of(summary: BenchSummary) -> str:
    """The machine in a few words: board or processor, and the GPU if the engine ran on one."""
    board = str((summary.board or {}).get("model") or summary.machine.board or summary.machine.cpu)
    gpu = summary.engine.tensorrt.gpu if summary.engine.tensorrt else None
    return f"{board}, {gpu}" if gpu and gpu not in board else board


def differences(summary: BenchSummary) -> tuple[str, ...]:
    """How a run differs from the paper's measurement, a phrase each; empty if nothing recorded differs."""
    engine, tile, blocks = summary.engine, summary.engine.tile, summary.engine.attention_blocks
    device = str((summary.board or {}).get("model") or summary.machine.board or summary.machine.cpu)
    scope = summary.figures.power.scope if summary.figures and summary.figures.power else MODULE
    pixels = "attention grows with the square of the pixels, so figures per megapixel differ too"
    facts = (  # whether it is the same, and what to say if not
        (summary.verdict.status == VALID, f"this run is {status_words(summary)}"),
        (PAPER_DEVICE.lower() in device.lower(), f"another device: {device}, not an {PAPER_DEVICE}"),
        (engine.runtime == "tensorrt", f"another runtime: {engine.runtime}, not TensorRT"),
        (engine.precision == "fp16", f"another precision: {engine.precision.upper()}, not FP16"),
        (tile == _TILE, f"another tile: {tile} x {tile} px, not {_TILE} x {_TILE} ({pixels})"),
        (blocks == _BLOCKS, f"another network: {blocks} attention blocks, not {_BLOCKS}"),
        (engine.batch == 1, f"{engine.batch} tiles per batch, not 1"),
        (scope == MODULE, f"another scope of power: {scope}, not the module"),
    )
    return tuple(text for same, text in facts if not same)


def status_words(summary: BenchSummary) -> str:
    """The verdict's status as it is printed: ``not steady``."""
    return summary.verdict.status.replace("_", " ")


def bench_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """A run as rows of name and value."""
    verdict, protocol, engine = summary.verdict, summary.protocol, summary.engine
    idle = f"{protocol.idle_seconds:g} s idle, " if any(phase.name == IDLE for phase in summary.phases) else ""
    warm_ups = [f"{phase.seconds:.0f}" for phase in summary.phases if phase.name == WARM_UP]
    times = f", {protocol.repeats} times" if protocol.repeats > 1 else ""
    words = status_words(summary)
    rows = [
        *_titled("verdict", [words.upper() if verdict.reasons else words, *verdict.reasons]),
        *(("note", warning) for warning in verdict.warnings),
        ("machine", f"{summary.machine.board or summary.machine.cpu}, {summary.machine.cores} cores" + _mode(summary)),
        ("engine", f"{engine.artefact.file}, {engine.precision}, {engine.batch} x {engine.tile} px, {engine.runtime}"),
        ("protocol", f"{idle}{', '.join(warm_ups) or 0} s warm-up, {protocol.load_seconds:g} s load{times}"),
    ]
    figures = summary.figures
    if figures is None:
        return [*rows, ("figures", "none, because the run is invalid (--keep-invalid gives them anyway)")]
    latency = figures.latency_ms
    shown = ", ".join(f"{one.title.removeprefix('latency ')} {one.show(figures)}" for one in LATENCIES)
    absent = f"; {latency.absent}" if latency.absent else ""
    return [
        *rows,
        ("engine only", ", ".join(f"{one.show(figures)} {one.unit}" for one in SPEEDS)),
        ("latency", f"{shown} ms over {latency.samples} batches{absent}"),
        *_power_rows(summary, figures),
        *_titled("end to end", [text for _, text in scene_rows(summary)]),
        ("roofline", _bound_text(summary)),
        *_titled("layers", layer_texts(summary)),
        *((name, show(summary)) for name, show in FACTS),
        *_titled("unlike the paper", differences(summary) if figures.power else ()),
    ]


def _titled(title: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of which the first has the title."""
    return [("" if number else title, text) for number, text in enumerate(texts)]


def _mode(summary: BenchSummary) -> str:
    if not summary.board:
        return ""
    mode, clocks = summary.board.get("power_mode"), summary.board.get("jetson_clocks")
    return (f", {mode['name']}" if mode else ", power mode unknown") + (", jetson_clocks" if clocks else "")


def _power_rows(summary: BenchSummary, figures: Figures) -> list[tuple[str, str]]:
    power = figures.power
    if power is None:
        return [("power", f"not measured: {figures.power_reason}")]
    rows = [
        (f"power ({power.scope})", f"{name}: {', '.join(f'{q.title} {q.show(rail)} {q.unit}' for q in RAIL_FIGURES)}")
        for name, rail in power.rails.items()
    ]
    gaps = f", {power.gaps} gaps of {power.gap_seconds:.1f} s together" if power.gaps else ", no gap"
    rows.append(("", f"{power.source}: {power.covers}; {power.readings_per_second:.1f} readings/s{gaps}"))
    name = power.total or next(iter(power.rails))
    loads = [repeat.rails[name] for repeat in summary.repeats if repeat.rails]
    errors = [load.bound_joules / load.load_joules for load in loads if load.load_joules > 0]
    if errors and power.bound_holds:
        offsets = [load.offset_joules / load.load_joules for load in loads if load.load_joules > 0]
        offset = f" ({100 * max(offsets):.2g} % of it the sensor's offset)" if max(offsets) else ""
        rows.append(("", f"load joules of {name} within {100 * max(errors):.2g} %{offset}, {power.bound_holds}"))
    nets = [load.net_bound_watts for load in loads if load.net_bound_watts is not None]
    if nets:
        cancels = ": the sensor's offset cancels" if any(load.offset_joules for load in loads) else ""
        rows.append(("", f"net watts of {name} within {significant(max(nets), 2)} W in each repeat{cancels}"))
    return rows


def scene_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """The end-to-end time of a scene; no rows if there is none."""
    scene = summary.end_to_end
    if scene is None:
        return []
    rates = f"{significant(scene.tiles_per_second)} tiles/s, {significant(scene.megapixels_per_second)} MP/s"
    overhead = "no tile was run" if scene.overhead is None else f"{scene.overhead:.3f} x the engine's time"
    return [
        ("scene", f"{scene.scene}, {scene.width} x {scene.height} px, {scene.tiles} tiles"),
        ("time", f"{significant(scene.seconds)} s, of which the engine {significant(scene.engine_seconds)} s"),
        ("throughput", f"{rates}; {overhead}"),
    ]


def _bound_text(summary: BenchSummary) -> str:
    bound = summary.roofline
    if bound is None:
        return f"none: {summary.roofline_reason}"
    low, high = bound.expected_tiles_per_second
    share = "" if bound.share_of_bound is None else f"{percent(bound.share_of_bound)} of "
    where = f"{bound.device}, {bound.mode}, {bound.precision}"
    return (
        f"{share}{significant(bound.bound_tiles_per_second)} tiles/s, MODELLED from the engine's {bound.modelled_from} "
        f"({where}; expected {significant(low)} .. {significant(high)})"
    )


def layer_texts(summary: BenchSummary) -> tuple[str, ...]:
    """What the times of layers add up to, and how they were made, a phrase each; empty without them."""
    profile, figures = summary.layers, summary.figures
    if profile is None or figures is None:
        return ()
    models = {
        "": f"no modelled shares: {profile.modelled_reason}",
        "operations": "shares of operations, because there is no model of a CPU",
    }
    return (
        f"{significant(profile.sum_ms)} ms a batch together, {profile.sum_ms / profile.plain_ms:.2f} x a run "
        "without the profiler",
        f"{profile.average}s of {profile.runs} further runs without and with it, in turn: "
        f"{significant(profile.plain_ms)} and {significant(profile.profiled_ms)} ms; the p50 under load was "
        f"{significant(figures.latency_ms.p50)} ms",
        models.get(profile.modelled_from, f"shares MODELLED from the engine's {profile.modelled_from}"),
    )


def layer_tables(summary: BenchSummary) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of the times of layers: of the whole network, and of the dearest; empty without them."""
    profile = summary.layers
    if profile is None:
        return []

    def row(one: LayerTime, name: str) -> tuple[str, ...]:
        shares = percent(one.measured_share), percent(one.modelled_share)
        return (name, str(one.kernels), significant(one.ms), *shares)

    whole = [row(one, one.name + (f" ({one.layers} blocks)" if one.layers > 1 else "")) for one in profile.parts]
    dearest = [row(one, one.name if one.block is None else f"block {one.block}: {one.name}") for one in profile.dearest]
    modelled = "share of operations" if profile.modelled_from == "operations" else "share modelled"
    columns = "kernels", "ms a batch", "share measured", modelled
    return [
        ("where the time goes", ("part", *columns), whole),
        (f"the {len(dearest)} dearest layers", ("layer", *columns), dearest),
    ]


def beside_the_paper(summary: BenchSummary) -> tuple[tuple[str, str, str], ...]:
    """The run's figures beside the paper's: heading, value, published value; empty without a total rail."""
    found = main_figures(summary.figures) if summary.figures and total_rail(summary.figures) else []
    return tuple((one.heading, value, one.published) for one, value in found if one.published != ABSENT)
