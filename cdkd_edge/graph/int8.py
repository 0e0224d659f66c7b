"""The INT8 graph: smooth the FP32 graph, choose scales on calibration tiles, write Q/DQ.

Precision is in the graph (FP16 with Q/DQ), so that TensorRT 10.3 and 11 compile the same arithmetic. Q/DQ are on inputs
and weights only, because Q/DQ on outputs keep epilogues from being fused; biases are floating point, because the parser
takes no others. The CPU's version is made from the same file (:func:`cdkd_edge.graph.cpu.cpu_twin`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from cdkd_edge.core.errors import GraphError, UsageError
from cdkd_edge.graph.fp16 import to_fp16
from cdkd_edge.graph.int8_ranges import (
    CALIBRATORS,
    PERCENTILE,
    LayerScales,
    Observation,
    UInt8Array,
    activation_scale,
    observe,
    quantize_weight,
    weight_scales,
)
from cdkd_edge.graph.layers import (
    Array,
    QuantizableLayer,
    constant_users,
    input_makers,
    multiply_constant,
    quantizable_layers,
    weight_of,
    weight_only_layers,
)
from cdkd_edge.graph.nodes import NodeWriter, Note, copy_of, opset_of, replace_nodes
from cdkd_edge.graph.tiles import SetTiles

ALPHA = 0.5  # SmoothQuant's exponent
SMOOTHING_TILES = 16  # channel maxima, which smoothing needs, settle long before the tails of histograms do
MIN_OPSET = 19  # the first with FP16 scales


@dataclass(frozen=True)
class CalibrationOptions:
    """How ranges are chosen."""

    calibrator: str = "percentile"
    percentile: float = PERCENTILE
    alpha: float | None = ALPHA  # SmoothQuant's exponent, above 0, at most 1; None: no smoothing

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise UsageError(f"there is no calibrator {self.calibrator!r}", hint=f"there are {', '.join(CALIBRATORS)}")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"--percentile must be above 50 and at most 100, got {self.percentile}")
        if self.percentile != PERCENTILE and self.calibrator != "percentile":
            raise UsageError(
                f"the {self.calibrator} calibrator has no percentile", hint="--calibrator percentile takes one"
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UsageError(f"SmoothQuant's exponent (--alpha) must be between 0 and 1, got {self.alpha}")


@dataclass(frozen=True)
class Calibrated:
    """An FP32 graph ready to be quantised."""

    model: onnx.ModelProto  # smoothed; the same function as the graph it was made from
    layers: list[QuantizableLayer]
    scales: dict[str, LayerScales]  # scales of every layer, by name
    smoothed: tuple[str, ...]  # layers whose input was smoothed


def calibrate(
    plain: onnx.ModelProto,
    tiles: SetTiles,
    options: CalibrationOptions = CalibrationOptions(),
    note: Note = lambda text: None,
) -> Calibrated:
    """Smooth a graph, which is not changed, and choose the scales of every quantisable layer.

    Tiles are read one at a time, and only channel maxima and histograms are kept. ``note`` is called after each.

    Raises:
        GraphError, ValueError: the graph has no layers that INT8 is for; there are no tiles.
    """

    def counted(tiles: Iterable[UInt8Array], total: int, what: str) -> Iterator[UInt8Array]:
        for done, tile in enumerate(tiles, start=1):
            yield tile
            note(f"{what}: tile {done} of {total}")

    model = copy_of(plain)
    layers = quantizable_layers(model)
    smoothed: tuple[str, ...] = ()
    if options.alpha is not None:
        step = max(len(tiles) // SMOOTHING_TILES, 1)
        spread = (tile for index, tile in enumerate(tiles) if index % step == 0)
        seen = observe(model, layers, counted(spread, -(-len(tiles) // step), "channel maxima"))
        smoothed = tuple(smooth(model, layers, seen, options.alpha))
        layers = quantizable_layers(model)
    seen = observe(model, layers, counted(tiles, len(tiles), "ranges"))
    scales = {
        layer.name: LayerScales(
            activation_scale(seen[layer.name], options.calibrator, options.percentile),
            weight_scales(weight_of(model, layer.weight), layer.output_axis),
        )
        for layer in layers
    }
    return Calibrated(model, layers, scales, smoothed)


def smooth(
    model: onnx.ModelProto, layers: Sequence[QuantizableLayer], observations: Mapping[str, Observation], alpha: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Fold SmoothQuant's factors into the weights of an FP32 graph, in place: the same function, node for node.

    SmoothQuant (Xiao et al., ICML 2023, https://arxiv.org/abs/2211.10438, eq. 4) moves outliers from activations, where
    one scale serves all channels, into weights: channel j of a layer's input is divided by
    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), row j of its weight multiplied by it. The division is free where a
    constant makes the channel: LayerNorm before fc1 and, beyond the paper, the projection to v before proj.

    Returns:
        The factors ``[K]`` by which each smoothed layer's input is now smaller.
    """
    users = constant_users(model)
    nodes = {node.name: node for node in model.graph.node}
    factors = {}
    for layer in layers:
        makers = input_makers(model, layer)
        if not makers:
            continue
        scale = _factors(observations[layer.name].channel_max, weight_of(model, nodes[layer.node].input[1]), alpha)
        multiply_constant(model, users, nodes[layer.node], 1, scale[:, None])
        for node, position in makers:
            multiply_constant(model, users, node, position, 1 / scale)
        factors[layer.name] = scale
    return factors


def _factors(channel_max: Array, weight: Array, alpha: float) -> npt.NDArray[np.float64]:
    """s of eq. 4, ``[K]``, as powers of two; 1 for a channel that is always zero or has no weight.

    Multiplying by a power of two rounds nothing, and magnitudes that differ in their last digits, as between two CPUs,
    give the same power: the weights come out the same to the last bit.
    """
    activation = channel_max.astype(np.float64)
    row = np.abs(weight).max(axis=1).astype(np.float64)
    usable = (activation > 0) & (row > 0)
    scale = np.ones_like(activation)
    scale[usable] = activation[usable] ** alpha / row[usable] ** (1 - alpha)
    powers: npt.NDArray[np.float64] = np.exp2(np.clip(np.rint(np.log2(scale)), -13, 13))
    return powers


def int8_graph(
    model: onnx.ModelProto, layers: Sequence[QuantizableLayer], scales: Mapping[str, LayerScales]
) -> onnx.ModelProto:
    """Quantise a (smoothed) FP32 graph, which is not changed; layers without ``scales`` stay FP16.

    Raises:
        GraphError: the graph's opset has no FP16 scales.
    """
    opset = opset_of(model)
    if opset < MIN_OPSET:
        raise GraphError(
            f"INT8 needs a graph of opset {MIN_OPSET} or newer; this one has opset {opset}",
            hint="export the checkpoint again with --opset 20",
        )
    half = to_fp16(model)
    nodes = {node.name: node for node in half.graph.node}
    constants: dict[str, onnx.TensorProto] = {}
    before = {name: NodeWriter(constants) for name in nodes}  # what to insert before each node

    def quantize_input(layer: QuantizableLayer, scale: float) -> None:
        """Put ``Q -> DQ`` before a layer's input."""
        # A scale per tensor has no dimension. With one of size 1 it would count as per axis, and compilers would
        # compute the layer in FP16.
        writer, name = before[layer.node], layer.name
        zero = writer.constant("int8_zero", np.zeros((), np.int8))
        stored = writer.constant(f"{name}.input_scale", np.array(scale, np.float16))
        integers = writer.add("QuantizeLinear", f"{name}.input_int8", layer.input, stored, zero)
        nodes[layer.node].input[0] = writer.add("DequantizeLinear", f"{name}.input", integers, stored, zero)

    def use_integers(node: str, name: str, weight: Array, scales: Array, axis: int) -> None:
        """Put ``DQ`` of integers in place of a node's weight."""
        writer = before[node]
        inputs = (
            writer.constant(f"{name}.weight_int8", quantize_weight(weight, scales, axis)),
            writer.constant(f"{name}.weight_scale", scales.astype(np.float16)),
            writer.constant(f"int8_zeros_{len(scales)}", np.zeros(len(scales), np.int8)),
        )
        nodes[node].input[1] = writer.add("DequantizeLinear", f"{name}.weight_real", *inputs, axis=axis)

    for layer in layers:
        if own := scales.get(layer.name):
            quantize_input(layer, own.activation)
            use_integers(layer.node, layer.name, weight_of(model, layer.weight), own.weight, layer.output_axis)
    for node, name in weight_only_layers(model):
        weight = weight_of(model, name)
        use_integers(node, node.rsplit("/", 1)[0], weight, weight_scales(weight, 1), 1)
    edited = [one for name, node in nodes.items() for one in (*before[name].nodes, node)]
    used = {name for node in edited for name in node.input}
    kept = [item for item in (*half.graph.initializer, *constants.values()) if item.name in used]
    replace_nodes(half.graph, edited, kept)
    del half.graph.value_info[:]
    return half
