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

from cdkd_edge.benchmark.roofline.compiled import (
    attention_of_layers,
    batch_of_layers,
    kernels_of_layers,
    precision_of_layers,
)
from cdkd_edge.benchmark.roofline.devices import Device, ModeLimits
from cdkd_edge.benchmark.roofline.kernels import Kernel, attention_modes, kernels_of
from cdkd_edge.benchmark.roofline.operators import GraphCost, read_operators
from cdkd_edge.core.errors import CdkdEdgeError, EngineError, GraphError, ManifestError, UsageError
from cdkd_edge.core.manifest import EngineManifest, attention_kinds, read_manifest
from cdkd_edge.engines.tensorrt.layers import LAYERS_SUFFIX, EngineLayers, read_layers, read_layers_file
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
GRAPH, LAYERS = "graph", "layers"  # what kernels are taken from


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
    modelled_from: str  # :data:`GRAPH`: its operators, grouped into kernels by rules; or :data:`LAYERS` of an engine
    graphs: tuple[GraphCost, ...]  # the graph in each precision; empty for an engine
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]
    attention: tuple[str, ...] | None  # what each block attends to (empty: global); None if that is not known


def roofline(path: Path, device: Device, *, mode: str | None = None, precision: str | None = None) -> Roofline:
    """Model a graph on a device, or an engine of TensorRT by the layers that were listed when it was built.

    An FP32 graph is also modelled in FP16 and INT8, as ``export`` and ``build --int8`` would write it. Other graphs,
    and engines, are modelled as they are. Without ``mode`` or ``precision``, all modes and all precisions.

    Args:
        path: a graph (``.onnx``), an engine (``.engine``) or its layers (``.layers.json``).

    Raises:
        GraphError, UsageError: no ONNX graph with known shapes; no such mode, or not convertible to that precision.
        EngineError, ManifestError: the engine is damaged, or its layers are not known.
    """
    if path.suffix == ".engine" or path.name.endswith(LAYERS_SUFFIX):
        return _roofline_of_engine(path, device, mode, precision)
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
    estimates = tuple(estimate(*case) for case in cases)
    return Roofline(path, device, GRAPH, tuple(graphs), estimates, tuple(notes), attention_kinds(path))


def _roofline_of_engine(path: Path, device: Device, mode: str | None, precision: str | None) -> Roofline:
    notes = [device.note] if device.note else []
    if path.name.endswith(LAYERS_SUFFIX):
        try:
            compiled, _ = read_layers_file(path)
        except FileNotFoundError:
            raise ManifestError(f"{path} does not exist") from None
    else:
        manifest = read_manifest(path, EngineManifest)
        found = read_layers(path, manifest.artefact.sha256)
        if found is None:
            hint = f"build it again, or model its graph {manifest.graph.file}"
            raise ManifestError(f"the layers of {path} are not recorded beside it (.layers.json)", hint=hint)
        compiled = found
        notes.insert(0, f"the layers are those for {manifest.device.removeprefix('compiled for ')}")
    estimates = model_engine(compiled, device, mode=mode)
    if precision not in (None, estimates[0].precision):
        hint = f"it is an engine in {estimates[0].precision}; a graph can be modelled in every precision"
        raise UsageError(f"{path} cannot be modelled in {precision}", hint=hint)
    return Roofline(path, device, LAYERS, (), estimates, tuple(notes), attention_kinds(path))


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
