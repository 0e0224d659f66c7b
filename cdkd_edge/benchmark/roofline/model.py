"""Model how fast a graph can run on a device: the sum of the rooflines of its kernels.

A kernel takes as long as the slower of its arithmetic and its memory traffic, and kernels run one after the other
(Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009, applied to each kernel). All speeds are modelled and must
never be shown as measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from cdkd_edge.benchmark.record import ModelledBound
from cdkd_edge.benchmark.roofline.compiled import (
    attention_of_layers,
    batch_of_layers,
    kernels_of_layers,
    precision_of_layers,
)
from cdkd_edge.benchmark.roofline.devices import Device, ModeLimits, device_tree_parts, find_device, load_device
from cdkd_edge.benchmark.roofline.kernels import Kernel, attention_modes, kernels_of
from cdkd_edge.benchmark.roofline.operators import GraphCost, read_operators
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, GraphError, UsageError
from cdkd_edge.core.files import sha256_of
from cdkd_edge.core.manifest import EngineManifest
from cdkd_edge.engines.runtimes import runtime_of
from cdkd_edge.engines.tensorrt.layers import EngineLayers
from cdkd_edge.graph.files import load_graph


@dataclass(frozen=True)
class Efficiencies:
    """Assumed shares of the peak rates; not measured."""

    gemm: float = 0.55  # FP16 and FP32 products: linear layers, convolutions, and attention that is not fused
    attention: float = 0.45  # fused attention
    int8: float = 0.45  # INT8 products
    dram: float = 0.75
    kernel_seconds: float = 5e-6  # launch time added for every kernel

    def shifted(self, by: float) -> Efficiencies:
        """All shares raised or lowered, at most to 1."""
        names = ("gemm", "attention", "int8", "dram")
        return replace(self, **{name: min(1.0, getattr(self, name) + by) for name in names})


REALISTIC = Efficiencies()
SPREAD = 0.1  # difference of the shares at the ends of the range from ``REALISTIC``
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
        """What limits it: ``arithmetic`` or ``memory``."""
        return "arithmetic" if self.arithmetic_seconds > self.memory_seconds else "memory"


@dataclass(frozen=True)
class Estimate:
    """Modelled speed (FPS: tiles per second) of a graph in one power mode, with attention run in one way."""

    mode: ModeLimits
    precision: str
    attention: str  # ``fused``, ``unfused``, ``unfused, FP32 softmax``, or ``none``
    kernels: int
    product_flop: int  # per batch
    traffic_bytes: int  # per batch: activations and weights
    arithmetic_bound_fps: float  # the products alone at the peak rate; nothing is faster at these clocks
    bound_fps: float  # at the peak rates, without launch times, if no cache keeps data between kernels
    fps: float  # at the assumed shares of the peak rates
    low_fps: float  # at lower shares
    high_fps: float
    times: tuple[KernelTime, ...]  # at the realistic shares


@dataclass(frozen=True)
class Roofline:
    """The result of ``cdkd-edge roofline``."""

    path: Path
    device: Device
    graphs: tuple[GraphCost, ...]  # the graph in each precision
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]


def roofline(path: Path, device: Device, *, mode: str | None = None, precision: str | None = None) -> Roofline:
    """Model a graph file on a device.

    An FP32 graph is also modelled in FP16 and INT8, as ``export`` and ``build --int8`` would write it. Other graphs are
    modelled as they are. Without ``mode`` or ``precision``, all modes and all precisions.

    Raises:
        GraphError, UsageError: no ONNX graph with known shapes; no such mode, or not convertible to that precision.
    """
    modes = [device.mode(mode)] if mode is not None else list(device.modes.values())
    graphs, notes = _graphs(load_graph(path))
    if precision is not None:
        graphs = [cost for cost in graphs if cost.precision == precision]
        if not graphs:
            raise UsageError(f"{path} cannot be modelled in {precision}", hint="; ".join(notes) or None)
    if not kernels_of(graphs[0], attention_modes(graphs[0])[0]):
        raise GraphError(f"{path} computes nothing: there is no kernel to model")
    if graphs[0].unknown:
        notes.append(f"counted as one operation per element: {', '.join(graphs[0].unknown)}")
    if device.note:
        notes.append(device.note)
    cases = [(cost, device, one, way) for one in modes for cost in graphs for way in attention_modes(cost)]
    return Roofline(path, device, tuple(graphs), tuple(estimate(*case) for case in cases), tuple(notes))


def model_engine(compiled: EngineLayers, device: Device, *, mode: str | None = None) -> tuple[Estimate, ...]:
    """Model an engine from the layers that a compiler made, one kernel each, in one power mode or in all.

    ``fps``, ``low_fps`` and ``high_fps`` of an estimate are modelled tiles per second.

    Raises:
        EngineError: there are no layers, or the shapes of one do not tell how many operations it takes.
        UsageError: the device has no such power mode.
    """
    kernels = kernels_of_layers(compiled)
    if not kernels:
        raise EngineError("TensorRT did not list the engine's layers", hint="model the graph that it was built from")
    modes = [device.mode(mode)] if mode is not None else list(device.modes.values())
    batch, kind = batch_of_layers(compiled), (precision_of_layers(compiled), attention_of_layers(compiled))
    return tuple(_estimate(kernels, batch, device, one, kind, REALISTIC) for one in modes)


def estimate(
    cost: GraphCost, device: Device, mode: ModeLimits, attention: str, realistic: Efficiencies = REALISTIC
) -> Estimate:
    """Model one graph in one power mode with attention run in one way."""
    return _estimate(kernels_of(cost, attention), cost.batch, device, mode, (cost.precision, attention), realistic)


def _estimate(
    kernels: Sequence[Kernel],
    batch: int,
    device: Device,
    mode: ModeLimits,
    kind: tuple[str, str],
    realistic: Efficiencies,
) -> Estimate:
    def fps(shares: Efficiencies) -> float:
        return batch / sum(time.seconds for time in kernel_times(kernels, device, mode, shares))

    arithmetic = sum(kernel.product_flop / device.peak(mode, kernel.precision) for kernel in kernels)
    return Estimate(
        mode=mode, precision=kind[0], attention=kind[1], kernels=len(kernels),
        product_flop=sum(kernel.product_flop for kernel in kernels),
        traffic_bytes=sum(kernel.traffic_bytes for kernel in kernels),
        arithmetic_bound_fps=batch / arithmetic if arithmetic else float("inf"), bound_fps=fps(PEAK),
        fps=fps(realistic), low_fps=fps(realistic.shifted(-SPREAD)), high_fps=fps(realistic.shifted(SPREAD)),
        times=kernel_times(kernels, device, mode, realistic),
    )  # fmt: skip


def kernel_times(
    kernels: Sequence[Kernel], device: Device, mode: ModeLimits, shares: Efficiencies
) -> tuple[KernelTime, ...]:
    """Modelled seconds of each kernel."""
    times = []
    for kernel in kernels:
        share = shares.attention if kernel.attention else shares.int8 if kernel.precision == "int8" else shares.gemm
        arithmetic = kernel.product_flop / (device.peak(mode, kernel.precision) * share)
        # The rest runs on CUDA cores, mostly while the tensor cores work: the slower of the two counts.
        arithmetic = max(arithmetic, kernel.vector_flop / device.peak(mode, "fp32"))
        memory = kernel.traffic_bytes / (mode.bandwidth_gb_s * 1e9 * shares.dram)
        times.append(KernelTime(kernel, arithmetic, memory, shares.kernel_seconds))
    return tuple(times)


def modelled_bound(
    engine: EngineManifest,
    folders: Sequence[Path],
    tiles_per_second: float | None,
    *,
    device: str | None = None,
    mode: str | None = None,
    root: Path = Path("/"),
) -> tuple[ModelledBound | None, str]:
    """The bound of an engine's graph on the device it runs on, or None and why there is none.

    A share of the bound above 1 means that an assumption is wrong: higher clocks than the power mode's, or data kept in
    a cache.

    Args:
        folders: folders to look for its graph in.
        tiles_per_second: the measured speed; None if there is none.
        device: name of a device file. Default: that of this board, or of the GPU the engine was built on.
        mode: the board's power mode; None: not known.
        root: root of the file tree with ``proc/device-tree``.

    Raises:
        UsageError: there is no device file of that name.
    """
    chosen = load_device(device) if device is not None else None
    if runtime_of(engine).on_cpu:
        return None, "the roofline models GPUs, and this engine runs on the CPU"
    gpu = engine.tensorrt.gpu if engine.tensorrt else None
    known = chosen or find_device(part=device_tree_parts(root), gpu=gpu)
    if known is None:
        return None, f"there is no device file for {gpu or engine.device}; name one with --device"
    paths = [folder / engine.graph.file for folder in folders]
    graph = next((path for path in paths if path.is_file() and sha256_of(path) == engine.graph.sha256), None)
    if graph is None:
        return None, f"its graph {engine.graph.file} is neither beside the engine nor in the workspace"
    name = next(iter(known.modes)) if mode is None and len(known.modes) == 1 else mode
    if name not in known.modes:
        return None, f"{known.title} is in power mode {mode or 'unknown'}, which is not in its device file"
    try:
        found = roofline(graph, known, mode=name, precision=engine.precision)
    except CdkdEdgeError as error:
        return None, error.message
    # Attention as the compiler built it: fused if it fused any block.
    wanted = "fused" if engine.attention_fused else "unfused"
    fitting = [one for one in found.estimates if one.attention == wanted] or list(found.estimates)
    best = max(fitting, key=lambda one: one.bound_fps)
    share = tiles_per_second / best.bound_fps if tiles_per_second else None
    expected = best.low_fps, best.high_fps
    return ModelledBound(known.name, best.mode.name, best.precision, best.bound_fps, expected, share), ""


def _graphs(model: onnx.ModelProto) -> tuple[list[GraphCost], list[str]]:
    """The graph in every precision it can be converted to, and why not in the others."""
    from cdkd_edge.graph.fp16 import to_fp16

    own = read_operators(model)
    if own.precision != "fp32":
        return [own], [f"the graph is {own.precision}; only an FP32 graph is modelled in every precision"]
    graphs, notes = [own], []
    for name, convert in (("fp16", to_fp16), ("int8", _as_int8)):
        try:
            graphs.append(read_operators(convert(model)))
        except (CdkdEdgeError, StopIteration, IndexError) as error:
            reason = error.message if isinstance(error, CdkdEdgeError) else "it was not written by cdkd-edge"
            notes.append(f"not modelled in {name}: {reason}")
    return graphs, notes


def _as_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as ``build --int8`` quantises it, with dummy scales: only shapes matter here."""
    from cdkd_edge.graph.int8 import int8_graph
    from cdkd_edge.graph.int8_ranges import LayerScales, weight_scales
    from cdkd_edge.graph.layers import quantizable_layers, weight_of

    if not model.graph.input or not model.graph.input[0].type.tensor_type.shape.dim:
        raise GraphError("the graph has no input image")
    layers = quantizable_layers(model)
    weights = ((one.name, weight_scales(weight_of(model, one.weight), one.output_axis)) for one in layers)
    return int8_graph(model, layers, {name: LayerScales(1.0, scales) for name, scales in weights})
