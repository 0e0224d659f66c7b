"""Benchmark runs as folders, with figures that a test chooses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scene_helpers import engine_manifest

from cdkd_edge.benchmark.folder import TimedBatch, write_conditions, write_summary, write_tiles, write_trace
from cdkd_edge.benchmark.record import (
    BenchSummary,
    EndToEnd,
    Figures,
    ModelledBound,
    Phase,
    PowerFigures,
    Protocol,
    RailFigures,
    RailRepeat,
    Repeat,
    Verdict,
)
from cdkd_edge.benchmark.results import rejected
from cdkd_edge.benchmark.statistics import figure_of, latency_of
from cdkd_edge.board.conditions import Conditions
from cdkd_edge.board.power.energy import Trace
from cdkd_edge.board.power.protocol import MODULE, WATTS, Sample, SourceInfo
from cdkd_edge.board.throttling import summarise
from cdkd_edge.core.machine import Machine

TILE = 1024


CONDITIONS = summarise(
    [
        Conditions(
            float(second),
            temperatures={"tj-thermal": 47.0 + second},
            clocks_mhz={"gpu": 918.0, "emc": 3199.0},
            clock_limits_mhz={"gpu": 918.0},
            fan={"percent": 31.4, "rpm": 1800.0},
            throttle_events={"oc1": 0, "oc2": 4},
            power_mode="MAXN",
            memory_available_bytes=8 << 30,
        )
        for second in range(24)
    ],
    0.0,
    30.0,
)
"""As a benchmark on a board records them."""


def make_run(
    folder: Path,
    *,
    fps: float = 2.5,
    idle: float = 5.74,
    load: float = 18.95,
    repeats: int = 1,
    seconds: float = 60.0,
    idle_seconds: float = 10.0,
    warm_up: float = 20.0,
    spread: float = 0.0,
    power: bool = True,
    scope: str = MODULE,
    mode: str | None = "MAXN",
    engine: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> BenchSummary:
    """Write a run of an engine of ``fps`` tiles/s; ``changes`` replace fields of its summary.

    Repeats differ by ``spread`` (standard deviation relative to the mean) in speed and watts.
    """
    random = np.random.default_rng(seed)
    speeds = fps * (1 + spread * random.standard_normal(repeats))
    loads = load * (1 + spread * random.standard_normal(repeats))
    spans: list[Phase] = []
    batches: list[TimedBatch] = []
    records = []
    clock = 0.5
    for repeat in range(repeats):
        for name, length in (("idle", idle_seconds), ("warm-up", warm_up), ("load", seconds)):
            spans.append(Phase(name, repeat, clock, clock + length))  # type: ignore[arg-type]
            if name != "idle":
                count = max(1, int(length * speeds[repeat]))
                latencies = length / count * (1 + 0.02 * random.random(count))
                starts = clock + np.arange(count) * length / count
                batches += [
                    TimedBatch(repeat, name, float(s), float(t)) for s, t in zip(starts, latencies, strict=True)
                ]
            clock += length
        own = [batch.latency for batch in batches if (batch.repeat, batch.phase) == (repeat, "load")]
        rail = RailRepeat(idle, idle, idle, float(loads[repeat]), float(loads[repeat]) * seconds, 1.0, 0.5)
        records.append(
            Repeat(
                True,
                warm_up,
                len(own),
                seconds,
                len(own) / seconds,
                latency_of(own),
                {"VDD_IN": rail} if power else None,
            )
        )
    spans.append(Phase("idle", repeats, clock, clock + idle_seconds))

    rates = [record.tiles_per_second for record in records]
    nets = [float(watts) - idle for watts in loads]
    mega = TILE * TILE / 1e6
    rails = RailFigures(
        idle_watts=figure_of([idle] * repeats),
        load_watts=figure_of([float(watts) for watts in loads]),
        net_watts=figure_of(nets),
        gross_joules_per_tile=figure_of([float(w) / r for w, r in zip(loads, rates, strict=True)]),
        net_joules_per_tile=figure_of([n / r for n, r in zip(nets, rates, strict=True)]),
        gross_joules_per_megapixel=figure_of([float(w) / r / mega for w, r in zip(loads, rates, strict=True)]),
        net_joules_per_megapixel=figure_of([n / r / mega for n, r in zip(nets, rates, strict=True)]),
    )
    figures = Figures(
        tiles_per_second=figure_of(rates),
        megapixels_per_second=figure_of([rate * mega for rate in rates]),
        latency_ms=latency_of([batch.latency for batch in batches if batch.phase == "load"]),
        power=PowerFigures("jtop", scope, "the module", "VDD_IN", {"VDD_IN": rails}, 10.0, 0, 0, 0.0, ())
        if power
        else None,
        power_reason="" if power else "not asked for (--power-trace)",
    )
    summary = BenchSummary(
        verdict=Verdict("valid", ()),
        figures=figures,
        engine=replace(engine_manifest(TILE), **(engine or {})),
        protocol=Protocol("default", idle_seconds, seconds, repeats, 5.0, 120.0, 5),
        phases=tuple(spans),
        repeats=tuple(records),
        end_to_end=EndToEnd("drawn", 3000, 2000, 12, 5.0, 4.9, 2.4, 1.2, 5.0 / 4.9),
        roofline=ModelledBound("orin-nx-16gb", "MAXN", "fp16", 12.6, (9.5, 14.8), fps / 12.6),
        roofline_reason="",
        machine=Machine(**_machine()),
        board={"model": "emulated", "power_mode": {"id": 0, "name": mode}, "l4t": "R36.4.3"} if mode else None,
        conditions=copy.deepcopy(CONDITIONS),
        libraries={"python": "3.11"},
        peak_memory_bytes=10**9,
        started="2026-11-22T10:00:00+00:00",
        origin=0.0,
        command="cdkd-edge bench --power-trace",
    )
    summary = replace(summary, **changes)
    if summary.figures is None:
        summary = replace(summary, repeats=(), rejected_repeats=tuple(map(rejected, summary.repeats)))
    folder.mkdir(parents=True)
    write_summary(folder, summary)
    write_tiles(folder, batches)
    if power:
        write_trace(folder, _trace(spans, idle, [float(w) for w in loads], clock + idle_seconds), spans, 0.0)
    write_conditions(
        folder, [(t, {"tj_celsius": 70 - 20 * math.exp(-t / 40), "gpu_mhz": 918.0}) for t in range(int(clock))]
    )
    return summary


def _trace(spans: list[Phase], idle: float, loads: list[float], stop: float) -> Trace:
    """Watts at 10 Hz."""
    info = SourceInfo("jtop", MODULE, "the module", WATTS, ("VDD_IN",), "VDD_IN", 0.1)
    samples = []
    for moment in np.arange(0.05, stop, 0.1):
        span = next((span for span in spans if span.start <= moment < span.stop), None)
        watts = idle if span is None or span.name == "idle" else loads[span.repeat]
        samples.append(Sample(float(moment), 0.001, {"VDD_IN": watts + 0.2 * math.sin(moment * 7)}))
    return Trace(info, tuple(samples), (), 0.0, stop)


def _machine() -> dict[str, Any]:
    import dataclasses

    from cdkd_edge.core.machine import describe_machine

    return dataclasses.asdict(describe_machine())
