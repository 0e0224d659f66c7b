"""What `cdkd-edge roofline` shows. Every figure is named as modelled, in the table and in the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdkd_edge.cli.show.table import Listing, Report

if TYPE_CHECKING:
    from cdkd_edge.bench.roofline.model import Estimate, Roofline
    from cdkd_edge.bench.roofline.operators import GraphCost, Operator

ROOFLINE_VERSION = 1
_LISTED = 15
"""Kernels shown without ``--all``."""


@dataclass(frozen=True)
class RooflineReport(Report):
    """A report with a second table below the first."""

    detail: Report | None = None

    def print(self) -> None:
        """Print both tables to stdout."""
        super().print()
        if self.detail is not None:
            print()
            self.detail.print()


def describe_roofline(found: Roofline, *, every: bool) -> Report:
    """``cdkd-edge roofline``: all modes, or one with its kernels.

    Args:
        found: what was modelled.
        every: list every kernel, not only those that take longest.
    """
    from cdkd_edge.bench.roofline.model import REALISTIC, SPREAD

    one_mode = len({estimate.mode.name for estimate in found.estimates}) == 1
    shares = f"GEMM {REALISTIC.gemm:.2f}, attention {REALISTIC.attention:.2f}, INT8 {REALISTIC.int8:.2f}, DRAM "
    shares += f"{REALISTIC.dram:.2f} of peak (range: {SPREAD:.2f} less and more), {REALISTIC.kernel_seconds * 1e6:.0f}"
    rows = [
        ("device", found.device.title),
        *((f"{cost.precision} graph", _graph_text(cost)) for cost in found.graphs),
        ("bound", "every kernel at peak rate, nothing kept in a cache between kernels"),
        ("realistic", f"assumed: {shares} us per kernel"),
        *(("note", note) for note in found.notes),
    ]
    columns = ("mode", "precision", "attention", "GB moved", "bound FPS", "realistic FPS", "range")
    listing = Listing(columns, tuple(map(_estimate_row, found.estimates)))
    data = {
        "roofline_version": ROOFLINE_VERSION,
        "kind": "modelled",
        "path": str(found.path),
        "device": _device_data(found),
        "assumptions": {**dataclasses.asdict(REALISTIC), "range": SPREAD},
        "graphs": [_graph_data(cost) for cost in found.graphs],
        "estimates": [_estimate_data(estimate, kernels=one_mode) for estimate in found.estimates],
        "notes": list(found.notes),
    }
    title = f"MODELLED, not measured: {found.path} on {found.device.title}, tiles per second (FPS)"
    detail = _kernel_report(_fastest(found), every) if one_mode else None
    return RooflineReport(title, tuple(rows), data, listing, detail)


def _fastest(found: Roofline) -> Estimate:
    return max(found.estimates, key=lambda estimate: estimate.fps)


def _graph_text(cost: GraphCost) -> str:
    weights = sum(operator.constant_bytes for operator in cost.operators)
    return f"{cost.product_flop / 1e9:.1f} GFLOP in products per batch of {cost.batch}, weights {weights / 1e6:.1f} MB"


def _estimate_row(estimate: Estimate) -> tuple[str, ...]:
    return (
        estimate.mode.name,
        estimate.precision,
        estimate.attention,
        f"{estimate.traffic_bytes / 1e9:.2f}",
        f"{estimate.bound_fps:.1f}",
        f"{estimate.fps:.1f}",
        f"{estimate.low_fps:.1f} ... {estimate.high_fps:.1f}",
    )


def _kernel_report(estimate: Estimate, every: bool) -> Report:
    total = sum(time.seconds for time in estimate.times)
    shown = list(estimate.times) if every else sorted(estimate.times, key=lambda time: -time.seconds)[:_LISTED]
    rows: list[tuple[str, ...]] = [
        (
            time.kernel.name + (f" + {len(time.kernel.operators) - 1}" if len(time.kernel.operators) > 1 else ""),
            time.kernel.precision if time.kernel.product_flop else "",
            f"{(time.kernel.product_flop + time.kernel.vector_flop) / 1e9:.2f}",
            f"{time.kernel.traffic_bytes / 1e6:.2f}",
            f"{time.seconds * 1e3:.3f}",
            f"{time.seconds / total:.1%}",
            time.bound_by,
        )
        for time in shown
    ]
    if len(shown) < len(estimate.times):
        rows.append((f"... {len(estimate.times) - len(shown)} more (--all)", *[""] * 6))
    columns = ("operator + what runs with it", "products", "GFLOP", "MB moved", "ms modelled", "share", "bound by")
    title = f"MODELLED kernels: {estimate.precision}, attention {estimate.attention}, {estimate.mode.name}"
    return Report(title, (), {}, Listing(columns, tuple(rows)))


def _device_data(found: Roofline) -> dict[str, Any]:
    device = found.device
    return {
        "name": device.name,
        "title": device.title,
        "operations_per_multiprocessor_and_clock": dataclasses.asdict(device.rates),
        "modes": {name: dataclasses.asdict(mode) for name, mode in device.modes.items()},
    }


def _graph_data(cost: GraphCost) -> dict[str, Any]:
    return {
        "precision": cost.precision,
        "batch": cost.batch,
        "product_flop": cost.product_flop,
        "operators": [_operator_data(operator) for operator in cost.operators],
    }


def _operator_data(operator: Operator) -> dict[str, Any]:
    return {
        "name": operator.name,
        "operator": operator.op,
        "precision": operator.precision,
        "flop": operator.product_flop + operator.vector_flop,
        "read_bytes": operator.read_bytes,
        "written_bytes": operator.written_bytes,
        "weight_bytes": operator.constant_bytes,
    }


def _estimate_data(estimate: Estimate, *, kernels: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "mode": estimate.mode.name,
        "precision": estimate.precision,
        "attention": estimate.attention,
        "modelled_kernels": estimate.kernels,
        "modelled_traffic_bytes": estimate.traffic_bytes,
        "modelled_arithmetic_bound_fps": estimate.arithmetic_bound_fps if estimate.product_flop else None,
        "modelled_bound_fps": estimate.bound_fps,
        "modelled_fps": estimate.fps,
        "modelled_fps_range": [estimate.low_fps, estimate.high_fps],
    }
    if kernels:
        data["kernels"] = [
            {
                "name": time.kernel.name,
                "operators": list(time.kernel.operators),
                "flop": time.kernel.product_flop + time.kernel.vector_flop,
                "traffic_bytes": time.kernel.traffic_bytes,
                "modelled_seconds": time.seconds,
                "bound_by": time.bound_by,
            }
            for time in estimate.times
        ]
    return data
