"""How fast a graph could be on a device: the roofline of every kernel, summed.

A kernel takes as long as the slower of its arithmetic and its traffic; kernels run one after the other (Williams,
Waterman, Patterson: Roofline, CACM 52(4), 2009, for each kernel). Three answers:

- ``bound``: at the device's peak rates, without launch times. Assumes that nothing stays in a cache between kernels;
- ``arithmetic bound``: the products alone at peak rate. Nothing can be faster at these clocks;
- ``realistic``: at assumed shares of the peak rates, with a range from lower and higher shares.

All of it is modelled. No figure here may be put where a measurement is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from cdkd_edge.bench.roofline.devices import Device, PowerMode
from cdkd_edge.bench.roofline.kernels import Kernel, attention_modes, kernels_of
from cdkd_edge.bench.roofline.operators import GraphCost, read_operators
from cdkd_edge.core.errors import CdkdEdgeError, GraphError, UsageError
from cdkd_edge.graph.files import load_graph


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the peak rates that are assumed to be reached. Assumptions, not measurements."""

    gemm: float = 0.55
    """Products in FP16 and FP32: linear layers, convolutions, attention's own where it is not fused."""
    attention: float = 0.45
    """Fused attention."""
    int8: float = 0.45
    """Products in INT8."""
    dram: float = 0.75
    kernel_seconds: float = 5e-6
    """Added for every kernel."""

    def shifted(self, by: float) -> Efficiencies:
        """All shares raised or lowered, at most to 1."""
        gemm, attention, int8, dram = (
            min(1.0, share + by) for share in (self.gemm, self.attention, self.int8, self.dram)
        )
        return Efficiencies(gemm, attention, int8, dram, self.kernel_seconds)


REALISTIC = Efficiencies()
SPREAD = 0.1
"""How far the shares of the range lie from those of :data:`REALISTIC`."""
PEAK = Efficiencies(1.0, 1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class KernelTime:
    """Modelled seconds of one kernel for one batch."""

    kernel: Kernel
    arithmetic_seconds: float
    memory_seconds: float
    launch_seconds: float

    @property
    def seconds(self) -> float:
        """Modelled duration."""
        return max(self.arithmetic_seconds, self.memory_seconds) + self.launch_seconds

    @property
    def bound_by(self) -> str:
        """What it waits for."""
        return "arithmetic" if self.arithmetic_seconds > self.memory_seconds else "memory"


@dataclass(frozen=True)
class Estimate:
    """Modelled speed of a graph in one power mode, with attention run in one way. Tiles per second (FPS)."""

    mode: PowerMode
    precision: str
    attention: str
    """``fused``, ``unfused``, ``unfused, FP32 softmax``, or ``none``."""
    kernels: int
    product_flop: int
    """Per batch."""
    traffic_bytes: int
    """Per batch: activations and weights."""
    arithmetic_bound_fps: float
    bound_fps: float
    fps: float
    low_fps: float
    high_fps: float
    times: tuple[KernelTime, ...]
    """At the realistic rates."""


@dataclass(frozen=True)
class Roofline:
    """What ``cdkd-edge roofline`` found."""

    path: Path
    device: Device
    graphs: tuple[GraphCost, ...]
    """The graph in each precision."""
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]


def roofline(path: Path, device: Device, *, mode: str | None = None, precision: str | None = None) -> Roofline:
    """Model a graph file on a device.

    An FP32 graph is modelled in FP16 and INT8 as well: as ``export`` and ``build --int8`` would write it. Other graphs
    are modelled as they are.

    Args:
        path: an ONNX graph with static shapes.
        device: from :func:`~cdkd_edge.bench.roofline.devices.load_device`.
        mode: one power mode. Default: all.
        precision: one precision. Default: all that can be had from the graph.

    Raises:
        GraphError: the file is no ONNX graph with known shapes.
        UsageError: the device has no such mode, or the graph cannot be had in that precision.
    """
    modes = [device.mode(mode)] if mode is not None else list(device.modes.values())
    graphs, notes = _graphs(load_graph(path))
    if precision is not None:
        graphs = [cost for cost in graphs if cost.precision == precision]
        if not graphs:
            raise UsageError(f"{path} cannot be modelled in {precision}", hint="; ".join(notes) or None)
    for cost in graphs[:1]:
        if not kernels_of(cost, attention_modes(cost)[0]):
            raise GraphError(f"{path} computes nothing: there is no kernel to model")
        if cost.unknown:
            notes.append(f"counted as one operation per element: {', '.join(cost.unknown)}")
    if device.note:
        notes.append(device.note)
    estimates = tuple(
        estimate(cost, device, one, attention)
        for one in modes
        for cost in graphs
        for attention in attention_modes(cost)
    )
    return Roofline(path, device, tuple(graphs), estimates, tuple(notes))


def estimate(
    cost: GraphCost, device: Device, mode: PowerMode, attention: str, realistic: Efficiencies = REALISTIC
) -> Estimate:
    """Model one graph in one power mode with attention run in one way."""
    kernels = kernels_of(cost, attention)

    def fps(shares: Efficiencies) -> float:
        return cost.batch / sum(time.seconds for time in kernel_times(kernels, device, mode, shares))

    arithmetic = sum(kernel.product_flop / device.peak(mode, kernel.precision) for kernel in kernels)
    return Estimate(
        mode=mode,
        precision=cost.precision,
        attention=attention,
        kernels=len(kernels),
        product_flop=cost.product_flop,
        traffic_bytes=sum(kernel.traffic_bytes for kernel in kernels),
        arithmetic_bound_fps=cost.batch / arithmetic if arithmetic else float("inf"),
        bound_fps=fps(PEAK),
        fps=fps(realistic),
        low_fps=fps(realistic.shifted(-SPREAD)),
        high_fps=fps(realistic.shifted(SPREAD)),
        times=kernel_times(kernels, device, mode, realistic),
    )


def kernel_times(
    kernels: Sequence[Kernel], device: Device, mode: PowerMode, shares: Efficiencies
) -> tuple[KernelTime, ...]:
    """Modelled seconds of each kernel."""
    times = []
    for kernel in kernels:
        share = shares.attention if kernel.attention else shares.int8 if kernel.precision == "int8" else shares.gemm
        arithmetic = kernel.product_flop / (device.peak(mode, kernel.precision) * share)
        # What is no product runs on CUDA cores, mostly while the tensor cores work: the slower of the two counts.
        arithmetic = max(arithmetic, kernel.vector_flop / device.peak(mode, "fp32"))
        memory = kernel.traffic_bytes / (mode.bandwidth_gb_s * 1e9 * shares.dram)
        times.append(KernelTime(kernel, arithmetic, memory, shares.kernel_seconds))
    return tuple(times)


def share_of_bound(measured_fps: float, modelled: Estimate) -> float:
    """A measured speed as a share of the modelled bound; 0.4 is 40 %.

    Above 1 the bound's assumptions do not hold: clocks above those of the power mode, or data kept in a cache.

    Raises:
        ValueError: the measured speed is not positive.
    """
    if not measured_fps > 0:
        raise ValueError(f"{measured_fps} tiles/s is no measured speed")
    return measured_fps / modelled.bound_fps


def _graphs(model: onnx.ModelProto) -> tuple[list[GraphCost], list[str]]:
    """A graph in all precisions that can be had from it, and why others cannot."""
    from cdkd_edge.graph.fp16 import to_fp16

    own = read_operators(model)
    if own.precision != "fp32":
        return [own], [f"the graph is {own.precision}; an FP32 graph is modelled in every precision"]
    graphs, notes = [own], []
    for name, convert in (("fp16", to_fp16), ("int8", _as_int8)):
        try:
            graphs.append(read_operators(convert(model)))
        except (CdkdEdgeError, StopIteration, IndexError) as error:
            reason = error.message if isinstance(error, CdkdEdgeError) else "it was not written by cdkd-edge"
            notes.append(f"not modelled in {name}: {reason}")
    return graphs, notes


def _as_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as `build --int8` quantises it, with scales that mean nothing: only shapes count here."""
    from cdkd_edge.graph.int8 import int8_graph
    from cdkd_edge.graph.int8_ranges import LayerScales, weight_scales
    from cdkd_edge.graph.layers import quantizable_layers, weight_of

    if not model.graph.input or not model.graph.input[0].type.tensor_type.shape.dim:
        raise GraphError("the graph has no input image")
    layers = quantizable_layers(model)
    scales = {
        layer.name: LayerScales(1.0, weight_scales(weight_of(model, layer.weight), layer.output_axis))
        for layer in layers
    }
    return int8_graph(model, layers, scales)
