"""``cdkd-edge roofline``: how fast a graph could be. Tables and data name every figure as modelled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Argument, BadParameter, Option

from cdkd_edge.benchmark.roofline.devices import RATES, device_names
from cdkd_edge.cli.options import JSON, WORKSPACE
from cdkd_edge.cli.report import LISTED, Listing, Report, Rows, fields_of
from cdkd_edge.core.numbers import percent, significant, size
from cdkd_edge.core.workspace import Workspace

if TYPE_CHECKING:
    from cdkd_edge.benchmark.roofline.model import Estimate, Roofline
    from cdkd_edge.benchmark.roofline.operators import GraphCost

_DOCUMENT_VERSION = 1


def roofline(
    artefact: Path | None = Argument(
        None,
        help="Exported graph (.onnx), an engine of TensorRT (.engine), or its layers (.layers.json). Default: the only "
        "FP32 graph in the workspace.",
    ),
    device: str | None = Option(
        None,
        help=f"{', '.join(device_names())}, or a .toml file. Default: this board, else orin-nx-16gb.",
        metavar="DEVICE",
    ),
    mode: str | None = Option(None, help="Power mode, e.g. MAXN; lists its kernels too. Default: all modes."),
    precision: str | None = Option(None, help=f"{', '.join(RATES)}. Default: all that can be made of the graph."),
    every: bool = Option(False, "--all", help=f"List every kernel, not only the {LISTED} that take longest."),
    workspace: Path = WORKSPACE,
    as_json: bool = JSON,
) -> None:
    """Model how fast a graph or an engine could be on a device, from data sheets. Runs and measures nothing.

    An engine is modelled from the layers that TensorRT made, a graph from its operators.
    """
    from cdkd_edge.benchmark.roofline.devices import default_device, load_device
    from cdkd_edge.benchmark.roofline.model import roofline as model

    if precision is not None and precision not in RATES:
        raise BadParameter(f"one of {', '.join(RATES)}", param_hint="--precision")
    chosen = load_device(device) if device is not None else default_device()
    if mode is not None:
        chosen.mode(mode)
    path = artefact or Workspace(workspace).only_graph()
    _describe(model(path, chosen, mode=mode, precision=precision), every=every).show(as_json)


def _describe(found: Roofline, *, every: bool) -> Report:
    """All modes, or one with its kernels."""
    from cdkd_edge.benchmark.roofline.model import LAYERS, REALISTIC, SPREAD
    from cdkd_edge.model.config import attention_text

    def graph_text(cost: GraphCost) -> str:
        weights = size(sum(operator.constant_bytes for operator in cost.operators))
        return f"{significant(cost.product_flop / 1e9)} GFLOP in products per batch of {cost.batch}, weights {weights}"

    def estimate_row(estimate: Estimate) -> tuple[str, ...]:
        figures = map(significant, (estimate.traffic_bytes / 1e9, estimate.bound_fps, estimate.fps))
        span = f"{significant(estimate.low_fps)} .. {significant(estimate.high_fps)}"
        return (estimate.mode.name, estimate.precision, estimate.attention, *figures, span)

    one_mode = len({estimate.mode.name for estimate in found.estimates}) == 1
    assumed = (
        f"assumed: GEMM {REALISTIC.gemm:g}, attention {REALISTIC.attention:g}, INT8 {REALISTIC.int8:g}, DRAM "
        f"{REALISTIC.dram:g} of peak (range: {SPREAD:g} less and more), {1e6 * REALISTIC.kernel_seconds:g} us a kernel"
    )
    source = "operators of the graph, grouped into kernels by rules"
    if found.modelled_from == LAYERS:
        source = f"the {found.estimates[0].kernels} layers that TensorRT made, one kernel each"
    rows: Rows = [
        ("device", found.device.title),
        ("modelled from", source),
        *([("attention", attention_text(found.attention))] if found.attention is not None else []),
        *((f"{cost.precision} graph", graph_text(cost)) for cost in found.graphs),
        ("bound", "every kernel at peak rate, nothing kept in a cache between kernels"),
        ("realistic", assumed),
        *(("note", note) for note in found.notes),
    ]
    columns = ("mode", "precision", "attention", "GB moved", "bound FPS", "realistic FPS", "range")
    listings = [Listing(columns, tuple(map(estimate_row, found.estimates)))]
    if one_mode:
        listings.append(_kernel_listing(max(found.estimates, key=lambda estimate: estimate.fps), every))
    title = f"MODELLED, not measured: {found.path} on {found.device.title}, tiles per second (FPS)"
    return Report(title, rows, _data(found, kernels=one_mode), tuple(listings))


def _kernel_listing(estimate: Estimate, every: bool) -> Listing:
    total = sum(time.seconds for time in estimate.times)
    shown = list(estimate.times) if every else sorted(estimate.times, key=lambda time: -time.seconds)[:LISTED]
    rows: list[tuple[str, ...]] = []
    for time in shown:
        kernel, others = time.kernel, len(time.kernel.operators) - 1
        name = kernel.name + (f" + {others}" if others else "")
        sizes = ((kernel.product_flop + kernel.vector_flop) / 1e9, kernel.traffic_bytes / 1e6, time.seconds * 1e3)
        precision = kernel.precision if kernel.product_flop else ""
        rows.append((name, precision, *map(significant, sizes), percent(time.seconds / total), time.bound_by))
    if len(shown) < len(estimate.times):
        rows.append((f"... {len(estimate.times) - len(shown)} more (--all)", *[""] * 6))
    columns = ("operator + what runs with it", "products", "GFLOP", "MB moved", "ms modelled", "share", "bound by")
    title = f"MODELLED kernels: {estimate.precision}, attention {estimate.attention}, {estimate.mode.name}"
    return Listing(columns, tuple(rows), title)


def _data(found: Roofline, *, kernels: bool) -> dict[str, Any]:
    from cdkd_edge.benchmark.roofline.model import REALISTIC, SPREAD

    rates = {"operations_per_multiprocessor_and_clock": found.device.rates}
    return {
        "roofline_version": _DOCUMENT_VERSION,
        "kind": "modelled",
        **fields_of(found, "path", "modelled_from", "attention", "notes"),
        "device": {**fields_of(found.device, "name", "title", "modes"), **rates},
        "assumptions": {**dataclasses.asdict(REALISTIC), "range": SPREAD},
        "graphs": [_graph_data(cost) for cost in found.graphs],
        "estimates": [_estimate_data(estimate, kernels=kernels) for estimate in found.estimates],
    }


def _graph_data(cost: GraphCost) -> dict[str, Any]:
    operators = [
        {
            **fields_of(operator, "name", "precision", "read_bytes", "written_bytes"),
            "operator": operator.op,
            "flop": operator.product_flop + operator.vector_flop,
            "weight_bytes": operator.constant_bytes,
        }
        for operator in cost.operators
    ]
    return {**fields_of(cost, "precision", "batch", "product_flop"), "operators": operators}


def _estimate_data(estimate: Estimate, *, kernels: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "mode": estimate.mode.name,
        **fields_of(estimate, "precision", "attention"),
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
                **fields_of(time.kernel, "name", "operators", "traffic_bytes"),
                "flop": time.kernel.product_flop + time.kernel.vector_flop,
                "modelled_seconds": time.seconds,
                "bound_by": time.bound_by,
            }
            for time in estimate.times
        ]
    return data
