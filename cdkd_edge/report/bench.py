"""What ``cdkd-edge bench`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cdkd_edge.report import Report, plain

if TYPE_CHECKING:
    from cdkd_edge.benchmarks.bench import BenchSummary


def describe_bench(summary: BenchSummary, folder: Path) -> Report:
    """``cdkd-edge bench``."""
    return Report(
        f"benchmark {folder}",
        tuple(bench_rows(summary)),
        {"folder": str(folder), "summary": plain(summary)},
    )


def bench_rows(summary: BenchSummary) -> list[tuple[str, str]]:
    """Of a run, also where it is part of something else."""
    engine, scene, latency = summary.engine_only, summary.end_to_end, summary.engine_only.latency_ms
    overhead = "" if scene.overhead is None else f", {scene.overhead:.3f} x the engine's time"
    rows = [
        ("machine", f"{summary.machine.board or summary.machine.cpu}, {summary.machine.cores} cores"),
        ("engine only", f"{engine.tiles_per_second:.2f} tiles/s, {engine.megapixels_per_second:.2f} MP/s"),
        (
            "latency",
            f"p50 {latency.p50:.1f}, p90 {latency.p90:.1f}, p99 {latency.p99:.1f} ms over {latency.samples} runs",
        ),
        (
            "end to end",
            f"{scene.width} x {scene.height} px in {scene.seconds:.1f} s: {scene.tiles_per_second:.2f} tiles/s, "
            f"{scene.megapixels_per_second:.2f} MP/s" + overhead,
        ),
        ("peak memory", f"{summary.peak_memory_bytes / 1e6:.0f} MB"),
    ]
    if summary.power is None:
        rows.append(("power", f"not measured: {summary.power_reason}"))
    else:
        power = summary.power
        for rail in power.load_watts:
            rows.append(
                (
                    f"power ({power.scope})",
                    f"{rail}: idle {power.idle_watts[rail]:.2f} W, load {power.load_watts[rail]:.2f} W, "
                    f"net {power.net_joules_per_tile[rail]:.2f} J per tile ({power.source})",
                )
            )
        rows += [("", problem) for problem in power.problems]
    return rows
