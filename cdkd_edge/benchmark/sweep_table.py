"""The record of a sweep, ``sweep.json``: its points, which of them no other beats, and which one is chosen.

``python -m cdkd_edge.benchmark.sweep_table > docs/schemas/sweep-1.json`` writes the published schema; its descriptions
are the docstrings and comments of the fields below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from cdkd_edge import __version__
from cdkd_edge.benchmark import record, statistics
from cdkd_edge.benchmark.compare_checks import power_of
from cdkd_edge.benchmark.statistics import Figure
from cdkd_edge.core.files import converted, read_json, write_text
from cdkd_edge.core.numbers import ABSENT, estimate, percent, significant
from cdkd_edge.raster.grid import default_overlap

SWEEP_VERSION: Final = 1
TABLE, PAGE = "sweep.json", "sweep.html"
MISSING: Final = "missing"
FAILED: Final = "failed"
LOSS = 0.5  # points of mIoU that the chosen point may lie below the best one; the limit of `build --int8` as well


@dataclass(frozen=True)
class PointEnergy:
    """Power and energy of the total rail under load. Gross includes idle power, net does not."""

    source: str
    scope: str  # ``module``, ``GPU board`` or ``CPU package``
    rail: str
    load_watts: Figure
    gross_joules_per_tile: Figure
    net_joules_per_tile: Figure
    gross_joules_per_scene_megapixel: float
    net_joules_per_scene_megapixel: float


@dataclass(frozen=True)
class SweepPoint:
    """One combination, and what was measured of it."""

    number: int  # its number in the table and in the picture, from 1
    source: str  # graph or checkpoint, as it was named
    source_sha256: str
    precision: str
    tile: int | None  # px; null: the checkpoint's own, and it could not be exported
    batch: int
    power_mode: str | None  # the mode that was asked for; null: the one the machine was in
    status: Literal["valid", "not_steady", "invalid", "failed", "missing"]
    """The verdict of the benchmark; ``failed``: there is none, for ``reason``; ``missing``: the sweep ended before."""
    reason: str = ""  # why the point is not valid; empty if it is
    warnings: tuple[str, ...] = ()  # of the benchmark
    attention: str | None = None  # attention of the blocks; null where there is no graph
    runtime: str | None = None  # what runs the engine
    engine: str | None = None  # path of the engine, from the folder of the sweep
    engine_sha256: str | None = None
    run: str | None = None  # folder of the benchmark, from the folder of the sweep
    mean_iou: float | None = None  # on the labelled images, 0..1
    mean_iou_reason: str = ""  # why there is no mIoU; empty if there is
    tiles_per_second: Figure | None = None
    overlap: int | None = None  # of neighbouring tiles, px
    scene_megapixels_per_second: float | None = None
    """Pixels of a scene that the engine labels: tiles/s x (tile - overlap)^2. Unlike tiles/s it compares tiles of
    different sizes."""
    latency_p50_ms: float | None = None  # median latency of a batch
    energy: PointEnergy | None = None
    energy_reason: str = ""  # why there is no energy; empty if there is
    front: bool = False  # no other point is better in one of the compared quantities and as good in the others
    rebuild: tuple[str, ...] = ()  # commands that make its engine again, in this order

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.tiles_per_second is not None


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep."""

    points: tuple[SweepPoint, ...]
    device: str
    data: str | None  # folder of the labelled images; null: no mIoU was asked for
    images: int  # number of these images
    command: str  # the command line
    front_of: tuple[str, ...] = ()  # the quantities that the points of the front are compared by
    chosen: int | None = None  # number of the chosen point; null: nothing was measured
    rule: str = ""  # why it was chosen
    tool: str = f"cdkd-edge {__version__}"
    sweep_version: Literal[1] = 1


def measured_point(point: SweepPoint, summary: record.BenchSummary, overlap: int | None) -> SweepPoint:
    """The point with the figures and the verdict of its benchmark.

    Args:
        overlap: of neighbouring tiles in a scene, px. Default: that of `segment`.
    """
    verdict, figures, tile = summary.verdict, summary.figures, summary.engine.tile
    point = replace(
        point, status=verdict.status, reason="; ".join(verdict.reasons), warnings=verdict.warnings, tile=tile,
        runtime=summary.engine.runtime, batch=summary.engine.batch,
    )  # fmt: skip
    if figures is None:
        return point
    overlap = default_overlap(tile) if overlap is None else overlap
    covered = (tile - overlap) ** 2 / 1e6  # megapixels of a scene per tile
    energy, power = None, power_of(summary)
    if power and power.total:
        rail = power.rails[power.total]
        gross, net = rail.gross_joules_per_tile, rail.net_joules_per_tile
        what = power.source, power.scope, power.total, rail.load_watts
        energy = PointEnergy(*what, gross, net, gross.mean / covered, net.mean / covered)
    return replace(
        point, tiles_per_second=figures.tiles_per_second, overlap=overlap,
        scene_megapixels_per_second=figures.tiles_per_second.mean * covered, latency_p50_ms=figures.latency_ms.p50,
        energy=energy, energy_reason="" if energy else figures.power_reason or "there is no total rail",
    )  # fmt: skip


@dataclass(frozen=True)
class PointQuantity:
    """A quantity that points are compared by."""

    name: str
    sign: int  # 1: more is better; -1: less is better
    of: Callable[[SweepPoint], float | None]  # its value; None where it was not measured


SPEED = PointQuantity("megapixels of a scene per second", 1, lambda point: point.scene_megapixels_per_second)
SCORE = PointQuantity("mIoU", 1, lambda point: point.mean_iou)
ENERGY = PointQuantity(
    "gross joules per megapixel of a scene", -1,
    lambda point: point.energy.gross_joules_per_scene_megapixel if point.energy else None,
)  # fmt: skip


def compared_quantities(points: Sequence[SweepPoint]) -> tuple[PointQuantity, ...]:
    """The quantities that were measured of at least one point. Energies of different scopes are not compared."""
    measured = [point for point in points if point.measured]
    found = [one for one in (SCORE, SPEED, ENERGY) if any(one.of(point) is not None for point in measured)]
    if len({(point.energy.scope, point.energy.rail) for point in measured if point.energy}) > 1:
        found.remove(ENERGY)
    return tuple(found)


def unbeaten(values: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the tuples that no other beats: as good in every place (more is better), and not equal."""

    def beaten(one: tuple[float, ...]) -> bool:
        return any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in values)

    return [index for index, one in enumerate(values) if not beaten(one)]


def judged(sweep: Sweep, loss: float = LOSS) -> Sweep:
    """The sweep with its front and the chosen point: the fastest whose mIoU is at most ``loss`` points below the best.

    Points whose benchmark is valid are preferred to those that were not steady. A point that lacks a quantity that
    others have is not on the front.
    """
    quantities = compared_quantities(sweep.points)
    rows = {
        point.number: tuple(one.sign * value for one in quantities if (value := one.of(point)) is not None)
        for point in sweep.points
        if point.measured
    }
    complete = [number for number, row in rows.items() if len(row) == len(quantities)]
    front = {complete[index] for index in unbeaten([rows[number] for number in complete])}
    points = tuple(replace(point, front=point.number in front) for point in sweep.points)
    found = [point for point in points if point.measured]
    scores = [point.mean_iou for point in found if point.mean_iou is not None]
    rule = "the fastest in megapixels of a scene per second"
    if scores:
        found = [p for p in found if p.mean_iou is not None and 100 * (max(scores) - p.mean_iou) <= loss + 1e-9]
        rule += f" of those whose mIoU is at most {loss:g} points below the best"
    if any(point.status == record.VALID for point in found):
        found = [point for point in found if point.status == record.VALID]
        rule += ", with a valid benchmark"
    chosen = max(found, key=_speed_then_energy, default=None)
    names = tuple(one.name for one in quantities)
    number = chosen.number if chosen else None
    return replace(sweep, points=points, front_of=names, chosen=number, rule=rule if chosen else "")


def _speed_then_energy(point: SweepPoint) -> tuple[float, float]:
    return SPEED.of(point) or 0.0, -(ENERGY.of(point) or 0.0)


def failures(sweep: Sweep) -> list[SweepPoint]:
    """Points without a figure that was asked for."""
    return [one for one in sweep.points if not one.measured or (sweep.data and one.mean_iou is None)]


# --- how it is shown ------------------------------------------------------------------------------


def source_names(sweep: Sweep) -> dict[str, str]:
    """A short name for each graph and checkpoint: that of the file, or its path where names are not unique."""
    paths = list(dict.fromkeys(point.source for point in sweep.points))
    short = [Path(path).stem for path in paths]
    return dict(zip(paths, short if len(set(short)) == len(paths) else paths, strict=True))


def table(sweep: Sweep) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of the table of all points. Columns that would be empty are left out."""
    names, points = source_names(sweep), sweep.points
    has_mode, has_energy = any(p.power_mode for p in points), any(p.energy for p in points)
    columns: list[tuple[str, bool, Callable[[SweepPoint], str]]] = [
        ("point", True, lambda p: str(p.number)),
        ("graph", True, lambda p: names[p.source]),
        ("precision", True, lambda p: p.precision),
        ("runtime", len({p.runtime for p in points if p.runtime}) > 1, lambda p: p.runtime or ABSENT),
        ("tile", True, lambda p: f"{p.tile or ABSENT}" + (f" x {p.batch}" if p.batch > 1 else "")),
        ("power mode", has_mode, lambda p: p.power_mode or ABSENT),
        ("verdict", True, lambda p: p.status.replace("_", " ")),
        (SCORE.name, bool(sweep.data), lambda p: percent(p.mean_iou, 2)),
        ("tiles/s", True, lambda p: _figure(p.tiles_per_second)),
        ("MP/s of a scene", True, lambda p: significant(p.scene_megapixels_per_second)),
        ("p50, ms", True, lambda p: significant(p.latency_p50_ms, 4)),
        ("load, W", has_energy, lambda p: _figure(p.energy.load_watts if p.energy else None)),
        ("J/tile", has_energy, lambda p: _figure(p.energy.gross_joules_per_tile if p.energy else None)),
        ("J/MP of a scene", has_energy, lambda p: significant(ENERGY.of(p))),
        ("", True, lambda p: "take" if p.number == sweep.chosen else "front" if p.front else ""),
    ]
    shown = [(name, show) for name, there, show in columns if there]
    return tuple(name for name, _ in shown), tuple(tuple(show(point) for _, show in shown) for point in points)


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ABSENT
    span = figure.interval
    return estimate(figure.mean, span.low, span.high) if span else significant(figure.mean)


def troubles(sweep: Sweep) -> list[tuple[str, str]]:
    """Points and why they have no figures, no mIoU, or not valid ones; points with the same reason are named once."""
    found: dict[str, list[str]] = {}
    for point in sweep.points:
        for reason in filter(None, (point.reason, point.mean_iou_reason and f"no mIoU: {point.mean_iou_reason}")):
            found.setdefault(reason, []).append(str(point.number))
    return [(f"point{'s' if len(who) > 1 else ''} {', '.join(who)}", reason) for reason, who in found.items()]


def sources(sweep: Sweep) -> list[tuple[str, str]]:
    """The graphs and checkpoints by their short names, with their attention."""
    found: dict[str, str] = {}
    for point in sweep.points:
        attention = f", attention: {point.attention}" if point.attention else ""
        found.setdefault(point.source, f"{point.source}{attention}")
    names = source_names(sweep)
    return [(names[path], text) for path, text in found.items()]


def kept(folder: Path) -> str:
    """How far a sweep came, for who interrupts it."""
    try:
        points = read_sweep(folder).points
    except (OSError, ValueError):
        return "the same command starts again"
    count = sum(point.status not in (MISSING, FAILED) for point in points)
    return f"{count} of {len(points)} points are measured and kept; the same command goes on"


# --- the file -------------------------------------------------------------------------------------


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write ``sweep.json``."""
    import msgspec

    write_text(folder / TABLE, msgspec.json.format(msgspec.json.encode(sweep), indent=2).decode() + "\n")


def read_sweep(folder: Path) -> Sweep:
    """Read ``sweep.json``; OSError or ValueError if it cannot be read."""
    return converted(read_json(folder / TABLE), Sweep)


def sweep_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``sweep.json``."""
    modules = sys.modules[__name__], statistics
    return record.schema_of(Sweep, modules, "Sweep of cdkd-edge", "sweep", SWEEP_VERSION)


if __name__ == "__main__":
    import json

    sys.stdout.write(json.dumps(sweep_schema(), indent=2, ensure_ascii=False) + "\n")
